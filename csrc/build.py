"""Builds the two libraries of s2srm_kernels; setup.py calls this, and it runs by itself:

    python csrc/build.py    in a bare checkout: needs torch and a compiler, neither setuptools nor
                            ninja; compiles what has changed

    _C.so         csrc/**/*.cpp
    _C_cuda.so    csrc/*.cu; only where nvcc and a CUDA build of torch are found

They speak torch's stable C interface and nothing of Python, so one binary serves every supported
torch and Python.

Environment: CXX, CXXFLAGS, CUDA_HOME; S2SRM_CUDA=0 leaves CUDA out, S2SRM_CUDA=1 insists on it;
TORCH_CUDA_ARCH_LIST ("8.0;9.0") instead of the architecture of the GPU that is present.

Left out: torch.utils.cpp_extension. It needs ninja to compile two files at a time, and refuses a
CUDA toolkit newer than torch's, which does no harm here: libcudart is linked in statically and no
header of ATen or c10 is included.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent
PACKAGE = CSRC.parent / "kernels" / "s2srm_kernels"
OBJECTS = CSRC.parent / "build" / "csrc"
# Declarations newer than torch 2.11 are hidden, so that none is called by mistake.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
CHIPS = ["80", "90", "100"]  # where neither a GPU nor TORCH_CUDA_ARCH_LIST says which


class BuildError(Exception):
    """Why a library was not built, in one line."""


def libraries() -> dict[str, list[Path]]:
    """The libraries that can be built here, with their sources."""
    found = {"_C": sorted(CSRC.rglob("*.cpp"))}
    if wants_cuda():
        found["_C_cuda"] = sorted(CSRC.glob("*.cu"))
    return found


def build_library(name: str, library: Path) -> None:
    """Compile what changed and link; BuildError, after the compiler's own words."""
    sources = libraries()[name]
    command = cuda_compiler() if name == "_C_cuda" else cpu_compiler()
    objects = OBJECTS / name
    library.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compile_file, command, source, objects / source.parent.relative_to(CSRC))
            for source in sources
        ]
        made = [str(job.result()) for job in jobs]
    torch_lib = find_torch() / "lib"
    needed = [f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if name == "_C_cuda":
        flags = ["-shared", "-cudart=static"]
        needed += ["-ltorch_cuda"] if (torch_lib / "libtorch_cuda.so").exists() else []
    else:
        flags = ["-shared", "-fopenmp"]
    run([command[0], *flags, *made, *needed], library)


def compile_file(command: list[str], source: Path, folder: Path) -> Path:
    """The object file of `source`, compiled again if the command, it or a header changed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{source.name}.o"
    record, depends = made.with_suffix(".command"), made.with_suffix(".d")
    text = " ".join(command)
    if made.exists() and record.exists() and record.read_text() == text:
        inputs = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        built = made.stat().st_mtime
        if all(os.path.exists(i) and os.stat(i).st_mtime < built for i in inputs):
            return made
    run([*command, "-MD", "-MF", str(depends), "-c", str(source)], made)
    record.write_text(text)
    return made


def run(command: list[str], output: Path) -> None:
    """Run `command -o output`; the output appears whole or not at all."""
    partial = output.with_name(f"{os.getpid()}.{output.name}")
    done = subprocess.run(
        [*command, "-o", str(partial)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    print(done.stdout, end="")
    if done.returncode != 0:
        raise BuildError(f"{Path(command[0]).name} failed to make {output.name}")
    partial.replace(output)


def cpu_compiler() -> list[str]:
    """The command that compiles a .cpp, up to the names of input and output."""
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if cxx is None:
        raise BuildError("no C++ compiler was found: install g++ or set CXX")
    return [cxx, *CXX_FLAGS, *os.environ.get("CXXFLAGS", "").split(), *DEFINES, *includes()]


def cuda_compiler() -> list[str]:
    """The command that compiles a .cu, up to the names of input and output."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found: set CUDA_HOME")
    codes = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips()]
    return [nvcc, *NVCC_FLAGS, *codes, "--threads=0", *DEFINES, *includes()]


def includes() -> list[str]:
    """Ours and torch's, without warnings from the latter."""
    include = find_torch() / "include"
    if not include.exists():
        raise BuildError("torch is not installed in the environment of the build")
    return ["-I", str(CSRC), "-isystem", str(include)]


def wants_cuda() -> bool:
    """Whether to build the CUDA library."""
    choice = os.environ.get("S2SRM_CUDA")
    if choice in ("0", "1"):
        return choice == "1"
    return find_nvcc() is not None and (find_torch() / "lib" / "libtorch_cuda.so").exists()


def find_torch() -> Path:
    """The folder of the installed torch, without the seconds of importing it."""
    spec = importlib.util.find_spec("torch")
    return Path("torch" if spec is None or spec.origin is None else spec.origin).parent


def find_nvcc() -> str | None:
    """CUDA_HOME's, else PATH's, else that of the usual folder."""
    home = os.environ.get("CUDA_HOME")
    if home is not None:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def chips() -> list[str]:
    """Compute capabilities to compile for."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if listed:
        return [chip.removesuffix("+PTX").replace(".", "") for chip in listed]
    import torch

    if torch.cuda.is_available():
        return ["{}{}".format(*torch.cuda.get_device_capability())]
    return CHIPS


def main() -> None:
    """Build into the checkout, each library whatever became of the other."""
    failures: list[str] = []
    for name in libraries():
        library = PACKAGE / f"{name}.so"
        try:
            build_library(name, library)
        except BuildError as error:
            failures.append(f"{library.name} was not built: {error}")
        else:
            print(library)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
