"""A model's loss and gradients under every FlashAttention that is here, against SDPA, and times.

Four layers of a model's shape. Errors are relative in the Euclidean norm, against SDPA in float32;
SDPA in bfloat16 says what the precision alone loses. Times are of a forward and backward over
16,384 tokens in 32 sequences (on a CPU 256 tokens).
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.trainer.random_model import SHAPES
from benchmarks.trainer.rows import Figures, NotRun, Rows, parser
from s2srm import process
from s2srm.models import flash
from s2srm.models.attention import SDPA
from s2srm.models.trunk import trunk_forward
from s2srm.packing import Packed, Segment, pack

_TOLERANCE = 3.0
"""Times what SDPA loses in bfloat16."""


def model(shape: str, device: torch.device) -> PreTrainedModel:
    """At most four layers, float32."""
    config = copy.deepcopy(SHAPES[shape])
    config.num_hidden_layers = min(4, config.num_hidden_layers)
    torch.manual_seed(0)
    with device:
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.set_attn_implementation(SDPA)
    return lm


def batch(shape: str, tokens: int, sequences: int, device: torch.device) -> Packed:
    """Random tokens in sequences of unequal lengths."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(sequences, generator=generator) + 0.2
    lengths = (weights / weights.sum() * tokens).long().clamp_min(1).tolist()
    vocabulary = SHAPES[shape].vocab_size
    drawn = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return pack([Segment(ids, 1) for ids in drawn]).to(device)


def step(lm: PreTrainedModel, packed: Packed) -> tuple[Tensor, list[Tensor]]:
    """A loss of the hidden states, and gradients of the layers' weights in float32."""
    layers = [p for n, p in lm.named_parameters() if "layers." in n]
    hidden = trunk_forward(lm, packed).float()
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(hidden.shape[1], generator=generator).to(hidden)
    loss = (hidden * upstream).square().mean()
    return loss.detach(), [g.float() for g in torch.autograd.grad(loss, layers)]


def errors(found: tuple[Tensor, list[Tensor]], right: tuple[Tensor, list[Tensor]]) -> Figures:
    """Relative errors of the loss and of all gradients together."""
    squares = [(a - b).square().sum() for a, b in zip(found[1], right[1], strict=True)]
    norms = [b.square().sum() for b in right[1]]
    gradient = torch.stack(squares).sum() / torch.stack(norms).sum()
    loss = ((found[0] - right[0]) / right[0]).abs()
    return {"loss_error": float(loss), "gradient_error": float(gradient.sqrt())}


def median_ms(lm: PreTrainedModel, packed: Packed, rounds: int = 5) -> float:
    """Of a forward and backward, after one that compiles."""
    times = []
    for _ in range(rounds + 1):
        if packed.tokens.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(lm, packed)
        if packed.tokens.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[1:])[rounds // 2]


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--shape", choices=list(SHAPES), required=True)
    given = made.parse_args()
    device = torch.device(given.device)
    rows = Rows(given.rows, given.name, device)
    lm = model(given.shape, device)
    short = batch(given.shape, 1024 if device.type == "cuda" else 96, 7, device)
    long = batch(given.shape, 16384 if device.type == "cuda" else 256, 32, device)
    right = step(lm, short)
    lm.bfloat16()
    lost: Figures = {}

    def sdpa() -> Figures:
        lost.update(errors(step(lm, short), right))
        return {**lost, "step_ms": median_ms(lm, long)}

    def kernel(which: flash.Kernel) -> Figures:
        if device.type != "cuda":
            raise NotRun("FlashAttention needs a CUDA device")
        capability, needs = flash.capability_of(device), flash.needs_of(lm.config)
        reason = flash.why_not(which, capability, needs)
        if reason:
            raise NotRun(f"{which.package}: {reason}")
        lm.set_attn_implementation(which.name)
        found = errors(step(lm, short), right)
        worse = {k: v for k, v in found.items() if v > _TOLERANCE * lost[k] + 1e-3}
        if worse:
            raise ValueError(f"{worse}, where SDPA loses {lost}")
        unequal = flash.why_not_deterministic(which, capability, needs)
        return {**found, "step_ms": median_ms(lm, long), "deterministic": not unequal}

    rows.case("sdpa", sdpa)
    for which in flash.KERNELS:
        rows.case(which.name, lambda which=which: kernel(which))
    return int(rows.failed)


if __name__ == "__main__":
    process.run_and_exit(main)
