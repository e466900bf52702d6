"""The exceptions that a command turns into a single line and exit code 2."""

from __future__ import annotations

from collections.abc import Mapping


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
