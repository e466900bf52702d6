"""Files that are not as they were written are named in one line; a run in progress is a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_rows import FEEDBACK

from s2srm.cli import main
from s2srm.errors import UserError
from s2srm.report.collect import collect
from s2srm.report.page import write_report
from s2srm.report.shapes import EVALUATION, check


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        write_report([folder], folder.parent / "page.html")
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "page.html").exists()


@pytest.mark.parametrize("name", ["eval/eval.json", "rm/config.yaml", "ppo/config.yaml"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"3", b"null", b"\xff\xfe\x00", b"{}"])
def test_a_file_cut_short_or_of_something_else(demo, name, content):
    (demo / name).write_bytes(content)
    refused(demo, name.replace(".", r"\."))


@pytest.mark.parametrize("name", ["rm/metrics.jsonl", "eval/feedback.jsonl"])
@pytest.mark.parametrize("line", ["{", "[1]", "3", "null", "{}"])
def test_a_line_of_something_else(demo, name, line):
    text = (demo / name).read_text().splitlines()[0]
    (demo / name).write_text(f"{text}\n{line}\n{text}\n")
    refused(demo, name.replace(".", r"\.") + ":2")


def walk(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else []
    )
    return [place for key, item in inner for place in [(*path, key), *walk(item, (*path, key))]]


def test_no_change_of_a_single_place_is_a_traceback(demo):
    """Each place in turn is left out or gets another type: the page is made, or one line says."""
    whole = {
        demo / "eval" / "eval.json": json.loads((demo / "eval" / "eval.json").read_text()),
        demo / "eval" / "feedback.jsonl": FEEDBACK,
    }
    num_refused = 0
    for file, value in whole.items():
        good = file.read_text()
        for place in walk(value):
            for change in ("leave out", 3.5, "text", None, [None], {}):
                changed = json.loads(json.dumps(value))
                holder = changed
                for key in place[:-1]:
                    holder = holder[key]
                if change == "leave out":
                    del holder[place[-1]]
                else:
                    holder[place[-1]] = change
                file.write_text(json.dumps(changed) + "\n")
                try:
                    write_report([demo], demo.parent / "page.html")
                except UserError as error:
                    num_refused += 1
                    assert file.name in str(error), (place, change)
        file.write_text(good)
    assert num_refused > 100


def test_places_are_named():
    with pytest.raises(UserError, match=r"^f: groups is missing"):
        check({"judge": "j", "against": []}, EVALUATION, "f")
    group = {"split": "dev", "temperature": 0, "num_prompts": 1, "policies": {}}
    with pytest.raises(UserError, match=r"^f: groups\[0\]\.split: expected ood or test, got 'dev'"):
        check({"judge": "j", "against": [], "groups": [group]}, EVALUATION, "f")


def test_a_run_in_progress(demo):
    """Before its first row, and in the middle of one."""
    (demo / "rm" / "metrics.jsonl").write_text("")
    (demo / "ppo" / "metrics.jsonl").write_text('{"step": 1, "time": 3.0, "los')
    (demo / "ppo" / "samples.jsonl").write_text(json.dumps(FEEDBACK) + "\n" + '{"prompt": "')
    assert [len(run.rows) for run in collect([demo]).runs] == [0, 0]
    assert write_report([demo], demo.parent / "page.html").is_file()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder", "--out: .*folder is a folder"),
        ("file/page.html", "--out: .*file is a file, not a folder"),
        ("x" * 300 + ".html", "File name too long"),
        ("/proc/page.html", "no file can be made in /proc"),
    ],
)
def test_a_page_that_cannot_be_written(demo, tmp_path, out, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        write_report([demo], tmp_path / out)


def test_home(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["report", "~/demo", "--out", "~/new/page.html"]) == 0
    assert (tmp_path / "new" / "page.html").is_file()
    assert str(tmp_path / "new" / "page.html") in capsys.readouterr().out
