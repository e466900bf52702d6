"""Every Triton kernel that can be chosen, compiled for GPUs that need not be there."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="without triton there is no backend to compile")

from benchmarks.resources.compile_checks import (
    SHARED_LIMIT,
    Resources,
    broken_limits,
    differences,
    read_table,
    write_table,
)

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "kernel_resources.md"
ROW = Resources("statistics", 90, 200, 0, 0, 147480, "HGMMA.64x256x16.F32.BF16 x4", 2800)


def run(*arguments):
    """Python in a process of its own: the interpreter's kernels cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "kernels")
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_variant_keeps_its_limits_and_is_as_recorded():
    done = run("-m", "benchmarks.resources.compile_checks", "--compare", str(TABLE))
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    recorded, _ = read_table(TABLE)
    assert f"\n{len(recorded)} variants in " in done.stdout


@pytest.fixture(scope="module")
def samples():
    """What was read of each kernel of compile_samples."""
    done = run("tests/kernels/compile_samples.py")
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
        dataclasses.replace(ROW, variant="gradients", arch=100, matrix="UTCHMMA x8"),
        dataclasses.replace(ROW, variant="merge", arch=80, matrix="HMMA.16816.F32 x4, HMMA.1 x2"),
    ]
    write_table(tmp_path / "table.md", rows, "3.9.0")
    assert read_table(tmp_path / "table.md") == (rows, "3.9.0")
    (tmp_path / "other.md").write_text("# no table\n")
    with pytest.raises(ValueError, match=r"other\.md does not say which version"):
        read_table(tmp_path / "other.md")


def test_differences_name_the_variant_and_both_values():
    other = dataclasses.replace(ROW, variant="merge")
    assert differences([ROW, other], [other, ROW]) == []
    changed = dataclasses.replace(ROW, registers=208, shared=98328)
    assert differences([changed], [ROW]) == [
        "statistics: registers 200 -> 208, shared 147480 -> 98328"
    ]
    assert differences([ROW, other], [ROW]) == ["merge: not in the table"]
    assert differences([ROW], [ROW, other]) == ["merge: in the table, but no variant"]
