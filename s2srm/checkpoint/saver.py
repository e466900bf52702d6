"""Saving and restoring a run between two steps.

A checkpoint holds the masters and moments of every trained model, in pieces as the ranks hold them,
and as JSON the position in schedule, data and metrics, every rank's random number generators, the
stage's own small state, the settings and the versions. Pieces are put together by position, so any
number of ranks and any ZeRO stage reads what another wrote: exact to the bit in weights and
optimiser, and with the same number of ranks in everything that follows.

Left out: frozen weights (they are read again from where they came from), gradients (there are none
between two steps), and saving while the training goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from s2srm import distributed
from s2srm.checkpoint import files
from s2srm.checkpoint.lock import RunLock
from s2srm.checkpoint.rng import rng_state, set_rng_state
from s2srm.checkpoint.sources import sum_of_rows, sums_of_models
from s2srm.checkpoint.start import Start, on_main
from s2srm.checkpoint.stop import Stopped, StopRequest
from s2srm.checkpoint.tensors import Entry, TensorFiles, write_tensors
from s2srm.config import StageConfig
from s2srm.engine import Engine
from s2srm.engine.pieces import Piece, optimiser_state, start_state
from s2srm.errors import UserError
from s2srm.runs import config_to_dict, versions
from s2srm.watchdog import pulse

logger = logging.getLogger(__name__)


class Resumable(Protocol):
    """A part of a stage with a small state of its own, the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        ...


