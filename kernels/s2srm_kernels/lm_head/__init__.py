"""What the vocabulary operations are made of, whatever computes them: one LM head, its row
statistics and their gradients, and the reference engine."""
