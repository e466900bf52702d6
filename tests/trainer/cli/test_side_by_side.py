"""Chains of stages in processes of their own: one that fails, or an interrupt, ends them all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from s2srm.commands.side_by_side import ChainedStage, run_chains
from s2srm.commands.stages import Stage
from s2srm.config import StageConfig
from s2srm.errors import UserError


def stage(output: str | Path) -> ChainedStage:
    cfg = StageConfig(output=str(output))
    return ChainedStage(Path(output).name, Stage(StageConfig, "chain_stages", ""), cfg)


def once_started(act: Callable[[BaseProcess], None]) -> threading.Thread:
    """A thread that waits for the first process, and then acts."""

    def watch() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.02)
        act(children[0])

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_the_first_error_is_the_callers_and_ends_the_other_chain(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chains = [[stage("wait"), stage(tmp_path / "never")], [stage(tmp_path / "a"), stage("fail")]]
    with pytest.raises(UserError, match=r"^data\.path: nothing there$"):
        run_chains("world", chains)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not multiprocessing.active_children()
    printed = capfd.readouterr()
    assert "world: a took 0 s; held out: loss 0.500" in printed.out.splitlines()
    assert "Traceback" not in printed.err


def test_a_process_that_is_killed_is_named() -> None:
    killer = once_started(lambda child: os.kill(child.pid or 0, signal.SIGKILL))
    with pytest.raises(UserError, match="the process of wait and fail ended by SIGKILL"):
        run_chains("world", [[stage("wait"), stage("fail")]])
    killer.join()


def test_an_interrupt_ends_the_chains() -> None:
    interrupter = once_started(lambda child: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_chains("world", [[stage("wait")]])
    interrupter.join()
    assert not multiprocessing.active_children()
