"""s2srm: RLHF with language feedback (sequence-to-sequence reward modelling, arXiv 2409.00162)."""

__version__ = "0.1.0"
