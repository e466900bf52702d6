"""How a process of ours ends: its exit code, what still runs, and what can no longer abort it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROLOGUE = "import atexit, sys, threading, time\nfrom s2srm.process import run_and_exit\n"


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + program], capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    ("main", "code", "message"),
    [
        ("lambda: None", 0, ""),
        ("lambda: 2", 2, ""),
        ("lambda: sys.exit()", 0, ""),
        ("lambda: sys.exit(143)", 143, ""),
        ("lambda: sys.exit('no such folder')", 1, "no such folder"),
        ("lambda: 1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_exit_codes_are_those_of_a_plain_program(main: str, code: int, message: str) -> None:
    ended = run(f"run_and_exit({main})")
    assert ended.returncode == code
    assert ended.stderr.rstrip().endswith(message) and bool(ended.stderr) == bool(message)


def test_threads_exit_handlers_and_streams_are_waited_for() -> None:
    ended = run(
        """
def main():
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("main")
run_and_exit(main)
"""
    )
    assert (ended.returncode, ended.stdout) == (0, "main\nthread\nhandler\n"), ended.stderr


def test_a_worker_of_gloo_that_still_drops_its_tensors_does_not_abort_the_exit() -> None:
    """Through sys.exit most of these runs die with "terminate called without an active exception".

    The GIL is not handed over by force, so that gloo's workers stand where load only seldom leaves
    them: the collectives are done, and their tensors wait for the GIL. The group outlives its
    destruction, as under DeepSpeed.
    """
    ended = run(
        """
import torch
from s2srm import distributed
def main():
    global kept, tensor
    distributed.start_alone()
    kept = torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
    tensor = torch.ones(4)
    sys.setswitchinterval(1000)
    for _ in range(20):
        kept.allreduce([tensor])
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
run_and_exit(main)
"""
    )
    assert ended.returncode == 0, ended.stderr
