"""What one rank and two ranks must agree on: each case is a stage's run or a play of engines.

Run under torchrun: `cases.py INPUT OUTPUT` runs every case into OUTPUT/<name>. The test runs the
same cases in one process and compares the folders.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from s2srm import distributed
from s2srm.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RMConfig,
    ScalarRMConfig,
    SFTConfig,
    TemplateConfig,
)
from s2srm.engine import build_engine, map_microbatches, run_microbatches
from s2srm.models.load import load_causal_lm, load_value_model
from s2srm.packing import Packed, Segment, pack
from s2srm.process import run_and_exit
from s2srm.supervised import rm, scalar_rm, sft

VOCAB = 61
MODELS = ("llama", "llama-tied", "gemma3", "gemma3-tied", "bloom")


def make_inputs(folder: Path) -> None:
    """Models, a tokenizer and preference rows."""
    from tiny_models import save_tiny

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w60"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    for name in MODELS:
        fast.save_pretrained(save_tiny(name, folder / name))
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(3, VOCAB)}" for _ in range(length))

    def write(name: str, lengths: list[tuple[int, int, int]]) -> None:
        rows = [{"prompt": text(p), "chosen": text(c), "rejected": text(r)} for p, c, r in lengths]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("mixed.jsonl", [(3, 5, 4), (9, 2, 17), (1, 1, 1), (4, 12, 3), (6, 6, 6), (2, 20, 9)])
    write("skewed.jsonl", [(12, 60, 75), (1, 1, 2)])
    write("dev.jsonl", [(3, 5, 4), (2, 7, 9), (5, 1, 3)])


def _common(data: Path, model: str, rows: str, **changes: Any) -> dict[str, Any]:
    zero_stage = changes.pop("zero_stage", 3)
    offload = changes.pop("offload", "none")
    checkpointing = changes.pop("gradient_checkpointing", False)
    optim = {"name": "sgd", "lr": 0.3, "max_grad_norm": 0.0} | changes.pop("optim", {})
    return {
        "overwrite": True,
        "model": ModelConfig(path=str(data / model), gradient_checkpointing=checkpointing),
        "template": TemplateConfig(kind="plain", separator="w3 w4"),
        "data": DataConfig(path=str(data / rows)),
        "eval_data": DataConfig(path=str(data / "dev.jsonl")),
        "engine": EngineConfig(zero_stage=zero_stage, offload=offload),
        "optim": OptimConfig(**optim),
        "batch_size": 4,
        "max_steps": 3,
        "microbatch_tokens": 64,
        **changes,
    }


def _rm(model: str, rows: str, **changes: Any) -> Callable[[Path, Path], None]:
    return lambda data, out: _drop(
        rm.run(RMConfig(output=str(out), probe_rows=3, **_common(data, model, rows, **changes)))
    )


def _sft(model: str, rows: str, **changes: Any) -> Callable[[Path, Path], None]:
    return lambda data, out: _drop(
        sft.run(SFTConfig(output=str(out), **_common(data, model, rows, **changes)))
    )


def _scalar(model: str, rows: str, **changes: Any) -> Callable[[Path, Path], None]:
    return lambda data, out: _drop(
        scalar_rm.run(ScalarRMConfig(output=str(out), **_common(data, model, rows, **changes)))
    )


def _drop(result: object) -> None:
    assert result is not None


def _several_engines(data: Path, out: Path) -> None:
    """Policy and critic in training beside a frozen model, with gathers in between."""
    policy_cfg = ModelConfig(path=str(data / "gemma3-tied"))
    critic_cfg = ModelConfig(path=str(data / "llama"))
    cfg, optim = EngineConfig(), OptimConfig(name="sgd", lr=0.1, max_grad_norm=0.0)
    policy = build_engine(
        lambda zero: load_causal_lm(policy_cfg, zero_config=zero, train=True), cfg, optim, 4
    )
    critic = build_engine(
        lambda zero: load_value_model(critic_cfg, zero_config=zero, train=True, init="normal"),
        cfg,
        optim,
        4,
    )
    reference = build_engine(
        lambda zero: load_causal_lm(policy_cfg, zero_config=zero, train=False), cfg, None
    )
    everything = [Segment([5 + i, 9, 30 - i, *range(3, 3 + 4 * i)], 2) for i in range(5)]
    count = sum(s.num_predicted for s in everything)
    # Rank 0 has four micro-batches, rank 1 one: it runs three dummies.
    rank, world = distributed.rank(), distributed.world_size()
    mine = everything if world == 1 else (everything[:4], everything[4:])[rank]
    batches = [pack([segment]).to(policy.device) for segment in mine]
    found: dict[str, list[float]] = {"policy": [], "critic": [], "reference": [], "norms": []}

    def policy_loss(batch: Packed) -> torch.Tensor:
        result = policy.train_forward(batch, "logprobs", temperature=0.7)
        return -result.logprobs.sum() / count

    def ppo_loss(batch: Packed) -> torch.Tensor:
        old = torch.full((batch.targets.numel(),), -4.0, device=policy.device)
        loss, _ = policy.train_forward(
            batch,
            "ppo_loss",
            old_logprobs=old,
            advantages=torch.ones_like(old),
            normalizer=float(count),
        )
        return loss

    def critic_loss(batch: Packed) -> torch.Tensor:
        return (critic.train_forward(batch)[batch.rows] - 1.0).square().sum() / count

    def total(values: list[torch.Tensor]) -> float:
        local = torch.stack(values).sum().double()[None] if values else torch.zeros(1)
        return float(distributed.sum_over_ranks(local.double()))

    for step in range(4):
        found["reference"].append(
            total(
                map_microbatches(
                    reference, batches, lambda b: reference(b, "token_stats").logprobs.sum()
                )
            )
        )
        if step == 3:
            loss = run_microbatches(policy, batches, ppo_loss)
        else:
            loss = run_microbatches(policy, batches, policy_loss)
        found["policy"].append(total([loss]))
        with policy.gathered():
            whole = [p.detach().clone() for p in policy.module.parameters()]
        found["norms"].append(float(torch.stack([w.double().norm() for w in whole]).norm()))
        found["critic"].append(total([run_microbatches(critic, batches, critic_loss)]))
        found["norms"] += [policy.step().grad_norm, critic.step().grad_norm]
    if distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        (out / "found.json").write_text(json.dumps(found))


CASES: dict[str, Callable[[Path, Path], None]] = {
    # lr 1000 and one step: the change of the weights is the gradient, free of cancellation.
    "rm-gradient-untied": _rm("gemma3", "mixed.jsonl", max_steps=1, optim={"lr": 1000.0}),
    "rm-gradient-tied": _rm("gemma3-tied", "mixed.jsonl", max_steps=1, optim={"lr": 1000.0}),
    "rm-mixed-untied": _rm("llama", "mixed.jsonl"),
    "rm-skewed-tied": _rm("gemma3-tied", "skewed.jsonl", batch_size=2, gradient_checkpointing=True),
    # A batch of one diverges at 0.3, and divergence magnifies the last bit.
    "rm-one-rank-empty-tied": _rm(
        "gemma3-tied",
        "mixed.jsonl",
        batch_size=1,
        reduction="sequence_sum",
        identity_weight=0.25,
        optim={"lr": 0.03},
    ),
    "rm-one-rank-empty-untied": _rm("llama", "mixed.jsonl", batch_size=1, identity_weight=0.0),
    "rm-clipped": _rm("llama-tied", "skewed.jsonl", batch_size=2, optim={"max_grad_norm": 0.1}),
    "rm-offload": _rm("gemma3-tied", "mixed.jsonl", offload="cpu"),
    "rm-zero-0": _rm("llama-tied", "skewed.jsonl", batch_size=2, zero_stage=0),
    "rm-zero-1": _rm("llama-tied", "skewed.jsonl", batch_size=2, zero_stage=1),
    "rm-zero-2": _rm("llama-tied", "skewed.jsonl", batch_size=2, zero_stage=2),
    "rm-zero-2-clipped": _rm("llama", "mixed.jsonl", zero_stage=2, optim={"max_grad_norm": 0.1}),
    "sft-skewed-tied": _sft("gemma3-tied", "skewed.jsonl", batch_size=2),
    "scalar-mixed-untied": _scalar("llama", "mixed.jsonl", centre_coef=0.01),
    "scalar-one-rank-empty-tied": _scalar("gemma3-tied", "mixed.jsonl", batch_size=1),
    # One sequence at a time: ranks with fewer sequences run as many forwards as the others.
    "rm-bloom-skewed": _rm("bloom", "skewed.jsonl", batch_size=2),
    "rm-bloom-one-rank-empty": _rm("bloom", "mixed.jsonl", batch_size=1, optim={"lr": 0.03}),
    "scalar-bloom-zero-2": _scalar("bloom", "mixed.jsonl", zero_stage=2),
    "several-engines": _several_engines,
}


def run_all(data: Path, out: Path) -> None:
    """Every case, one after another, in this process (or on this rank)."""
    for name, case in CASES.items():
        case(data, out / name)


def main() -> None:
    """One rank: every case."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    distributed.start()
    run_all(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_and_exit(main)
