"""Reads run folders: curves, evaluations, responses with token rewards, and what each run cost.

A folder is a training run (metrics.jsonl), an evaluation (eval.json), or holds such folders up to
two levels down, as the demo's does. Lines count up to the last whole one, so a run in progress and
one that a crash cut short can be read; anything else that is not as it was written is an error that
names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from s2srm.errors import UserError
from s2srm.jsonl import read_jsonl
from s2srm.report.shapes import (
    EVALUATION,
    METRICS_ROW,
    PPO_CONFIG,
    SUPERVISED_CONFIG,
    check,
    check_feedback,
)
from s2srm.validation import expand_path

_LEVELS = 2


@dataclass(frozen=True)
class Run:
    """One training run. kind: sft, rm, scalar-rm or ppo."""

    name: str
    folder: Path
    kind: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def metric_names(self) -> list[str]:
        """Names in order of first appearance."""
        return list(
            dict.fromkeys(name for row in self.rows for name in row if name not in ("step", "time"))
        )

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the rows in which the metric is a number."""
        points = [(row["step"], row[metric]) for row in self.rows if row.get(metric) is not None]
        return [float(step) for step, _ in points], [float(value) for _, value in points]


@dataclass(frozen=True)
class Collected:
    """Everything the page is made of."""

    runs: list[Run] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    feedback: list[dict[str, Any]] = field(default_factory=list)
    """Rows as in samples.jsonl; those of an evaluation also name the policy."""


def collect(folders: Sequence[str | Path]) -> Collected:
    """Read the folders. Raises UserError for one that does not exist or holds no run."""
    found = Collected()
    for folder in (Path(expand_path("RUN", str(folder))) for folder in folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        runs = list(_run_folders(folder, _LEVELS))
        if not runs:
            raise UserError(f"{folder} holds no run: no metrics.jsonl or eval.json in it")
        for path in runs:
            name = path.name if path == folder else str(path.relative_to(folder))
            _read(path, name, found)
    return found


def _run_folders(folder: Path, levels: int) -> Iterator[Path]:
    if (folder / "metrics.jsonl").is_file() or (folder / "eval.json").is_file():
        yield folder
    elif levels > 0:
        # In the order in which they were started, which is that of the pipeline.
        children = [child for child in folder.iterdir() if child.is_dir()]
        for child in sorted(children, key=lambda child: (_started(child), child.name)):
            yield from _run_folders(child, levels - 1)


def _started(folder: Path) -> float:
    config = folder / "config.yaml"
    return config.stat().st_mtime if config.is_file() else float("inf")


def _read(folder: Path, name: str, found: Collected) -> None:
    if (folder / "eval.json").is_file():
        evaluation = _json(folder / "eval.json")
        check(evaluation, EVALUATION, str(folder / "eval.json"))
        found.evaluations.append(evaluation | {"name": name})
        found.feedback.extend(_feedback(folder / "feedback.jsonl"))
        return
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} has metrics.jsonl but no config.yaml")
    config = _config(path)
    kind = _kind(config, path)
    check(config, PPO_CONFIG if kind == "ppo" else SUPERVISED_CONFIG, str(path))
    rows = read_jsonl(folder / "metrics.jsonl")
    for number, row in enumerate(rows, start=1):
        check(row, METRICS_ROW, f"{folder / 'metrics.jsonl'}:{number}")
    samples = _feedback(folder / "samples.jsonl")
    found.runs.append(Run(name, folder, kind, config, rows, samples))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); was the evaluation stopped while it wrote?"
        ) from error


def _feedback(path: Path) -> list[dict[str, Any]]:
    """Rows of responses with token rewards; none where the file is not there."""
    rows = read_jsonl(path) if path.is_file() else []
    for number, row in enumerate(rows, start=1):
        check_feedback(row, path, number)
    return rows


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected settings as `key: value`, got {config!r:.60}")
    return config


def _kind(config: dict[str, Any], path: Path) -> str:
    """Which stage wrote a config, by a key that only it has."""
    for key, kind in (
        ("policy", "ppo"),
        ("correction_weight", "rm"),
        ("centre_coef", "scalar-rm"),
        ("response_column", "sft"),
    ):
        if key in config:
            return kind
    raise UserError(f"{path}: it is the config of no known stage")


@dataclass(frozen=True)
class Cost:
    """What one PPO run needed, for the comparison of the two kinds of reward."""

    name: str
    reward: str
    triples: str
    rm_steps: int | None
    models_in_memory: int
    stages: str
    rm_seconds: float | None
    ppo_seconds: float | None


def costs(runs: Sequence[Run]) -> list[Cost]:
    """One line for each PPO run; what its RM was trained on is known if that run is among `runs`.

    Models in memory are those that PPO holds at once: policy, reference, critic, RM.
    """
    by_folder = {run.folder.resolve(): run for run in runs}
    lines: list[Cost] = []
    for run in runs:
        if run.kind != "ppo":
            continue
        rm = by_folder.get(Path(run.config["reward"]["model"]["path"]).resolve())
        lines.append(
            Cost(
                name=run.name,
                reward=run.config["reward"]["kind"],
                triples=rm.config["data"]["path"] if rm else "unknown",
                rm_steps=rm.rows[-1]["step"] if rm and rm.rows else None,
                models_in_memory=4,
                stages="SFT, RM, PPO",
                rm_seconds=_seconds(rm) if rm else None,
                ppo_seconds=_seconds(run),
            )
        )
    return lines


def _seconds(run: Run) -> float | None:
    """Wall-clock time between the first row and the last."""
    times = [row["time"] for row in run.rows if "time" in row]
    return times[-1] - times[0] if len(times) > 1 else None
