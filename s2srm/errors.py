"""The exceptions that a command turns into a single line and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class UserError(ValueError):
    """Bad input: its message names the file, line, key or value, and what would be right.

    Commands print the message on one line without a traceback and exit with code 2. Code that
    imports s2srm as a library can catch it as a ValueError.
    """


class TrainingDiverged(UserError):
    """A number of the training is not finite: the run ends before its weights are saved.

    step     the optimiser step (PPO: the phase) that failed, counted from 1
    metrics  what was not finite, by the names of metrics.jsonl, for its last row
    """

    def __init__(self, message: str, step: int, metrics: Mapping[str, float]) -> None:
        super().__init__(message)
        self.step = step
        self.metrics = dict(metrics)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like the one given; None where none is near.

    cutoff: least similarity, from 0 to 1.
    """
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(
    word: str,
    known: Iterable[str],
    *,
    cutoff: float = 0.6,
    shown: Mapping[str, str] | None = None,
) -> str:
    """`; did you mean 'x'?` for the `nearest` known word, or the empty string.

    shown: known word -> what the message says for it.
    """
    near = nearest(word, known, cutoff)
    return f"; did you mean {(shown or {}).get(near, near)!r}?" if near is not None else ""
