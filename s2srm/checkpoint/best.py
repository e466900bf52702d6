"""The best model of a run so far, under best/, by a metric of its evaluations.

    RUN/best/           as the stage saves a model; loads with AutoModelForCausalLM.from_pretrained
    RUN/best/best.json  {"metric", "value", "step"}; written last

best.json is all that is known of the past, so a resumed run compares with what is really there.
Left out: the optimiser (a run goes on from its checkpoints), PPO's critic, and the best of an
earlier folder where a run goes on in another one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from s2srm import distributed
from s2srm.checkpoint.files import write_json
from s2srm.checkpoint.start import on_main
from s2srm.errors import UserError
from s2srm.outputs import writing
from s2srm.watchdog import pulse

logger = logging.getLogger(__name__)

FOLDER, RECORD = "best", "best.json"


class BestModel:
    """Keeps the model of the best evaluation. All ranks make it and call it."""

    def __init__(
        self,
        metric: str | None,
        output: Path,
        save: Callable[[Path], None],
    ) -> None:
        """metric: as `keep_best`; None keeps nothing. save: writes the model; all ranks call it."""
        self.metric, self.output, self._write = metric, output, save
        self.value: float | None = None
        if metric is not None:
            self.value = on_main(lambda: _recovered(output, metric))

    def after_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Save the model where these metrics hold the best value so far; rows without an evaluation
        are passed over. UserError where an evaluation has no such metric."""
        names = [name for name in metrics if name.startswith("eval/")]
        if self.metric is None or not names:
            return
        if self.metric not in names:
            raise UserError(
                f"keep_best: an evaluation has no {self.metric}; it has {', '.join(sorted(names))}"
            )
        value = metrics[self.metric]
        if self.value is None or is_better(self.metric, value, self.value):
            self.value = value
            self._save(step, value)

    def _save(self, step: int, value: float) -> None:
        pulse.phase(f"saving the best model, of step {step}")
        folder = self.output / f".{FOLDER}.tmp"
        with writing(folder):
            if distributed.is_main():
                shutil.rmtree(folder, ignore_errors=True)
            self._write(folder)
            if distributed.is_main():
                write_json(folder / RECORD, {"metric": self.metric, "value": value, "step": step})
                _replace(self.output)
                logger.info("step %d is the best so far: %s %.6g", step, self.metric, value)


def is_better(metric: str, value: float, than: float) -> bool:
    """Lower for a loss, higher for anything else; NaN is never better."""
    return value < than if metric.endswith("loss") else value > than


def _replace(output: Path) -> None:
    """A folder with files cannot be renamed over: for a moment there is none, see `_recovered`."""
    new, best = output / f".{FOLDER}.tmp", output / FOLDER
    old = output / f".{FOLDER}.old.tmp"
    shutil.rmtree(old, ignore_errors=True)
    if best.exists():
        best.rename(old)
    new.rename(best)
    shutil.rmtree(old, ignore_errors=True)


def _recovered(output: Path, metric: str) -> float | None:
    """The value of what is under best/, put there first where a process was killed in between."""
    best, new = output / FOLDER, output / f".{FOLDER}.tmp"
    if not best.exists() and (new / RECORD).is_file():
        _replace(output)
    if not (best / RECORD).is_file():
        return None
    found = json.loads((best / RECORD).read_text(encoding="utf-8"))
    return float(found["value"]) if found["metric"] == metric else None
