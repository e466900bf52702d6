"""The list of compiled extensions; everything else about the package is in pyproject.toml.

None is compiled yet: every operation of s2srm_kernels runs on its reference backend.
"""

from setuptools import setup

setup(ext_modules=[])
