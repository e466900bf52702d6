"""Causal language models in the packed form: loading, the fused head, values, export."""
