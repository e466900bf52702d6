"""The bounds of pyproject.toml and constraints.txt agree, and everything installed is pinned."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
INSTALLED_EXTRAS = ("deepspeed", "test", "dev")
"""Of `make venv`."""
BROUGHT_BY_TORCH = {"triton"}
"""Each torch for GPUs takes exactly one version, and brings its CUDA packages too."""


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bounds() -> list[Requirement]:
    optional = project()["optional-dependencies"]
    named = [*project()["dependencies"], *(r for x in INSTALLED_EXTRAS for r in optional[x])]
    return [Requirement(text) for text in named]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(r.specifier)) for r in found)
    names = [canonicalize_name(r.name) for r in found]
    assert len(set(names)) == len(names)
    return {n: str(r.specifier).removeprefix("==") for n, r in zip(names, found, strict=True)}


@pytest.mark.parametrize("requirement", bounds(), ids=str)
def test_the_tested_version_is_within_the_bounds(requirement):
    name = canonicalize_name(requirement.name)
    if name not in BROUGHT_BY_TORCH:
        assert requirement.specifier.contains(pins()[name]), pins()[name]


def test_everything_that_make_venv_installs_is_pinned():
    """Through the requirements of requirements, as far as they are installed here."""
    seen: set[str] = set()
    waiting = [(r.name, tuple(r.extras)) for r in bounds()]
    while waiting:
        name, extras = waiting.pop()
        name = canonicalize_name(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name in seen:
            continue
        seen.add(name)
        for requirement in map(Requirement, needed):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras)):
                waiting.append((requirement.name, tuple(requirement.extras)))
    ours = {n for n in seen if n not in BROUGHT_BY_TORCH and not n.startswith(("nvidia-", "cuda-"))}
    assert len(ours) > 40
    assert sorted(ours - set(pins())) == []


@pytest.mark.parametrize("name", ["transformers", "deepspeed", "datasets", "torch", "numpy"])
def test_the_next_release_that_may_break_is_bounded(name):
    (requirement,) = [r for r in bounds() if r.name == name]
    major, minor = (int(part) for part in pins()[name].split(".")[:2])
    following = f"{major}.{minor + 1}.0" if major == 0 else f"{major + 1}.0.0"
    assert not requirement.specifier.contains(following)


def test_gpu_packages_are_left_to_torch():
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))]
