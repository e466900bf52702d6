"""One small case of each kernel on the GPU, for compute-sanitizer to watch.

Nothing is compared here: that is tests/gpu. The vocabulary is no multiple of a tile, some rows are
ignored, and both orders of the backward run.
"""

from __future__ import annotations

import torch

import s2srm_kernels
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import normal_problem, sequence_problem
from benchmarks.products import BOTH, modes_of
from benchmarks.providers.ours import Ours
from benchmarks.providers.sequences import SEQUENCE_OPS, OurSequences
from benchmarks.shapes import SequenceShape, Shape

ALIVE = "torch made a tensor"
"""Printed once the GPU answers: what goes wrong before that is not of our kernels."""


def main() -> int:
    device = torch.device("cuda")
    torch.ones(1, device=device).item()
    print(ALIVE, flush=True)
    shape = Shape("small", 200, 64, 1000)
    for dtype in (torch.bfloat16, torch.float32):
        problem = normal_problem(shape, dtype, device, ignored=0.4)
        for op in VOCABULARY_OPS:
            backward = BOTH in modes_of(op)
            for provider in (Ours("triton"), Ours("triton", workspace_bytes=0)):
                if provider.refuses(op, problem, backward) is None:
                    outputs_and_gradients(provider.build(op, problem), problem, backward)
                    print(f"{op} {provider.name} {dtype}", flush=True)
        seeds = torch.arange(shape.num_rows, device=device)
        hidden, weight = problem.hidden.detach(), problem.weight.detach()
        s2srm_kernels.linear_sample(hidden, weight, seeds, seeds, impl="triton")
        ids = seeds[:, None].expand(-1, 3).contiguous()
        s2srm_kernels.linear_logprobs(hidden, weight, problem.target, extra_ids=ids, impl="triton")
        print(f"linear_sample and extra_ids {dtype}", flush=True)
    sequences = sequence_problem(SequenceShape("small", 3000, 7), device)
    for op in SEQUENCE_OPS:
        provider = OurSequences("cpp")
        if provider.refuses(op, sequences) is None:
            provider.build(op, sequences)()
            print(f"{op} {provider.name}", flush=True)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
