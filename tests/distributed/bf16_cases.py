"""bfloat16 models under ZeRO 0 to 3: each learner takes one step, in this process or on this rank.

Run under torchrun: `bf16_cases.py OUTPUT` writes OUTPUT/found.json, the losses and norms of every
case, and OUTPUT/NAME.safetensors, the weights that the step left. The one process takes the same
step in float32 from the same weights. What ZeRO-3 would keep whole, as small as these models are,
is partitioned too, so that every forward and backward gathers every parameter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import tiny_model
from torch import Tensor, nn

from s2srm import distributed
from s2srm.config import EngineConfig, OptimConfig
from s2srm.engine import Engine, build_engine, deepspeed_engine, run_microbatches
from s2srm.models.attention import SDPA
from s2srm.models.causal import PackedCausalLM
from s2srm.models.value import PackedValueModel
from s2srm.packing import Packed, Segment, pack
from s2srm.process import run_and_exit

SEGMENTS = [Segment([5 + i, 9, 30 - i, 7, *range(3, 9 + i)], 3) for i in range(4)]
WEIGHTS = {
    # In bfloat16 each small one would round to nothing beside the first: 3% of the sum in all.
    "seq2seq-rm": [512.0] + [1.0] * 16,
    **{learner: [1.0, 2.0] for learner in ("policy", "critic", "scalar-rm")},
}
"""Of a step's micro-batches, which are all the same but for that."""
LR = 1e3


def _policy(engine: Engine, batch: Packed) -> Tensor:
    old = torch.full((batch.targets.numel(),), -4.0)
    loss, _ = engine.train_forward(
        batch, "ppo_loss", old_logprobs=old, advantages=torch.ones_like(old), normalizer=1.0
    )
    return loss


def _seq2seq_rm(engine: Engine, batch: Packed) -> Tensor:
    return engine.train_forward(batch, reduction="sum")


def _critic(engine: Engine, batch: Packed) -> Tensor:
    return (engine.train_forward(batch)[batch.rows] - 1.0).square().sum()


def _scalar_rm(engine: Engine, batch: Packed) -> Tensor:
    scores = engine.train_forward(batch)[batch.cu_seqlens[1:] - 1]
    return -nn.functional.logsigmoid(scores[0] - scores[1])


LEARNERS: dict[str, Callable[[Engine, Packed], Tensor]] = {
    "policy": _policy,
    "seq2seq-rm": _seq2seq_rm,
    "critic": _critic,
    "scalar-rm": _scalar_rm,
}
CASES = [
    ("0", "critic", "llama-tied"),
    ("1", "policy", "llama-tied"),
    ("1", "seq2seq-rm", "llama"),
    ("1", "critic", "llama"),
    ("1", "scalar-rm", "llama-tied"),
    ("2", "seq2seq-rm", "llama-tied"),
    ("2", "scalar-rm", "llama"),
    ("3", "policy", "llama"),
    ("3", "seq2seq-rm", "llama-tied"),
    ("3", "critic", "llama-tied"),
    ("3", "scalar-rm", "llama"),
]
"""ZeRO stage, learner and model; every stage meets tied and untied heads."""


def run_case(stage: str, learner: str, model: str, dtype: torch.dtype, out: Path) -> dict[str, Any]:
    """Loss and gradient norm of a step over the micro-batches of the learner's WEIGHTS."""

    def factory(zero: dict[str, Any] | None) -> nn.Module:
        # Rounded first, so that float32 starts from the same weights.
        lm = tiny_model(model, dtype=torch.bfloat16).to(dtype)
        lm.set_attn_implementation(SDPA)
        if learner in ("policy", "seq2seq-rm"):
            return PackedCausalLM(lm)
        return PackedValueModel(lm, "normal").bfloat16().to(dtype)

    optim = OptimConfig(name="sgd", lr=LR, schedule="constant", max_grad_norm=0.0)
    engine = build_engine(factory, EngineConfig(zero_stage=int(stage)), optim, 1)
    world, rank = distributed.world_size(), distributed.rank()
    mine = SEGMENTS if world == 1 else SEGMENTS[2 * rank : 2 * rank + 2]
    # A pair of sequences to a rank; one process takes both ranks' pairs for each weight.
    pairs = [pack(mine[i : i + 2]) for i in range(0, len(mine), 2)]
    weights = WEIGHTS[learner]
    microbatches = [(weight, pair) for weight in weights for pair in pairs]

    def loss(item: tuple[float, Packed]) -> Tensor:
        weight, batch = item
        return weight / sum(weights) * LEARNERS[learner](engine, batch)

    total = distributed.sum_over_ranks(run_microbatches(engine, microbatches, loss))
    norm = engine.step().grad_norm
    with engine.gathered():
        whole = {
            name: parameter.detach().float().clone()
            for name, parameter in engine.module.named_parameters()
        }
    if distributed.is_main():
        save_file(whole, out / f"{stage}-{learner}-{model}.safetensors")
    return {"loss": float(total), "grad_norm": norm}


def run_all(out: Path, dtype: torch.dtype) -> None:
    """Every case."""
    out.mkdir(parents=True, exist_ok=True)
    found = {"-".join(case): run_case(*case, dtype, out) for case in CASES}
    if distributed.is_main():
        (out / "found.json").write_text(json.dumps(found))


def gather_everything() -> None:
    """Let DeepSpeed partition parameters however small."""
    config = deepspeed_engine.deepspeed_config

    def changed(*args: Any) -> dict[str, Any]:
        result = config(*args)
        result["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return result

    deepspeed_engine.deepspeed_config = changed


def main() -> None:
    """One rank: every case in bfloat16."""
    distributed.start()
    gather_everything()
    run_all(Path(sys.argv[1]), torch.bfloat16)


if __name__ == "__main__":
    run_and_exit(main)
