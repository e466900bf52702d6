"""Rewards of responses: one for every token (seq2seq RM) or one at the end (scalar RM)."""
