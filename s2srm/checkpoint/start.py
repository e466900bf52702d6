"""Where a run starts: from nothing, from a checkpoint, or not at all because it has finished.

Decided before any weight is loaded, on all ranks alike. A damaged checkpoint is set aside with a
warning that names the file, and the one before it is taken; where all are damaged the run stops,
for a fresh start in its place would throw away what somebody may still mend.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from s2srm import distributed
from s2srm.checkpoint import files
from s2srm.checkpoint.agreement import check_agreement
from s2srm.checkpoint.lock import check_unlocked
from s2srm.checkpoint.sources import sums_of_models
from s2srm.config import StageConfig
from s2srm.errors import UserError
from s2srm.metrics import HISTORY
from s2srm.runs import (
    CONFIG,
    FINISHED,
    MARKER,
    RunResult,
    clear_run,
    config_to_dict,
    prepare_output,
)

logger = logging.getLogger(__name__)

_BEFORE_THE_FIRST_CHECKPOINT = {
    MARKER,
    CONFIG,
    *HISTORY,
    "best",
    "checkpoints",
    "diverged",
    "stacks",
    "wandb",
}
"""What a run leaves that was killed before it saved anything."""


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    output      the run's folder, ready to be written into
    checkpoint  to go on from, every byte verified; None: from the beginning
    state       the checkpoint's state.json
    finished    the run's result where there is nothing left to do
    """

    output: Path
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    finished: RunResult | None = None


def start_run(cfg: StageConfig) -> Start:
    """Find the start and make the output folder. All ranks call it; UserError on all of them."""
    if cfg.resume == "never":
        return Start(prepare_output(cfg))
    if cfg.save_every == 0 and distributed.is_main():
        logger.warning("save_every is 0: this run writes no checkpoint of its own")
    output = Path(cfg.output)
    on_main(lambda: check_unlocked(output))
    run, candidates = on_main(lambda: _candidates(cfg))
    in_place = run.resolve() == output.resolve()
    result = on_main(lambda: _finished(output, cfg)) if in_place else None
    if result is not None:
        logger.info("%s has finished: nothing to do", output)
        return Start(output, finished=result)
    chosen, damaged = _first_good(candidates)
    if chosen is None:
        on_main(lambda: _refuse_damaged(run, damaged))
        on_main(lambda: _clear_unfinished(output, cfg))
        return Start(prepare_output(cfg))
    state = json.loads((chosen / files.STATE).read_text(encoding="utf-8"))
    _check(state, cfg, chosen)
    if in_place:
        on_main(lambda: _go_back_to(chosen, run, damaged))
        prepare_output(cfg, going_on=True)
    else:
        prepare_output(cfg)
        on_main(lambda: _copy_history(run, output, state))
    return Start(output, chosen, state)


def on_main(fn: Callable[[], Any]) -> Any:
    """Rank 0's result, or the one line of its UserError, on every rank. All ranks call it."""
    found: tuple[Any, str | None] = (None, None)
    if distributed.is_main():
        try:
            found = fn(), None
        except UserError as error:
            found = None, str(error)
        except OSError as error:
            found = None, f"resume: {error}"
    value, problem = distributed.gather_objects(found)[0]
    if problem is not None:
        raise UserError(problem)
    return value


def _candidates(cfg: StageConfig) -> tuple[Path, list[Path]]:
    """(run to go on with, its checkpoints to try, best first); a named one is the only one."""
    if cfg.resume == "auto":
        return Path(cfg.output), files.list_checkpoints(Path(cfg.output))
    folder = Path(cfg.resume).expanduser()
    if files.step_of(folder) is not None and not files.checkpoints_of(folder).is_dir():
        return folder.resolve().parent.parent, [folder]
    found = files.list_checkpoints(folder)
    if not found:
        raise UserError(
            f"resume: {folder} holds no checkpoint; give a run with a folder checkpoints/, one of "
            "its step-* folders, auto or never"
        )
    return folder, found


def _finished(run: Path, cfg: StageConfig) -> RunResult | None:
    """The result of a run that has finished with these very settings; else None."""
    path = run / FINISHED
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    saved, now = found["config"], config_to_dict(cfg)
    _check_stage(found["stage"], cfg, run)
    check_agreement(saved, now, config_to_dict(type(cfg)()), run)
    if any(saved.get(key) != now.get(key) for key in ("max_steps", "epochs", "total_steps")):
        if not files.list_checkpoints(run):
            raise UserError(f"resume: {run} has finished and kept no checkpoint to go on from")
        return None
    return RunResult(run, found["metrics"])


