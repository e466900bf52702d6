"""Real preference data: SFT, a seq2seq reward model, PPO until the time is up; curves are kept.

PPO runs as `python -m s2srm ppo`, is sent SIGTERM at the deadline, saves and exits with 143, as
under a scheduler. metrics.jsonl of each stage and the report's page go to --curves.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.trainer.rows import Figures, Rows, parser
from benchmarks.trainer.stages import (
    Setting,
    checked,
    ppo_config,
    supervised,
    take_rows,
)
from s2srm import process
from s2srm.commands.libraries import quiet_libraries
from s2srm.config import OptimConfig, RMConfig, SFTConfig
from s2srm.runs import config_to_dict

_REPORT_S = 12.0
_SFT_STEPS, _RM_STEPS = 40, 80


def run_ppo(cfg: Any, work: Path, deadline: float) -> Figures:
    """Until it ends or SIGTERM; what the first and the last phase measured."""
    file = work / "ppo.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(cfg)), encoding="utf-8")
    command = [sys.executable, "-m", "s2srm", "ppo", "--config", str(file)]
    started = subprocess.Popen(command)
    try:
        code = started.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGTERM)
        try:
            code = started.wait(timeout=_REPORT_S)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
            raise
    if code not in (0, 143):
        raise RuntimeError(f"s2srm ppo ended with {code}")
    lines = (Path(cfg.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if not lines:
        raise RuntimeError("no phase ended before the time was up")
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    figures: Figures = {"phases": len(lines), "exit_code": code}
    for name in ("reward/sum_mean", "kl/per_response", "response/length_mean"):
        figures |= {f"first_{name}": first[name], f"last_{name}": last[name]}
    return figures | {k: last[k] for k in last if k.startswith("time/")}


def keep_curves(work: Path, curves: Path) -> Figures:
    """metrics.jsonl of each stage, and one page about all."""
    curves.mkdir(parents=True, exist_ok=True)
    kept = []
    for file in sorted(work.glob("*/metrics.jsonl")):
        shutil.copy(file, curves / f"{file.parent.name}-metrics.jsonl")
        kept.append(file.parent.name)
    page = curves / "report.html"
    command = [sys.executable, "-m", "s2srm", "report", str(work), "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"s2srm report: {(done.stderr or done.stdout).strip()[-300:]}")
    return {"stages": ", ".join(kept), "page_kib": page.stat().st_size / 1024}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--curves", type=Path, required=True)
    made.add_argument("--seconds", type=float, required=True, help="for everything")
    made.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--tiny", action="store_true")
    given = made.parse_args()
    deadline = time.monotonic() + given.seconds - _REPORT_S
    quiet_libraries()
    from s2srm.supervised import rm, sft

    work: Path = given.work
    shutil.rmtree(work, ignore_errors=True)
    data = take_rows(given.data, work / "triples.jsonl", 100 if given.tiny else 100_000)
    setting = Setting(given.model, data, work, given.dtype, tiny=given.tiny)
    rows = Rows(given.rows, given.name, torch.device(given.device))

    def fields(stage: str, steps: int, **more: Any) -> dict[str, Any]:
        if not given.tiny:
            optim = OptimConfig(lr=5e-4, schedule="constant")
            more |= {"max_steps": steps, "batch_size": 32, "optim": optim}
            more["microbatch_tokens"] = 16384
        return {**setting.common(stage), **supervised(setting), **more}

    rows.case("sft", lambda: checked(sft.run(SFTConfig(**fields("sft", _SFT_STEPS)))))
    model = setting.model_config(work / "sft")
    rm_fields = fields("rm", _RM_STEPS, model=model, probe_rows=4)
    rows.case("rm", lambda: checked(rm.run(RMConfig(**rm_fields))))
    large: dict[str, Any] = {
        "total_steps": 100_000,
        "save_every": 100_000,
        "rollout_size": 128,
        "minibatch_size": 64,
        "microbatch_tokens": 16384,
    }
    cfg = ppo_config(
        *(setting, work / "sft", "seq2seq", work / "rm"), **({} if given.tiny else large)
    )
    rows.case("ppo seq2seq", lambda: run_ppo(cfg, work, deadline))
    rows.case("curves", lambda: keep_curves(work, given.curves))
    return int(rows.failed)


if __name__ == "__main__":
    process.run_and_exit(main)
