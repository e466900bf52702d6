"""The `s2srm` command: picks a subcommand, and turns UserError into one line and exit code 2.

Nothing heavy is imported before a command has parsed its arguments.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence

from s2srm import __version__
from s2srm.commands.parsing import nearest
from s2srm.errors import UserError

COMMANDS: dict[str, str] = {
    "demo": "the whole pipeline on a generated miniature world, on a CPU, in minutes",
    "sft": "supervised fine-tuning on demonstrations",
    "rm": "train a sequence-to-sequence reward model on preference triples",
    "scalar-rm": "train a scalar (Bradley-Terry) reward model on the same triples",
    "ppo": "PPO on the reward of either model",
    "correct": "show an RM's correction of one response, with the reward of every token",
    "eval": "compare policies: gold score or reward, win rates, refusals, length",
    "report": "write one self-contained HTML page about runs",
    "doctor": "versions, devices, and which backend each operation will use",
}
_OTHER_RANKS_WAIT_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 when interrupted.

    Under torchrun every rank meets the same bad input: rank 0 prints it, and the launcher ends the
    others while they wait. A rank that is alone in its trouble prints it after that wait.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(_OTHER_RANKS_WAIT_SECONDS)
        print(f"s2srm: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("s2srm: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(f"s2srm {__version__}")
        return
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, list(COMMANDS))}")
    _set_up_logging()
    importlib.import_module(f"s2srm.commands.{name.replace('-', '_')}").run(rest)


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
        "Training commands also run under torchrun:",
        "  torchrun --nproc-per-node 2 -m s2srm rm --config RECIPE.yaml",
    ]
    return "\n".join(lines)


def _set_up_logging() -> None:
    """Messages of s2srm on stderr: INFO on rank 0, ERROR on the others."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    main_rank = os.environ.get("RANK", "0") == "0"
    logging.getLogger("s2srm").setLevel(logging.INFO if main_rank else logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
