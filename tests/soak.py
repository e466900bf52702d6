"""What takes too long for `make test`: many kills, many exits, many faults, in a short table.

    python tests/soak.py kills [--count 20] [--seed 0]    SIGKILL at random moments, then resumed
    python tests/soak.py exits [--count 200]              starts and exits under load
    python tests/soak.py faults [--count 30] [--seed 0]   a random fault at a random moment
    python tests/soak.py all

Every run is two ranks with ZeRO of tiny models. Ranks are forks of one process that has imported
everything (tests/distributed/faults.py), so a start costs what a start of training costs.
Exit code 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from faults import FAULTS, Case, Ended, import_everything, play, start
from runs_tiny import assert_same_run, make_inputs

from s2srm import distributed
from s2srm.checkpoint import files
from s2srm.watchdog.watch import watching

STAGES = ("rm", "ppo")
_LONG_S = 300.0
_PHASES = {
    "rm": ("", "reading", "loading", "seq2seq RM step", "checkpoint", "saving"),
    "ppo": ("", "loading", "PPO calibration", "PPO phase", "checkpoint", "saving"),
}


def whole(stage: str, root: Path, out: Path) -> tuple[Path, float]:
    """An uninterrupted run, and how long it takes."""
    ended = play(Case("whole", stage), root, out / f"{stage}-whole", _LONG_S)
    assert ended.codes == [0, 0], ended.outputs
    return out / f"{stage}-whole" / "run", ended.seconds


def kills(root: Path, out: Path, count: int, draw: random.Random) -> list[tuple[str, bool, str]]:
    """Both ranks killed at once, at a random time or at a random beat while a checkpoint is
    written, until there were so many; then finished and compared."""
    found: list[tuple[str, bool, str]] = []
    for stage in STAGES:
        reference, seconds = whole(stage, root, out)
        rounds = num_kills = half_written = damaged = 0
        problem = ""
        while num_kills < count and not problem:
            folder = out / f"{stage}-killed-{rounds}"
            rounds += 1
            killed = True
            while killed and not problem:
                case = Case("killed", stage)
                if num_kills % 2:
                    case = replace(
                        case, fault="kill", phase="checkpoint", beat=draw.randrange(1, 40)
                    )
                children = start(case, root, folder)
                killed = kill_after(children, draw.uniform(0.2, 1.0) * seconds)
                num_kills += killed
                half_written += any(files.checkpoints_of(folder / "run").glob(".*.tmp"))
                if killed and num_kills % 5 == 0:
                    damaged += damage(folder / "run", draw)
            try:
                assert_same_run(reference, folder / "run")
            except (AssertionError, IndexError, OSError) as error:
                problem = f"round {rounds}: {error!r:.200}"
        text = (
            f"{num_kills} kills, {half_written} in a checkpoint, {damaged} damaged, {rounds} runs"
        )
        found.append((f"kills {stage}", not problem, f"{text} {problem}"))
        print(*found[-1], flush=True)
        found.append(other_ranks(stage, root, out))
        print(*found[-1], flush=True)
    return found


def kill_after(children: list[int], seconds: float) -> bool:
    """Whether the ranks were killed, by a fault or after so long; else they have finished."""
    ends = time.monotonic() + seconds
    codes: dict[int, int] = {}
    killed = False
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends and not killed:
            killed = True
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert killed or set(codes.values()) in ({0}, {-signal.SIGKILL}), codes
    return killed or set(codes.values()) != {0}


def damage(run: Path, draw: random.Random) -> bool:
    """Flip or cut a byte of the newest checkpoint, where there is one before it."""
    found = files.list_checkpoints(run)
    if len(found) < 2:
        return False
    path = draw.choice(sorted(found[0].iterdir()))
    data = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        data.pop()
    path.write_bytes(bytes(data))
    return True


def other_ranks(stage: str, root: Path, out: Path) -> tuple[str, bool, str]:
    """Two ranks, then one, then two, each ended by SIGTERM and gone on from."""
    folder = out / f"{stage}-ranks"
    seen: list[list[int]] = []
    prefix = {"rm": "seq2seq RM step", "ppo": "PPO phase"}[stage]
    for ranks, number in ((2, 1), (1, 2), (2, 0)):
        case = Case("ranks", stage, ranks=ranks, rank=0)
        if number:
            case = replace(case, fault="sigterm", phase=f"{prefix} {number}")
        seen.append(play(case, root, folder, _LONG_S).codes)
        (folder / "reached").unlink(missing_ok=True)
    ok = seen == [[143, 143], [143], [0, 0]]
    return f"2-1-2 ranks {stage}", ok, f"exit codes {seen}"


def exits(root: Path, out: Path, count: int, draw: random.Random) -> list[tuple[str, bool, str]]:
    """Two ranks join a group, meet, and end, with two other processes taking the processor."""
    del root, draw

    def program() -> None:
        with watching(60.0, str(out)):
            for _ in range(20):
                distributed.gather_objects(torch.ones(4))

    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    codes: Counter[tuple[int, ...]] = Counter()
    try:
        for number in range(count):
            case = Case("exit", "", program=program)
            codes[tuple(play(case, Path(), out / f"exit-{number}").codes)] += 1
            shutil.rmtree(out / f"exit-{number}")
    finally:
        for process in load:
            process.kill()
            process.wait()
    return [("exits", set(codes) == {(0, 0)}, f"{count} starts of 2 ranks: {dict(codes)}")]


def faults(root: Path, out: Path, count: int, draw: random.Random) -> list[tuple[str, bool, str]]:
    """Each ends in one line, in time, with nothing half-written taken: resumed, it equals the
    whole run."""
    wholes = {stage: whole(stage, root, out)[0] for stage in STAGES}
    counts: Counter[str] = Counter()
    problems: list[tuple[str, bool, str]] = []
    for number in range(count):
        stage = draw.choice(STAGES)
        case = Case(
            f"fault-{number}",
            stage,
            draw.choice(sorted(FAULTS)),
            draw.randrange(2),
            draw.randrange(1, 60),
            draw.choice(_PHASES[stage]),
        )
        ended = play(case, root, out / case.name, _LONG_S)
        counts[f"{case.fault}{'' if ended.reached else ' (not reached)'}"] += 1
        problem = wrong(case, ended, wholes[stage], root, out / case.name)
        if problem:
            problems.append((str(case), False, problem))
            (out / f"{case.name}.log").write_text("\n--\n".join(ended.outputs))
        else:
            shutil.rmtree(out / case.name)
        print(
            f"fault {number}: {case.fault} {ended.codes} {ended.seconds:.0f} s {problem}",
            flush=True,
        )
    text = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
    return [("faults", not problems, f"{count}: {text}"), *problems]


def wrong(case: Case, ended: Ended, reference: Path, root: Path, folder: Path) -> str:
    """What is not as it must be; empty if nothing."""
    if -1000 in ended.codes:
        return f"hung: {ended.outputs!r:.500}"
    harmless = ended.codes == [0, 0]
    if not harmless and set(ended.codes) != {143}:
        if len(ended.lines) != 1:
            return f"{len(ended.lines)} lines: {ended.lines}"
        if 0 in ended.codes:
            return f"exit codes {ended.codes}"
        if "Traceback" in "".join(ended.outputs):
            return f"a traceback: {''.join(ended.outputs)[-800:]!r}"
    (folder / "reached").unlink(missing_ok=True)
    again = play(Case(case.name, case.stage), root, folder, _LONG_S)
    if again.codes != [0, 0]:
        return f"resumed: {again.codes} {again.lines}"
    try:
        assert_same_run(reference, folder / "run")
    except AssertionError as error:
        return f"not the whole run: {error!r:.200}"
    return ""


KINDS: dict[
    str, tuple[Callable[[Path, Path, int, random.Random], list[tuple[str, bool, str]]], int]
] = {"kills": (kills, 20), "exits": (exits, 200), "faults": (faults, 30)}


def main() -> None:
    """Run what was asked for, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix="soak-"))
    root = out / "inputs"
    root.mkdir()
    make_inputs(root)
    import_everything()
    table: list[tuple[str, bool, str]] = []
    for kind in KINDS if arguments.kind == "all" else [arguments.kind]:
        run, count = KINDS[kind]
        started = time.monotonic()
        rows = run(root, out, arguments.count or count, random.Random(arguments.seed))
        table += rows
        print(f"{kind}: {time.monotonic() - started:.0f} s, seed {arguments.seed}", flush=True)
    for name, ok, text in table:
        print(f"{'ok  ' if ok else 'FAIL'} {name:<16} {text}")
    if all(ok for _, ok, _ in table):
        shutil.rmtree(out)
        return
    print(f"logs are in {out}")
    sys.exit(1)


if __name__ == "__main__":
    main()