def _first_good(candidates: list[Path]) -> tuple[Path | None, list[Path]]:
    """(the first checkpoint without damage, the damaged ones before it). All ranks read."""
    damaged: list[Path] = []
    for candidate in candidates:
        mine = files.find_damage(candidate, distributed.rank(), distributed.world_size())
        problem = next((p for p in distributed.gather_objects(mine) if p is not None), None)
        if problem is None:
            return candidate, damaged
        damaged.append(candidate)
        if distributed.is_main():
            logger.warning("checkpoint %s is not used: %s", candidate.name, problem)
    return None, damaged


def _refuse_damaged(run: Path, damaged: list[Path]) -> None:
    bad = damaged or files.list_damaged(run)
    if bad:
        raise UserError(
            f"resume: {bad[0]} is damaged and no other checkpoint is left to take; give one of "
            "another run, or --resume never --overwrite true to start from the beginning"
        )


def _check(state: dict[str, Any], cfg: StageConfig, checkpoint: Path) -> None:
    """The checkpoint is of this stage and these settings; says what changes the last bits."""
    if state["format"] != files.FORMAT:
        raise UserError(f"resume: {checkpoint} has format {state['format']}, not {files.FORMAT}")
    _check_stage(state["stage"], cfg, checkpoint)
    default = config_to_dict(type(cfg)())
    changes = check_agreement(state["config"], config_to_dict(cfg), default, checkpoint)
    sums = sums_of_models(config_to_dict(cfg))
    for key, found in state["models"].items():
        if sums.get(key) != found:
            raise UserError(
                f"resume: {key}: the weights there are not those that the run of {checkpoint} "
                "started from"
            )
    if state["world_size"] != distributed.world_size():
        changes.append(f"ranks {state['world_size']} -> {distributed.world_size()}")
    if distributed.is_main():
        exact = f"equal to the last bit but for: {', '.join(changes)}" if changes else "to the bit"
        logger.info("going on from %s, %s", checkpoint, exact)


def _check_stage(saved: str, cfg: StageConfig, where: Path) -> None:
    if saved != type(cfg).__name__:
        raise UserError(f"resume: {where} is of a {saved}, this run has a {type(cfg).__name__}")


def _go_back_to(chosen: Path, run: Path, damaged: list[Path]) -> None:
    """Damaged checkpoints are set aside; a run that goes back to an older one loses the newer."""
    for checkpoint in damaged:
        logger.warning("set aside as %s", files.set_aside(checkpoint))
    for newer in files.list_checkpoints(run):
        if (files.step_of(newer) or 0) > (files.step_of(chosen) or 0):
            logger.warning("%s is newer than the one asked for: removed", newer)
            files.remove(newer)
    (run / FINISHED).unlink(missing_ok=True)


def _clear_unfinished(output: Path, cfg: StageConfig) -> None:
    """Remove what a run with these settings left that saved nothing, so that it can start again."""
    names = {p.name for p in output.iterdir()} if output.is_dir() else set[str]()
    mine = {n for n in names if n in _BEFORE_THE_FIRST_CHECKPOINT or _is_leftover(n)}
    if names != mine or MARKER not in names or CONFIG not in names:
        return  # Nothing there, or nothing of ours: prepare_output decides.
    saved = yaml.safe_load((output / CONFIG).read_text(encoding="utf-8"))
    if isinstance(saved, dict):
        check_agreement(saved, config_to_dict(cfg), config_to_dict(type(cfg)()), output)
    if names & set(HISTORY):
        logger.info("%s holds a run without a checkpoint: it starts again", output)
    clear_run(output)


def _is_leftover(name: str) -> bool:
    return name.startswith(("events.out.tfevents", ".saving")) or name.endswith(".tmp")


def _copy_history(run: Path, output: Path, state: dict[str, Any]) -> None:
    """Metrics and samples up to the checkpoint, where the run goes on in another folder."""
    for name, size in state["parts"]["log"]["sizes"].items():
        if size > 0 and (run / name).is_file():
            files.copy_prefix(run / name, output / name, size)
