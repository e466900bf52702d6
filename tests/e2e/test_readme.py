"""The README's Python runs as it stands, and its file tree and command table are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from s2srm.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=["rm", "kernels"])
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_every_module_has_a_place_in_the_tree():
    tree = README.partition("## Files")[2]
    names = {path.name for path in (ROOT / "s2srm").rglob("*.py")} - {"__init__.py"}
    # A command's module is named by the table of commands.
    names -= {f"{name.replace('-', '_')}.py" for name in COMMANDS}
    assert [name for name in sorted(names) if not re.search(rf"\b{re.escape(name)}", tree)] == []


def test_nothing_in_the_tree_is_gone():
    tree = README.partition("## Files")[2]
    named = set(re.findall(r"\b\w+\.(?:py|j2|css)\b|\b\w+\.html\.j2\b", tree))
    there = {path.name for path in ROOT.glob("s2srm/**/*")} | {"test_layers.py", "setup.py"}
    assert named - there == set()


def test_every_command_is_in_the_table():
    assert [name for name in COMMANDS if f"`s2srm {name}`" not in README] == []


def test_links_to_files_resolve():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
