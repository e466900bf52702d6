"""What cannot be written is said in one line that names it, and trying leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from s2srm.errors import UserError
from s2srm.outputs import probe_file, probe_folder, writing


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    probe_folder("output", tmp_path / "a" / "b")
    probe_file("--out", tmp_path / "c" / "page.html")
    probe_file("--out", tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    probe_file("--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "old"


@pytest.mark.parametrize("below", ["", "run", "run/deeper"])
def test_a_file_in_the_way_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output: \S*: \S*/file is a file, not a folder$"):
        probe_folder("output", tmp_path / "file" / below)


def test_a_device_in_the_way_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^output: /dev/null/run: /dev/null is a file, not a folder"
    ):
        probe_folder("output", Path("/dev/null/run"))


@pytest.mark.parametrize("below", ["", "run"])
def test_a_link_to_nowhere_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"link is a link to .*gone, which is not there"):
        probe_folder("output", tmp_path / "link" / below)


def test_a_link_to_a_folder_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    probe_folder("output", tmp_path / "link" / "run")
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("/proc/s2srm/run", "no file can be made in /proc"),
        ("/sys/s2srm-run", "cannot be written"),
        ("/tmp/" + "x" * 300, "File name too long"),
        ("/tmp/" + "x/" * 3000, "File name too long"),
        ("/tmp/nul\0byte", "null byte"),
    ],
)
def test_the_system_says_why(folder: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        probe_folder("output", Path(folder))
    assert str(caught.value).startswith("output: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        probe_folder("output", tmp_path / "run")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--out: \S* is a folder; give the name of a file"):
        probe_file("--out", tmp_path)


def test_a_full_disk_is_one_line() -> None:
    full = Path("/dev/full")
    with (
        pytest.raises(UserError, match="/dev/full cannot be written: No space left"),
        writing(full),
    ):
        full.write_text("x")


def test_what_the_rust_libraries_say_of_a_full_disk_is_one_line_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    with pytest.raises(UserError, match="cannot be written"), writing(tmp_path):
        save_file({"a": zeros(3)}, tmp_path / "no" / "such" / "folder")
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 / 0
