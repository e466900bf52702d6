"""Floating-point operations of the passes of one rank; a multiply-add counts two."""

from __future__ import annotations

from s2srm.plan.counts import Counts


def trunk(counts: Counts, tokens: float, length: float) -> float:
    """Forward of the layers: 2 * matrices * tokens, and attention of causal sequences,
    4 * query_width * layers * tokens * keys, a token seeing half its sequence (or its window) on
    average. Source: Kaplan et al., arXiv 2001.08361, table 1."""
    keys = length / 2
    if counts.window:
        keys = min(keys, counts.window)
    return 2.0 * counts.trunk * tokens + attention(counts, tokens, keys)


def attention(counts: Counts, tokens: float, keys: float) -> float:
    """Scores and weighted values of `tokens` queries over `keys` keys each."""
    return 4.0 * counts.query_width * counts.layers * tokens * keys


def head(counts: Counts, rows: float) -> float:
    """Forward of the LM head at the predicted rows: 2 * rows * V * D."""
    return 2.0 * rows * counts.head


def training(
    trunk_forward: float, head_forward: float, checkpointing: bool, recomputes_head: bool
) -> float:
    """Backward is two forwards; activation checkpointing and a head whose loss does not know its
    upstream gradient in the forward make one more each."""
    return trunk_forward * (3 + checkpointing) + head_forward * (3 + recomputes_head)


def decoding(counts: Counts, sequences: float, prompt: float, new: float) -> float:
    """`new` tokens for each sequence, one at a time, after `prompt` tokens."""
    tokens = sequences * new
    return 2.0 * (counts.trunk + counts.head) * tokens + attention(counts, tokens, prompt + new / 2)
