"""Building and loading the compiled library, and what happens where that cannot be done."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from s2srm_kernels import extension

ROOT = Path(__file__).parents[2]
BUILD = runpy.run_path(str(ROOT / "csrc" / "build.py"))
WITHOUT_COMPILER = {"PATH": "/nonexistent", "CUDA_HOME": "/nonexistent", "S2SRM_CUDA": "0"}
USE = """
import json, torch, warnings
import s2srm_kernels as kernels
args = torch.ones(3), torch.ones(3), torch.tensor([0, 3])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [kernels.gae(*args, lam=1.0).advantages.tolist() for _ in range(2)]
try:
    kernels.gae(*args, impl="cpp")
    refusal = None
except ValueError as error:
    refusal = str(error)
print(json.dumps([results, [str(w.message) for w in caught], refusal]))
"""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def checkout(tmp_path):
    """A checkout in which nothing is built."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "kernels", "s2srm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    return tmp_path


def run(folder, *command, **env):
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "kernels"), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def use(folder):
    done = run(folder, "-c", USE)
    assert done.returncode == 0, done.stderr
    results, warned, refusal = json.loads(done.stdout)
    assert results == [[2.0, 1.0, 0.0]] * 2
    return warned, refusal


@needs_compiler
def test_loading_registers_kernels_and_may_be_repeated():
    assert extension.load()["cpu"] is None
    assert extension.load() is extension.load()
    for name in ("gae", "token_rewards"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"s2srm::{name}.cpp", "CPU")


@needs_compiler
def test_the_library_takes_nothing_from_torch_but_its_stable_c_interface():
    """So that one binary serves several versions: no mangled name of at, c10 or torch."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    library = Path(extension.__file__).parent / "_C.so"
    command = ["nm", "-D", "--undefined-only", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert "torch_call_dispatcher" in names
    assert not [n for n in names if re.match(r"_ZN?K?(2at|3c10|5torch)", n)]


def test_without_a_compiler_installation_succeeds_and_the_reference_runs_with_one_warning(checkout):
    done = run(checkout, "setup.py", "-q", "build_ext", "--inplace", **WITHOUT_COMPILER)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line]
    assert len(said) == 1 and "_C" in said[0] and "no C++ compiler" in said[0]

    editable = (
        "import setuptools.build_meta as b; b.build_editable('out')"  # what pip install -e calls
    )
    done = run(checkout, "-c", editable, **WITHOUT_COMPILER)
    assert done.returncode == 0, done.stderr
    assert list((checkout / "out").glob("*.whl"))
    assert not list(checkout.rglob("*.so"))

    warned, refusal = use(checkout)
    assert len(warned) == 1
    for text in (warned[0], refusal):
        assert "_C.so does not exist" in text and "python csrc/build.py" in text


def test_a_build_by_hand_says_why_it_failed(checkout):
    done = run(checkout, "csrc/build.py", **WITHOUT_COMPILER)
    assert done.returncode == 1
    assert done.stderr == "_C.so was not built: no C++ compiler was found: install g++ or set CXX\n"


def test_a_broken_library_is_named_with_the_loaders_reason(checkout):
    library = checkout / "kernels" / "s2srm_kernels" / "_C.so"
    library.write_bytes(b"not a library at all" * 100)
    warned, refusal = use(checkout)
    assert len(warned) == 1
    for text in (warned[0], refusal):
        assert f"{library} does not load" in text and "invalid ELF header" in text


@pytest.mark.parametrize("source", ["gae.cpp", "lm_head/simd/lanes.h"])
def test_a_library_older_than_its_sources_is_not_used(checkout, source):
    library = checkout / "kernels" / "s2srm_kernels" / "_C.so"
    library.write_bytes(b"")
    later = library.stat().st_mtime + 60
    os.utime(checkout / "csrc" / source, (later, later))
    warned, refusal = use(checkout)
    assert len(warned) == 1
    for text in (warned[0], refusal):
        assert f"older than csrc/{source}" in text and "python csrc/build.py" in text


WITH_A_GPU = """
import json, torch
torch.cuda.is_available = lambda: True
from s2srm_kernels import dispatch
print(json.dumps([dispatch.load("cpp", device) for device in ("cpu", "cuda", None)]))
"""


@needs_compiler
@pytest.mark.parametrize("built", ["cpu", "cuda", "neither"])
def test_the_library_of_one_device_does_not_need_the_others(checkout, built):
    package = checkout / "kernels" / "s2srm_kernels"
    if built == "cpu":
        shutil.copy(Path(extension.__file__).parent / "_C.so", package)
    if built == "cuda":  # nothing is run: any library that loads will do
        command = ["g++", "-shared", "-x", "c++", os.devnull, "-o", str(package / "_C_cuda.so")]
        subprocess.run(command, check=True)
    done = run(checkout, "-c", WITH_A_GPU)
    assert done.returncode == 0, done.stderr
    reasons = dict(zip(("cpu", "cuda", "any"), json.loads(done.stdout), strict=True))
    for device, library in (("cpu", "_C.so"), ("cuda", "_C_cuda.so")):
        if device == built:
            assert reasons[device] is None
        else:
            assert f"{library} does not exist" in reasons[device]
    assert (reasons["any"] is None) == (built != "neither")


def test_the_source_distribution_has_what_the_build_needs(checkout):
    done = run(checkout, "setup.py", "-q", "sdist", **WITHOUT_COMPILER)
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = [
        p for p in (ROOT / "csrc").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    assert {str(p.relative_to(ROOT)) for p in tracked} < names


@needs_compiler
def test_a_file_is_compiled_again_if_it_a_header_or_the_command_changed(tmp_path):
    source, header = tmp_path / "a.cpp", tmp_path / "a.h"
    header.write_text("inline int one() { return 1; }\n")
    source.write_text('#include "a.h"\nint two() { return one() + one(); }\n')
    command = ["g++", "-fPIC"]

    def compiled_again(command):
        before = made.stat().st_mtime_ns
        assert BUILD["compile_file"](command, source, tmp_path) == made
        return made.stat().st_mtime_ns != before

    made = BUILD["compile_file"](command, source, tmp_path)
    for file in (source, header):
        os.utime(file, (1, 1))
    assert not compiled_again(command)
    for file in (source, header):
        later = made.stat().st_mtime + 60
        os.utime(file, (later, later))
        assert compiled_again(command)
        os.utime(file, (1, 1))
    assert compiled_again([*command, "-O2"])
    assert not compiled_again([*command, "-O2"])
    source.write_text("this is no C++")
    with pytest.raises(BUILD["BuildError"], match=r"g\+\+ failed to make a\.cpp\.o"):
        compiled_again([*command, "-O2"])
    assert made.exists()
