"""Kernels that break a limit, and some that keep them; run, it prints what was found of each.

Compiled in a process of its own: under TRITON_INTERPRET they would be no kernels.
"""

import json

import triton
import triton.language as tl

from benchmarks.resources.compiled import broken_limits, measure, needs_matrix
from benchmarks.resources.variants import Variant


@triton.jit
def product(left, right, result, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, 64 * BLOCK_K, BLOCK_K):
        a = tl.load(left + rows * 4096 + k + tl.arange(0, BLOCK_K)[None, :])
        b = tl.load(right + columns * 4096 + k + tl.arange(0, BLOCK_K)[:, None])
        sums = tl.dot(a, b, sums, input_precision="ieee")
    tl.store(result + rows * BLOCK + columns, sums)


def _sample(name, dtype, arch=90, block=128, depth=64, num_warps=8, num_stages=3):
    pointers = ("left", "right", "result")
    return Variant(
        name=name,
        kernel=product,
        signature={"left": f"*{dtype}", "right": f"*{dtype}", "result": "*fp32"}
        | {"BLOCK": "constexpr", "BLOCK_K": "constexpr"},
        constexprs={"BLOCK": block, "BLOCK_K": depth},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False},
        dtype=dtype,
        arch=arch,
    )


SAMPLES = (
    _sample("good-80", "fp16", arch=80),
    _sample("good-90", "bf16"),
    _sample("good-100", "fp16", arch=100),
    # 64 x 64 sums in 32 threads: 128 of the 255 registers, and what plain products need.
    _sample("spilling", "fp32", block=64, num_warps=1),
    # 32 rows are too few for a warp group.
    _sample("unmatched", "bf16", block=32, num_warps=4),
    # 9 stages of two blocks of 16 KiB.
    _sample("oversized", "bf16", num_stages=9),
)


def _report(sample):
    resources = measure(sample)
    return {**vars(resources), "wrong": broken_limits(resources, needs_matrix(sample))}


if __name__ == "__main__":
    print(json.dumps({sample.name: _report(sample) for sample in SAMPLES}))
