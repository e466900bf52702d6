"""Every Triton kernel that can be chosen, compiled for GPUs that need not be there."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="without triton there is no backend to compile")

from benchmarks.resources.compiled import SHARED_LIMIT, Resources, broken_limits
from benchmarks.resources.table import differences, read_table, write_table

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "kernel_resources.md"
ROW = Resources(
    variant="statistics",
    arch=90,
    tile="128x256",
    registers=200,
    stack=0,
    spills=0,
    shared=147480,
    matrix="HGMMA.64x256x16.F32.BF16 x4",
    instructions=2800,
    issue=2200,
    pipe=2048,
)


def run(*arguments):
    """Python in a process of its own: the interpreter's kernels cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "kernels")
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_representatives_keep_their_limits_and_are_as_recorded():
    done = run("-m", "benchmarks.resources.compile_checks", "--compare", str(TABLE))
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    recorded, _ = read_table(TABLE)
    assert f"\n{len(recorded)} variants with " in done.stdout


@pytest.fixture(scope="module")
def samples():
    """What was read of each kernel of compile_samples."""
    done = run("-m", "tests.kernels.compile_samples")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("good-80", []),
        ("good-90", []),
        ("good-100", []),
        ("spilling", ["bytes of stack"]),
        ("unmatched", ["matrix instructions HMMA"]),
        ("oversized", ["294912 bytes of shared memory, the chip has 232448"]),
    ],
)
def test_a_kernel_that_breaks_a_limit_is_found(samples, name, found):
    read = samples[name]
    assert len(read["wrong"]) == len(found), read["wrong"]
    for wrong, part in zip(read["wrong"], found, strict=True):
        assert wrong.startswith(f"{name}: ")
        assert part in wrong
    assert read["registers"] > 32
    assert read["instructions"] > 100
    if name.startswith("good"):
        assert read["matrix"].startswith({"80": "HMMA", "90": "HGMMA", "100": "UTC"}[name[5:]])
        # Two operands of 128 x 64 in a ring of stages, or one more or less of each.
        assert 2 * 2**15 <= read["shared"] <= 4 * 2**15
    assert (read["issue"] is not None) == (name in ("good-90", "oversized"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 1}, "1 loads and stores"),
        ({"shared": SHARED_LIMIT[90]}, None),
        ({"shared": SHARED_LIMIT[90] + 1}, "232449 bytes of shared memory"),
        ({"arch": 80, "matrix": "HMMA.16816.F32 x64"}, None),
        ({"arch": 80, "matrix": "HMMA.16816.F32 x64", "shared": 163 * 1024 + 1}, "has 166912"),
        ({"matrix": "-"}, "matrix instructions -, expected HGMMA"),
    ],
)
def test_limits(change, part):
    wrong = broken_limits(dataclasses.replace(ROW, **change), needs_matrix=True)
    assert len(wrong) == (part is not None)
    assert part is None or part in wrong[0]


def test_exact_products_need_no_matrix_instructions():
    assert broken_limits(dataclasses.replace(ROW, matrix="-"), needs_matrix=False) == []


def test_the_table_reads_as_it_was_written(tmp_path):
    rows = [
        ROW,
        dataclasses.replace(ROW, variant="gradients", arch=100, matrix="UTCHMMA x8", issue=None),
        dataclasses.replace(
            ROW, variant="merge", arch=80, matrix="HMMA.1 x4, HMMA.2 x2", pipe=None
        ),
    ]
    write_table(tmp_path / "table.md", rows, "3.9.0")
    assert read_table(tmp_path / "table.md") == (rows, "3.9.0")
    (tmp_path / "other.md").write_text("# no table\n")
    with pytest.raises(ValueError, match=r"other\.md does not say which version"):
        read_table(tmp_path / "other.md")


def test_differences_name_the_variant_and_both_values():
    other = dataclasses.replace(ROW, variant="merge")
    assert differences([ROW, other], [other, ROW]) == []
    changed = dataclasses.replace(ROW, registers=208, shared=150480, matrix="HMMA x4")
    assert differences([changed], [ROW]) == [
        "statistics: registers 200 -> 208, shared 147480 -> 150480, "
        "matrix HGMMA.64x256x16.F32.BF16 x4 -> HMMA x4"
    ]


@pytest.mark.parametrize("field", ["registers", "shared", "instructions", "issue", "pipe"])
def test_a_count_may_shrink_or_grow_by_two_percent(field):
    recorded = dataclasses.replace(ROW, **{field: 1000})
    for count, fails in ((1020, False), (1021, True), (500, False)):
        assert bool(differences([dataclasses.replace(ROW, **{field: count})], [recorded])) is fails


@pytest.fixture(scope="module")
def recorded_variants():
    """What recorded_variants prints, in a process of its own."""
    done = run("-m", "tests.kernels.recorded_variants")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_variants_have_names_of_their_own_and_every_kernel(recorded_variants):
    names = [variant["name"] for variant in recorded_variants["variants"]]
    assert len(set(names)) == len(names)
    kernels = {variant["kernel"] for variant in recorded_variants["variants"]}
    assert kernels == set(recorded_variants["kernels"])


def test_variants_are_what_launches_compile(recorded_variants):
    by_name = {variant["name"]: variant for variant in recorded_variants["variants"]}
    plain = by_name["statistics-tma-plain-bf16-sm_90"]
    assert {"depth", "columns", "partial"} <= set(plain["divisible"])
    # Neither N nor what follows from it and V: the next batch would compile again.
    assert not {"num_rows", "num_splits", "num_row_blocks"} & set(plain["divisible"])
    assert not {"num_rows", "num_splits", "num_row_blocks"} & set(plain["constants"])
    unaligned = by_name["logit_gradients-has_bias-capped-scaled-has_entropy-unaligned-bf16-sm_90"]
    assert not {"hidden_stride", "weight_stride_v", "depth"} & set(unaligned["divisible"])
    stored = by_name["statistics-entropy-store-tma-plain-fp16-sm_90"]
    # float16 has its exponentials moved up from the subnormals.
    assert stored["constants"]["STORE_SCALE"] == 2.0**15


def test_other_numbers_of_rows_and_columns_compile_nothing_new(recorded_variants):
    assert recorded_variants["new"] == []
