"""Every stage for two steps, on one engine: sft, rm, scalar-rm, and PPO on either reward.

A stage passes if its numbers are finite and transformers loads what it saved.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.trainer.rows import Figures, Rows, parser
from s2srm import process
from s2srm.commands.libraries import quiet_libraries
from s2srm.config import (
    CriticConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RMConfig,
    SamplingConfig,
    ScalarRMConfig,
    SFTConfig,
    TemplateConfig,
)
from s2srm.runs import RunResult

_OPTIM = OptimConfig(lr=1e-5, schedule="constant")


@dataclass(frozen=True)
class Setting:
    """What all stages of a run share."""

    model: Path
    data: Path
    work: Path
    dtype: str
    engine: str = "auto"
    tiny: bool = False
    """A rehearsal: fewer and shorter responses."""

    def model_config(self, path: Path) -> ModelConfig:
        return ModelConfig(path=str(path), precision=self.dtype)  # type: ignore[arg-type]

    def common(self, stage: str) -> dict[str, Any]:
        """Fields of every stage's config."""
        return {
            "output": str(self.work / stage),
            "overwrite": True,
            "engine": EngineConfig(kind=self.engine),  # type: ignore[arg-type]
            "template": template_of(self.model),
            "data": DataConfig(
                path=str(self.data),
                max_prompt_tokens=256,
                max_response_tokens=96,
                on_bad_row="skip",
                on_long_row="skip",
            ),
        }


def template_of(model: Path) -> TemplateConfig:
    """The model's chat template if it has one, else plain text."""
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    if "chat_template" in settings or (model / "chat_template.jinja").exists():
        return TemplateConfig()
    return TemplateConfig("plain", "\n")


def take_rows(data: Path, out: Path, count: int) -> Path:
    """The first rows of train.jsonl as a file of their own."""
    with (data / "train.jsonl").open(encoding="utf-8") as file:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(itertools.islice(file, count)), encoding="utf-8")
    return out


def supervised(setting: Setting, **more: Any) -> dict[str, Any]:
    """Fields of the supervised stages."""
    fields = {"model": setting.model_config(setting.model), "optim": _OPTIM, "max_steps": 2}
    size = 2 if setting.tiny else 8
    return {**fields, "batch_size": size, "microbatch_tokens": 2048, **more}


def ppo_config(setting: Setting, policy: Path, kind: str, reward: Path, **more: Any) -> PPOConfig:
    """PPO of two small phases, unless more says otherwise."""
    count = 4 if setting.tiny else 8
    fields: dict[str, Any] = {
        **setting.common(f"ppo-{kind}"),
        "policy": setting.model_config(policy),
        "reward": RewardConfig(
            kind=kind,  # type: ignore[arg-type]
            model=setting.model_config(reward),
            calibration_prompts=count,
        ),
        "critic": CriticConfig(optim=OptimConfig(lr=1e-4, schedule="constant")),
        "sampling": SamplingConfig(max_new_tokens=6 if setting.tiny else 64, batch_size=16),
        "optim": _OPTIM,
        "total_steps": 2,
        "rollout_size": count,
        "minibatch_size": count // 2,
        "ppo_epochs": 1 if setting.tiny else 2,
        "microbatch_tokens": 2048,
    }
    return PPOConfig(**{**fields, **more})


def checked(result: RunResult) -> Figures:
    """A run's last numbers, if all are finite and its model loads."""
    bad = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"not finite: {', '.join(bad[:3])}")
    AutoModelForCausalLM.from_pretrained(result.output)
    wanted = ("loss", "eval/loss", "reward/sum_mean", "ppo/first_ratio_error", "time/rollout_s")
    figures = {k: v for k, v in result.metrics.items() if k in wanted or k.startswith("time/")}
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return figures


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--engine", choices=["torch", "deepspeed"], required=True)
    made.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--tiny", action="store_true")
    given = made.parse_args()
    quiet_libraries()
    from s2srm.ppo import train
    from s2srm.supervised import rm, scalar_rm, sft

    shutil.rmtree(given.work, ignore_errors=True)
    data = take_rows(given.data, given.work / "triples.jsonl", 300)
    setting = Setting(
        *(given.model, data, given.work, given.dtype, given.engine),
        tiny=given.tiny,
    )
    rows = Rows(given.rows, given.name, torch.device(given.device))
    work = given.work

    def of(stage: str) -> dict[str, Any]:
        return {**setting.common(stage), **supervised(setting)}

    rows.case("sft", lambda: checked(sft.run(SFTConfig(**of("sft")))))
    rows.case("rm", lambda: checked(rm.run(RMConfig(**of("rm"), probe_rows=4))))
    rows.case("scalar-rm", lambda: checked(scalar_rm.run(ScalarRMConfig(**of("scalar-rm")))))
    for kind, reward in (("seq2seq", "rm"), ("scalar", "scalar-rm")):
        cfg = ppo_config(setting, work / "sft", kind, work / reward)
        rows.case(f"ppo {kind}", lambda cfg=cfg: checked(train.run(cfg)))
    return int(rows.failed)


if __name__ == "__main__":
    process.run_and_exit(main)
