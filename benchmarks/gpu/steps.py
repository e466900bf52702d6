"""One step after the other: skipped where an earlier run passed it, started anew where it died."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence

from benchmarks.cases import RESTART
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.runner import RESERVE_S, Runner, Stage, from_root

ATTEMPTS = 3
LEAST_S = 10.0
"""With less time left nothing is started: Python and torch take as long."""


class Steps:
    """Runs steps for one device into one journal. again: names that run although passed."""

    def __init__(
        self, runner: Runner, journal: Journal, device: str, again: Sequence[str] = ()
    ) -> None:
        self.runner, self.journal, self.device, self.again = runner, journal, device, again

    @property
    def rows(self) -> str:
        """The journal's file, as the programs' commands have it."""
        return str(from_root(self.journal.path.resolve()))

    def asked_again(self, name: str) -> bool:
        """Whether a step runs although an earlier run passed it."""
        return not {name, name.partition("-")[0], "all"}.isdisjoint(self.again)

    def left_s(self) -> float:
        """Time for steps: what the end needs is kept back."""
        return self.runner.time_left_s() - RESERVE_S

    def program(
        self,
        module: str,
        *arguments: str,
        limit_s: float,
        name: str = "",
        env: dict[str, str] | None = None,
    ) -> Stage:
        """A program of benchmarks.gpu that runs cases; its part is the module's name."""
        if self.asked_again(name or module):
            arguments = (*arguments, "--again")
        command = (
            *(sys.executable, "-m", f"benchmarks.gpu.{module}", "--name", module),
            *("--device", self.device, "--rows", self.rows, "--run", self.journal.run, *arguments),
        )
        return self.step(name or module, command, limit_s=limit_s, env=env)

    def step(
        self,
        name: str,
        command: Sequence[str],
        *,
        limit_s: float,
        env: dict[str, str] | None = None,
        attempts: int = ATTEMPTS,
        refused: Callable[[str], str | None] | None = None,
    ) -> Stage:
        """One command. It starts again, within its limit, where it asked for it or was killed.

        What it had measured is in its rows by then, and it goes on behind them. refused: asked with
        the output of a command that did not pass, why that is no failure; None if it is one.
        """
        known = self.journal.passed(name)
        if known is not None and not self.asked_again(name):
            return Stage(name, "passed", 0.0, f"in an earlier run, {known.run}")
        limit_s = min(limit_s, self.left_s())
        if limit_s < LEAST_S:
            return Stage(name, "not run", 0.0, "no time left")
        stage = self.runner.run(name, command, limit_s, extra_env=env, echo=True)
        spent, died = stage.seconds, _died(stage)
        for _ in range(attempts - 1):
            if not (died and limit_s - spent >= LEAST_S):
                break
            print(f"[{name}] once more, in a new process", flush=True)
            self.journal.mend()
            self.journal.record(stage, self.runner.log(name))
            stage = self.runner.run(name, command, limit_s - spent, extra_env=env, echo=True)
            spent, died = spent + stage.seconds, _died(stage)
        stage = dataclasses.replace(stage, seconds=spent)
        reason = refused(self.runner.log(name)) if stage.bad and refused is not None else None
        if reason is not None:
            stage = dataclasses.replace(stage, status="not run", detail=reason)
            print(f"[{name}] not run: {reason}", flush=True)
        self.journal.mend()
        self.journal.record(stage, self.runner.log(name))
        return stage


def _died(stage: Stage) -> bool:
    return stage.code is not None and (stage.code == RESTART or stage.code < 0)
