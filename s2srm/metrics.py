"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when asked.

A resumed run goes on in the same files, cut to where its checkpoint was. Left out: W&B, where what
comes after a resume is a run of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from s2srm import distributed
from s2srm.config import LogConfig
from s2srm.errors import TrainingDiverged, UserError
from s2srm.jsonl import json_line
from s2srm.outputs import writing
from s2srm.progress import ProgressBar

logger = logging.getLogger(__name__)

METRICS, SAMPLES = HISTORY = ("metrics.jsonl", "samples.jsonl")


class RunLogger:
    """Context manager of one run's numbers and progress; every rank calls it, rank 0 writes.

    output  the run's folder, made by `runs.prepare_output`
    total   optimiser steps (or PPO phases) of the run
    title   what the progress bar says
    Raises UserError where TensorBoard or W&B was asked for and is not installed.
    """

    def __init__(self, output: Path, cfg: LogConfig, total: int, title: str) -> None:
        self.output, self.cfg, self.total = Path(output), cfg, total
        self.last: dict[str, float] = {}
        """Last value of every metric, written or not, and finite or not."""
        self._bar = ProgressBar(total, title)
        self._step = 0
        self._main = distributed.is_main()
        self._metrics: TextIO | None = None
        self._samples: TextIO | None = None
        self._warned: set[str] = set()
        self._tensorboard = _tensorboard(self.output) if cfg.tensorboard and self._main else None
        self._wandb = (
            _wandb(cfg.wandb_project, self.output) if cfg.wandb_project and self._main else None
        )

    def __enter__(self) -> RunLogger:
        if self._main:
            path = self.output / METRICS
            with writing(path):
                self.output.mkdir(parents=True, exist_ok=True)
                self._metrics = path.open("a", encoding="utf-8")
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        if isinstance(error, TrainingDiverged) and self._main:
            self._write(error.step, error.metrics)
        for file in (self._metrics, self._samples):
            if file is not None:
                # A disk that was full at the last write is still full for what the file holds back.
                with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                    file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row of metrics.jsonl: {"step", "time" (Unix seconds), ...values}.

        Steps between multiples of log.every are left out, except the last one and rows that hold
        an evaluation (a key under `eval/`). NaN and infinities become null, with one warning per
        name. UserError where the file cannot be written.
        """
        numbers = {name: float(value) for name, value in values.items()}
        self.last.update(numbers)
        self._step = step
        if not self._main or not self._is_due(step, numbers):
            return
        for name, value in numbers.items():
            if not math.isfinite(value) and name not in self._warned:
                self._warned.add(name)
                logger.warning("%s is %s at step %d", name, value, step)
        finite = self._write(step, numbers)
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            # W&B drops rows whose own step goes back, so the step is an ordinary value.
            self._wandb.log({"step": step, **finite})

    def _write(self, step: int, numbers: Mapping[str, float]) -> dict[str, float]:
        """One line of metrics.jsonl; returns the numbers that are finite."""
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        record = {"step": step, "time": round(time.time(), 3)}
        record |= {name: finite.get(name) for name in numbers}
        assert self._metrics is not None, "RunLogger.row outside its with-block"
        with writing(self.output / METRICS):
            self._metrics.write(json_line(record))
            self._metrics.flush()
        return finite

    def advance(self, n: int = 1, tokens: int = 0, **shown: float | str) -> None:
        """Move the progress bar by n steps; `tokens` (over all ranks) feed its tokens/s."""
        self._bar.advance(n, tokens, **shown)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to samples.jsonl, each with the step."""
        if not self._main:
            return
        path = self.output / SAMPLES
        with writing(path):
            if self._samples is None:
                self._samples = path.open("a", encoding="utf-8")
            for row in rows:
                self._samples.write(json_line({"step": step, **row}))
            self._samples.flush()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: lengths of the files (on rank 0), last values, position."""
        sizes = dict.fromkeys(HISTORY, 0)
        for name, file in zip(HISTORY, (self._metrics, self._samples), strict=True):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
            path = self.output / name
            sizes[name] = path.stat().st_size if path.exists() else 0
        return {"sizes": sizes, "last": self.last, "step": self._step, "done": self._bar.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind a checkpoint's last row: what was written after it will be written again."""
        self.last = dict(state["last"])
        self._step = int(state["step"])
        self._bar.start_at(int(state["done"]))
        if not self._main:
            return
        for name, size in state["sizes"].items():
            path = self.output / name
            found = path.stat().st_size if path.exists() else 0
            if found < size:
                logger.warning("%s lacks rows from before the checkpoint", path)
            elif size == 0 and name == SAMPLES:
                path.unlink(missing_ok=True)
            elif found > size:
                os.truncate(path, size)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _tensorboard(self.output, purge_step=self._step + 1)

    def _is_due(self, step: int, values: Mapping[str, float]) -> bool:
        return (
            step % self.cfg.every == 0
            or step >= self.total
            or any(name.startswith("eval/") for name in values)
        )


def _tensorboard(output: Path, purge_step: int | None = None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"log.tensorboard: TensorBoard is not installed ({error}); pip install tensorboard"
        ) from error
    return SummaryWriter(str(output), purge_step=purge_step)


def _wandb(project: str, output: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"log.wandb_project: Weights & Biases is not installed ({error}); pip install wandb"
        ) from error
    return wandb.init(project=project, dir=str(output), name=output.name)
