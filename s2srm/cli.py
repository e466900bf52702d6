"""The `s2srm` command: picks a subcommand, and turns UserError into one line and exit code 2.

Nothing heavy is imported before a command has parsed its arguments.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import time
from collections.abc import Sequence

from s2srm import __version__, launcher
from s2srm.commands import stages
from s2srm.commands.libraries import set_up_logging
from s2srm.commands.stages import STAGES
from s2srm.errors import UserError, did_you_mean
from s2srm.watchdog import pulse

COMMANDS: dict[str, str] = {
    "demo": "the whole pipeline on a generated miniature world, on a CPU, in minutes",
    **{name: stage.summary for name, stage in STAGES.items()},
    "correct": "show an RM's correction of one response, with the reward of every token",
    "eval": "compare policies: gold score or reward, win rates, refusals, length",
    "report": "write one self-contained HTML page about runs",
    "plan": "memory of each rank, time of a step and what fits, before hardware is rented",
    "doctor": "versions, devices, and which backend each operation will use",
}
_OTHER_RANKS_WAIT_SECONDS = 5.0
_DISK_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}
_LESS_MEMORY = (
    "lower microbatch_tokens or sampling.batch_size, set gradient_checkpointing of the model, or "
    "use more ranks"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input or a run that cannot go on, 130
    when interrupted, 141 when nobody reads the output any more.

    Under torchrun every rank meets the same bad input: rank 0 prints it, and the launcher ends the
    others while they wait. A rank that is alone in its trouble prints it after that wait. Other
    exceptions are faults of ours and keep their traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _say_what_the_terminal_can()
    pulse.phase("")  # of a run before this one in the same process
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # What is left in the buffer must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        return _fail(f"{error.filename or 'writing'}: {error.strerror}{_whereabouts()}")
    except KeyboardInterrupt:
        print("s2srm: interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError" and not isinstance(error, MemoryError):
            raise
        why = str(error) or "on the CPU"
        return _fail(f"out of memory{_whereabouts()}: {why}; {_LESS_MEMORY}")
    return 0


def _whereabouts() -> str:
    """` on rank 1 in: PPO phase 3, rollout`, as far as there are ranks and a phase."""
    world, phase = os.environ.get("WORLD_SIZE", "1"), pulse.last_phase()
    rank = f" on rank {os.environ.get('RANK', '0')}" if world != "1" else ""
    return rank + (f" in: {phase}" if phase else "")


def _fail(message: str) -> int:
    """Print one line; rank 0 first."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_OTHER_RANKS_WAIT_SECONDS)
        if "rank" not in message:
            message = f"rank {rank}: {message}"
    line = f"s2srm: error: {' '.join(message.split())}"
    print(line, file=sys.stderr, flush=True)
    if launcher.is_launched():
        launcher.leave_last_word(line)
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            # It imports torch, which a line of error does not wait for otherwise.
            importlib.import_module("s2srm.watchdog.watch").announce(message)
    return 2


def _say_what_the_terminal_can() -> None:
    """A character that the terminal's encoding lacks is printed as an escape, not an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(f"s2srm {__version__}")
        return
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS, cutoff=0.5)}")
    set_up_logging()
    if name in STAGES:
        stages.run_stage(name, rest)
    else:
        importlib.import_module(f"s2srm.commands.{name}").run(rest)


def _help() -> str:
    lines = [
        "usage: s2srm COMMAND [options]        (s2srm COMMAND --help lists a command's options)",
        "",
        "RLHF with language feedback: sequence-to-sequence reward models and token-level PPO.",
        "",
        "commands:",
        *(f"  {name:<10} {summary}" for name, summary in COMMANDS.items()),
        "",
        "options:",
        "  --version  print the version",
        "  -h, --help print this",
        "",
        "Training commands and eval also run under torchrun:",
        "  torchrun --nproc-per-node 2 -m s2srm rm --config RECIPE.yaml",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
