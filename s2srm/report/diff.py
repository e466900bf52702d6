"""The difference between a response and its correction, token by token, for page and terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Levenshtein

Change = Literal["same", "deleted", "inserted"]


@dataclass(frozen=True)
class Piece:
    """Text that both have, or only the response (deleted) or only the correction (inserted)."""

    change: Change
    text: str


def diff(response: Sequence[str], correction: Sequence[str]) -> list[Piece]:
    """Pieces of minimum edit distance between two lists of token texts, in reading order.

    A substitution is a deletion followed by an insertion.
    """
    pieces: list[Piece] = []
    for op in Levenshtein.opcodes(response, correction):
        ours = "".join(response[op.src_start : op.src_end])
        theirs = "".join(correction[op.dest_start : op.dest_end])
        if op.tag == "equal":
            pieces.append(Piece("same", theirs))
            continue
        if ours:
            pieces.append(Piece("deleted", ours))
        if theirs:
            pieces.append(Piece("inserted", theirs))
    return pieces
