"""nvcc compiles csrc/*.cu for every chip of the list, and no kernel spills: needs no GPU."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
BUILD = runpy.run_path(str(CSRC / "build.py"))
KERNELS = {"gae.cu": {"gae_kernel": 2}, "token_rewards.cu": {"token_rewards_kernel": 8}}
RESOURCES = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*\n\s*"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers"
)


def test_every_source_is_listed():
    assert set(KERNELS) == {source.name for source in CSRC.glob("*.cu")}


@pytest.mark.slow
@pytest.mark.parametrize("source", KERNELS)
def test_no_spills_no_stack_and_two_blocks_fit_a_multiprocessor(source, tmp_path, monkeypatch):
    if BUILD["find_nvcc"]() is None:
        pytest.skip("no nvcc: set CUDA_HOME or PATH")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", ";".join(BUILD["CHIPS"]))
    command = BUILD["cuda_compiler"]()
    command += ["-Xptxas=-v", "-Werror=all-warnings", "-cubin"]
    command = [part for part in command if part != "--threads=0"]
    found = {}
    for chip in BUILD["CHIPS"]:
        codes = [part for part in command if not part.startswith("-gencode") or chip in part]
        done = subprocess.run(
            [*codes, str(CSRC / source), "-o", str(tmp_path / f"{chip}.cubin")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for name, on, *numbers in RESOURCES.findall(done.stderr):
            assert on == chip
            found[name, chip] = [int(n) for n in numbers]
    for chip in BUILD["CHIPS"]:
        for kernel, count in {**KERNELS[source], "prepare_kernel": 1}.items():
            assert sum(kernel in name and on == chip for name, on in found) == count
    for (name, chip), (stack, stores, loads, registers) in found.items():
        assert stack == stores == loads == 0, f"{name} spills on sm_{chip}"
        assert registers <= 64, f"{name} takes {registers} registers on sm_{chip}"
