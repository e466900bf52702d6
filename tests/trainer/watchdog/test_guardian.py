"""A guardian whose rank died while the guardian was starting: it must not watch somebody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from s2srm.watchdog.pulse import Page

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = f"import sys; sys.path.append({str(ROOT)!r}); from s2srm.watchdog.guardian import main"


def guard(first_line: str, page: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{PROGRAM}; main()"],
        input=first_line,
        capture_output=True,
        text=True,
        timeout=30,
        pass_fds=[page],
        check=False,
    )


def test_a_rank_that_died_during_the_start_is_told_from_who_adopted_its_guardian(tmp_path) -> None:
    """This test is the guardian's parent, as the system's first process would be, and lives on."""
    rank = subprocess.Popen([sys.executable, "-c", ""])
    rank.wait()
    with tempfile.TemporaryFile() as file:
        page = Page(file.fileno())
        spec = {
            "rank": 0,
            "pid": rank.pid,
            "world": 1,
            "node": "a/0",
            "limit_s": 600.0,
            "output": str(tmp_path),
            "page_fd": file.fileno(),
            "stack_fd": file.fileno(),
            "listener_fd": -1,
            "addresses": [],
            "token": "",
            "launcher_pid": 0,
        }
        ended = guard(json.dumps(spec) + "\n", file.fileno())
        page.close()
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("\n") <= 1 and "Traceback" not in ended.stderr
    assert os.getppid(), "nobody has killed us"


def test_a_rank_that_died_before_it_said_anything() -> None:
    with tempfile.TemporaryFile() as file:
        ended = guard("", file.fileno())
    assert (ended.returncode, ended.stderr) == (0, "")