class Checkpoints:
    """The checkpoints of one run.

    engines  the models that are trained, by name
    parts    whatever else has a state; `log` must be the run's RunLogger
    total    steps (PPO: phases) of the run
    rows     the training data as token ids: a run does not go on with other data
    """

    def __init__(
        self,
        cfg: StageConfig,
        output: Path,
        engines: Mapping[str, Engine],
        parts: Mapping[str, Resumable],
        total: int,
        rows: Iterable[object],
    ) -> None:
        self.cfg, self.output, self.total = cfg, output, total
        self.engines, self.parts = dict(engines), dict(parts)
        self._rows = rows
        self._sources: dict[str, Any] | None = None
        self._enabled = cfg.save_every > 0 or cfg.resume != "never"
        self._stop = StopRequest(enabled=self._enabled)
        self._lock = RunLock(output)

    def __enter__(self) -> Checkpoints:
        if self._enabled:
            on_main(self._lock.take)
        self._stop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.__exit__()
        self._lock.release()

    def resume(self, start: Start) -> int:
        """Restore the checkpoint that the run starts from; returns the steps it had done."""
        if start.checkpoint is None:
            return 0
        state = start.state
        pulse.phase(f"restoring {start.checkpoint}")
        if state["step"] > self.total:
            raise UserError(
                f"resume: {start.checkpoint} has done {state['step']} steps, the run is to have "
                f"{self.total}"
            )
        if state["data"] != self._sources_now()["data"]:
            raise UserError(
                f"resume: {start.checkpoint} was trained on other rows: data.path must hold the "
                "same rows, written down with the same tokenizer and template"
            )
        for name, engine in self.engines.items():
            saved = state["engines"][name]
            paths = [start.checkpoint / file for file in saved["files"]]
            _restore(engine, TensorFiles(paths), saved, start.checkpoint)
            engine.sleep()
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        if distributed.rank() < len(state["rng"]):
            set_rng_state(state["rng"][distributed.rank()])
        self._warn_of_versions(state["versions"])
        return int(state["step"])

    def after_step(self, step: int, check: Callable[[], None] | None = None) -> None:
        """Save where a checkpoint is due: every save_every steps, and after the last one.

        check: raises where the weights are not worth saving. Where SIGTERM has come, save and raise
        Stopped. All ranks call it.
        """
        every = self.cfg.save_every
        stop = self._stop.seen() and step < self.total
        if stop or (every > 0 and (step % every == 0 or step == self.total)):
            if check is not None:
                check()
            self.save(step)
        if stop:
            if distributed.is_main():
                logger.warning("SIGTERM: stopped after step %d; --resume auto goes on", step)
            raise Stopped

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` steps. All ranks call it.

        UserError, with the last good checkpoint in place, if it cannot be written.
        """
        started = time.perf_counter()
        pulse.phase(f"checkpoint of step {step}")
        temporary = files.temporary_path(self.output, step)
        self._together(lambda: files.make_temporary(self.output, step), main_only=True)
        written = self._together(lambda: self._write_tensors(temporary))
        sums = {name: total for mine in written for name, total in mine.items()}
        rng = distributed.gather_objects(rng_state())

        def complete() -> None:
            state = self._state(step, rng, sorted(sums))
            _check_visible(temporary, sums)
            sums[files.STATE] = files.write_json(temporary / files.STATE, state)
            files.write_manifest(temporary, sums)
            files.commit(temporary, files.checkpoint_path(self.output, step))
            files.keep_newest(self.output, self.cfg.keep_checkpoints)

        self._together(complete, main_only=True)
        if distributed.is_main():
            size = sum(total.size for total in sums.values()) / 2**20
            took = time.perf_counter() - started
            logger.info("checkpoint of step %d: %.1f MiB in %.1f s", step, size, took)

    def _write_tensors(self, folder: Path) -> dict[str, files.FileSum]:
        rank, world = distributed.rank(), distributed.world_size()
        found: dict[str, files.FileSum] = {}
        for name, engine in self.engines.items():
            file = f"{name}-{rank:05d}-of-{world:05d}.safetensors"
            assert engine.optimizer is not None
            entries = [
                (Entry(kind, piece.start, piece.name), tensor)
                for piece in _share(engine)
                for kind, tensor in (
                    ("weight", piece.weight),
                    *optimiser_state(engine.optimizer, piece).items(),
                )
            ]
            found[file] = write_tensors(folder / file, entries)
            engine.sleep(weights=False)
        return found

    def _state(self, step: int, rng: list[Any], names: list[str]) -> dict[str, Any]:
        """What state.json holds; asked for on rank 0 only."""
        return {
            "format": files.FORMAT,
            "stage": type(self.cfg).__name__,
            "step": step,
            "world_size": distributed.world_size(),
            "engines": {
                name: {
                    "num_steps": engine.num_steps,
                    "shapes": {n: list(s) for n, s in engine.trained_shapes().items()},
                    "files": [file for file in names if file.startswith(f"{name}-")],
                }
                for name, engine in self.engines.items()
            },
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            **self._sources_now(),
            "config": config_to_dict(self.cfg),
            "versions": versions(),
            "rng": rng,
        }

    def _together(self, write: Callable[[], Any], *, main_only: bool = False) -> list[Any]:
        """Every rank's (or rank 0's) result; UserError on all ranks where one cannot write."""
        result: Any = None
        problem: str | None = None
        if distributed.is_main() or not main_only:
            try:
                result = write()
            except OSError as error:
                problem = f"rank {distributed.rank()}: {error}"
        found = distributed.gather_objects((result, problem))
        problems = [p for _, p in found if p is not None]
        if problems:
            if distributed.is_main():
                files.drop_temporary(self.output)
            raise UserError(
                f"the checkpoint could not be written ({problems[0]}); the last good one is "
                f"{_last_of(self.output)}: make room and go on with --resume auto"
            )
        return [r for r, _ in found]

    def _sources_now(self) -> dict[str, Any]:
        """Sums of rows and models; made once, and only where a checkpoint is written or read."""
        if self._sources is None:
            models = sums_of_models(config_to_dict(self.cfg))
            self._sources = {"data": sum_of_rows(self._rows), "models": models}
        return self._sources

    def _warn_of_versions(self, saved: dict[str, Any]) -> None:
        now = versions()
        changed = [f"{k} {saved.get(k)} -> {now[k]}" for k in now if saved.get(k) != now[k]]
        if changed and distributed.is_main():
            logger.warning("the checkpoint is of other versions: %s", ", ".join(changed))


def _share(engine: Engine) -> list[Piece]:
    """The pieces that this rank writes: where every rank holds all of them, every world-th."""
    pieces = engine.pieces()
    return pieces[distributed.rank() :: distributed.world_size()] if engine.replicated else pieces


def _restore(engine: Engine, saved: TensorFiles, state: dict[str, Any], where: Path) -> None:
    """Fill masters and moments of an engine, whatever engine wrote them. All ranks call it."""
    optimizer = engine.optimizer
    assert optimizer is not None
    shapes = {name: list(shape) for name, shape in engine.trained_shapes().items()}
    for name in sorted(shapes.keys() | state["shapes"].keys()):
        mine, theirs = shapes.get(name), state["shapes"].get(name)
        if mine != theirs:
            raise UserError(f"resume: {where}: {name} is {theirs} there and {mine} in this model")
    optimizer.state.clear()
    with torch.no_grad():
        for piece in engine.pieces():
            saved.read(piece.name, "weight", piece.start, piece.weight)
            kinds = [kind for kind in saved.kinds(piece.name) if kind != "weight"]
            if kinds and piece.key not in optimizer.state:
                start_state(optimizer, piece.key, kinds)
            for kind in kinds:
                value = optimizer.state[piece.key][kind]
                if kind == "step":
                    value.fill_(saved.scalar(piece.name, kind))
                else:
                    saved.read(piece.name, kind, piece.start, piece.part_of(value))
    engine.num_steps = int(state["num_steps"])
    engine.adopt_masters()


def _check_visible(folder: Path, sums: Mapping[str, files.FileSum]) -> None:
    """Rank 0 sees what the others wrote: the nodes share the folder."""
    for name, total in sums.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != total.size:
            raise OSError(f"rank 0 does not see {path}: the nodes must share the output folder")


def _last_of(run: Path) -> str:
    found = files.list_checkpoints(run)
    return str(found[0]) if found else "none"
