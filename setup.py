"""The compiled libraries, which csrc/build.py builds; everything else is in pyproject.toml.

Where something to build with is missing, the installation goes on without the library and says so
in one line; the operators then run on their PyTorch reference, with a warning.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# By its path: pip does not put the folder of setup.py on sys.path.
build = runpy.run_path(str(Path(__file__).parent / "csrc" / "build.py"))


class BuildLibraries(build_ext):
    """Plain shared libraries instead of Python extension modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        name = ext.name.rpartition(".")[2]
        try:
            build["build_library"](name, library)
        except build["BuildError"] as error:
            raise CompileError(error) from error


setup(
    ext_modules=[
        # optional: setuptools turns an error of the build into a warning.
        Extension(f"s2srm_kernels.{name}", [], optional=True)
        for name in build["libraries"]()
    ],
    cmdclass={"build_ext": BuildLibraries},
    # No Python interface is compiled in, so one wheel serves every Python from 3.11.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
