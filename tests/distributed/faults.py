"""Two ranks as forks of one process that has imported everything, and what can befall one of them.

A fork is a rank without torchrun: nobody but its own guardian ends it. A fault strikes at a beat of
the rank's pulse, so at any moment of a run: while data is read, models are loaded, responses
sampled, micro-batches trained, checkpoints written.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer" / "checkpoint"))
from runs_tiny import config

from s2srm import cli
from s2srm.process import run_and_exit
from s2srm.runs import config_to_dict
from s2srm.watchdog import pulse


@dataclass(frozen=True)
class Case:
    """A run of two ranks. Rank `rank` meets the fault at its `beat`-th beat in a phase whose name
    begins with `phase` (any phase where it is empty). program: in the place of a stage."""

    name: str
    stage: str
    fault: str = ""
    rank: int = 1
    beat: int = 1
    phase: str = ""
    ranks: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    program: Callable[[], None] | None = None


@dataclass(frozen=True)
class Ended:
    """What became of a case: exit codes and output of the ranks, and how long they took.

    reached: whether the fault came."""

    codes: list[int]
    outputs: list[str]
    seconds: float
    reached: bool

    @property
    def lines(self) -> list[str]:
        """Different lines of error, of all ranks."""
        everything = [line for output in self.outputs for line in output.splitlines()]
        return sorted({line for line in everything if line.startswith("s2srm: error: ")})


def import_everything() -> None:
    """What a rank would import; before the first fork."""
    from s2srm.engine.deepspeed_engine import import_deepspeed
    from s2srm.ppo import train
    from s2srm.supervised import rm, scalar_rm, sft

    assert all(stage.run for stage in (train, rm, scalar_rm, sft))
    import_deepspeed()
    # What deepspeed.initialize imports.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def _loop() -> None:
    while True:
        pass


def _hold_the_gil() -> None:
    """A call in C that never gives the interpreter back."""
    sys.setswitchinterval(1e9)
    _loop()


def _extra_collective() -> None:
    """The other rank has nothing like it, and waits elsewhere."""
    torch.distributed.all_reduce(torch.zeros(7))
    torch.distributed.barrier()


def _full_disk() -> None:
    """Every write fails from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def _out_of_memory() -> None:
    raise MemoryError


def _nan() -> None:
    """The next loss of this rank is not finite."""
    from s2srm.ppo import update
    from s2srm.supervised.rm import RMTask

    value_loss, rm_loss, is_due = update.value_loss, RMTask.loss, [True]

    def spoilt_values(*args: Any) -> torch.Tensor:
        loss = value_loss(*args)
        return loss * torch.nan if is_due and is_due.pop() else loss

    def spoilt_rm(self: RMTask, *args: Any) -> Any:
        loss, stats = rm_loss(self, *args)
        return (loss * torch.nan if is_due and is_due.pop() else loss), stats

    update.value_loss, RMTask.loss = spoilt_values, spoilt_rm


FAULTS: dict[str, Callable[[], None]] = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": _loop,
    "gil": _hold_the_gil,
    "collective": _extra_collective,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "disk": _full_disk,
    "memory": _out_of_memory,
    "nan": _nan,
}


def arm(case: Case, marker: Path) -> None:
    """Let the fault come at its beat; the file `marker` says that it has."""
    beat = pulse.Page.beat
    say = pulse.Page.say
    count = 0
    current = ""

    def counted(self: pulse.Page, collective: bool = False) -> None:
        nonlocal count
        beat(self, collective)
        if current.startswith(case.phase):
            count += 1
            if count == case.beat:
                marker.touch()
                FAULTS[case.fault]()

    def named(self: pulse.Page, text: str, state: pulse.State = pulse.State.RUNNING) -> None:
        nonlocal current
        current = text
        say(self, text, state)

    pulse.Page.beat, pulse.Page.say = counted, named


def start(case: Case, root: Path, out: Path) -> list[int]:
    """The process ids of the ranks of a case, which runs in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if case.stage:
        settings = {"watchdog": 5.0, "resume": "auto", **case.settings}
        cfg = config(case.stage, root, out / "run", **settings)
        (out / "config.yaml").write_text(yaml.safe_dump(config_to_dict(cfg)))
    return [_fork(case, rank, port, out) for rank in range(case.ranks)]


def play(case: Case, root: Path, out: Path, timeout: float = 120.0) -> Ended:
    """Run a case in the folder `out`; ranks that are alive after the timeout are killed."""
    started = time.monotonic()
    children = start(case, root, out)
    codes = [_wait(child, started + timeout) for child in children]
    seconds = time.monotonic() - started
    # A guardian speaks before it ends its rank.
    outputs = [(out / f"rank-{rank}.log").read_text() for rank in range(case.ranks)]
    return Ended(codes, outputs, seconds, (out / "reached").exists())


def _fork(case: Case, rank: int, port: int, out: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    log = os.open(out / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for key in [key for key in os.environ if key.startswith("TORCHELASTIC")]:
        del os.environ[key]
    if case.ranks > 1:
        world = str(case.ranks)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": world, "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port)}
    if case.fault and rank == case.rank:
        arm(case, out / "reached")
    torch.set_num_threads(1)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    if case.program is not None:
        run_and_exit(case.program)
    run_and_exit(lambda: cli.main([case.stage, "--config", str(out / "config.yaml")]))


def _wait(child: int, ends: float) -> int:
    """The exit code, negative for a signal; -1000 where it had to be killed."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -1000
        time.sleep(0.02)


def main(cases: str, root: str, out: str) -> None:
    """faults.py CASES ROOT OUT: play the cases of a JSON file, write OUT/NAME.json of each."""
    import_everything()
    for values in json.loads(Path(cases).read_text()):
        case = Case(**values)
        ended = play(case, Path(root), Path(out) / case.name)
        found = {**vars(ended), "lines": ended.lines}
        (Path(out) / f"{case.name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
