"""Chains of training stages side by side, each chain a process with its share of the threads.

The stages of a chain follow one another; chains have nothing to do with each other. What a chain
prints goes to this process's own output, in whole lines. The first chain that fails stops the
others. Left out: a chain that waits for another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from s2srm.commands.libraries import quiet_libraries, set_up_logging
from s2srm.commands.stages import Stage
from s2srm.config import StageConfig
from s2srm.errors import UserError


@dataclass(frozen=True)
class ChainedStage:
    """name: as it is printed. cfg: what the stage's `run` takes."""

    name: str
    stage: Stage
    cfg: StageConfig


def run_chains(title: str, chains: Sequence[Sequence[ChainedStage]]) -> None:
    """Run every chain to its end.

    UserError with a chain's own message where that was one, else with how its process ended; what
    it printed stands above. The others are stopped then, and by anything that is raised here, as an
    interrupt.
    """
    import torch

    threads = max(1, torch.get_num_threads() // len(chains))
    context = multiprocessing.get_context("spawn")
    started: list[BaseProcess] = []
    running: dict[int, _Running] = {}
    try:
        for chain in chains:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run_chain, args=(title, chain, threads, sender))
            process.start()
            sender.close()
            started.append(process)
            names = " and ".join(stage.name for stage in chain)
            running[process.sentinel] = _Running(process, receiver, names)
        while running:
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                running.pop(sentinel).end()
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


class _Running(NamedTuple):
    """A chain's process, where its error comes from, and the names of its stages."""

    process: BaseProcess
    receiver: Connection
    names: str

    def end(self) -> None:
        """Of a process that has ended: UserError if it failed."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        if code == 0:
            return
        try:
            message = self.receiver.recv()
        except EOFError:
            how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
            message = f"the process of {self.names} ended {how}; what it said stands above"
        raise UserError(message)


def _run_chain(title: str, chain: Sequence[ChainedStage], threads: int, sender: Connection) -> None:
    """The life of a chain's process."""
    # Two bars that redraw themselves on one terminal would tear each other up: plain lines.
    os.environ["TTY_COMPATIBLE"] = "0"
    try:
        import torch

        torch.set_num_threads(threads)
        set_up_logging()
        quiet_libraries()
        for stage in chain:
            run_and_print(title, stage)
    except UserError as error:
        sender.send(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def run_and_print(title: str, stage: ChainedStage) -> None:
    """Run one stage; print what it took and its held-out metrics."""
    started = time.monotonic()
    metrics = stage.stage.run(stage.cfg).metrics
    held_out = {k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/")}
    found = ", ".join(f"{name} {value:.3f}" for name, value in sorted(held_out.items()))
    took = f"{title}: {stage.name} took {time.monotonic() - started:.0f} s"
    print(f"{took}; held out: {found}" if found else took, flush=True)
