"""Sampling responses: the interface in base.py, transformers' own `generate` behind it in hf.py."""
