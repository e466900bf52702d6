"""`s2srm plan`: memory, time and what fits, before anything is rented.

The stage's own options are taken as they are; the stage follows from the recipe's name, or is
given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from s2srm.bounds import check_bounds
from s2srm.commands.parsing import parse, recipe_path
from s2srm.commands.stages import STAGES
from s2srm.errors import UserError, did_you_mean

SUMMARY = "Memory of each rank, time of a step and what fits; needs neither weights nor network."
_OWN = {
    "gpus": "devices of one node, one rank on each (default 1)",
    "nnodes": "nodes (default 1)",
    "device": "h100, h200, a100 or cpu (default h100)",
    "gpu_memory": "memory of each rank, such as 80GiB (default: the device's)",
    "prompt_tokens": "tokens of every prompt, instead of the data's lengths or the limits",
    "response_tokens": "tokens of every response, instead of the data's lengths or the limits",
    "stage": f"which stage a --config is for, where its settings do not tell: {', '.join(STAGES)}",
    "json": "print JSON for programs",
}
_UNITS = {"GB": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20, "G": 2**30, "M": 2**20}


def run(argv: Sequence[str]) -> None:
    """Parse, plan, print. Exits 0 after --help."""
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        print(_help())
        raise SystemExit(0)
    own, rest = split(argv)
    stage = own.get("stage") or find_stage(rest)
    if stage not in STAGES:
        raise UserError(f"--stage: unknown stage {stage!r}{did_you_mean(stage, STAGES)}")
    cfg = parse(STAGES[stage].config, rest, stage, SUMMARY)
    check_bounds(cfg)
    gpus, nodes = _count(own, "gpus"), _count(own, "nnodes")
    device = own.get("device", "h100")
    if device not in ("h100", "h200", "a100", "cpu"):
        raise UserError(f"--device must be h100, h200, a100 or cpu, got {device!r}")
    given = own.keys() & {"prompt_tokens", "response_tokens"}
    if len(given) == 1:
        raise UserError("--prompt_tokens and --response_tokens are given together or not at all")
    lengths = (_count(own, "prompt_tokens"), _count(own, "response_tokens")) if given else None
    memory = parse_memory(own["gpu_memory"]) if "gpu_memory" in own else None

    from s2srm.commands.libraries import quiet_libraries
    from s2srm.plan.report import as_json, as_text
    from s2srm.plan.run import make_plan
    from s2srm.validation import expand_paths

    quiet_libraries()
    module, ranks = STAGES[stage].module, gpus * nodes
    plan = make_plan(stage, module, expand_paths(cfg), device, ranks, memory, lengths)
    if "json" in own:
        print(json.dumps(as_json(plan), indent=2))
    else:
        print("\n".join(as_text(plan)))


def split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(this command's own options, the stage's)."""
    own: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(reversed(argv))
    while waiting:
        argument = waiting.pop()
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key not in _OWN:
            rest.append(argument)
        elif key == "json":
            own[key] = "true"
        elif equals:
            own[key] = value
        elif waiting:
            own[key] = waiting.pop()
        else:
            raise UserError(f"--{key}: its value is missing")
    return own, rest


def find_stage(argv: Sequence[str]) -> str:
    """The stage of the recipe that is named: by its settings, where only one stage has them, else
    by the end of its name. UserError if neither tells."""
    name = next(
        (
            after if argument == "--config" else argument.removeprefix("--config=")
            for argument, after in zip(argv, [*argv, ""][1:], strict=True)
            if argument == "--config" or argument.startswith("--config=")
        ),
        "",
    )
    if not name:
        raise UserError(f"--stage is missing (or a --config): one of {', '.join(STAGES)}")
    path = recipe_path(name)
    ends = [stage for stage in STAGES if path.stem == stage or path.stem.endswith(f"-{stage}")]
    if ends:
        return max(ends, key=len)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "policy" in values:
        return "ppo"
    raise UserError(
        f"--config {name}: its name does not end in a stage; add --stage, one of "
        f"{', '.join(STAGES)}"
    )


def parse_memory(text: str) -> float:
    """80GiB, 80GB, 81920MiB -> bytes."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise UserError(f"--gpu_memory: expected a size such as 80GiB, got {text!r}")
    try:
        return float(found[1]) * unit
    except ValueError:
        raise UserError(f"--gpu_memory: {found[1]!r} is no number") from None


def _count(own: dict[str, str], key: str) -> int:
    text = own.get(key, "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--{key} must be a whole number of at least 1, got {text!r}")
    return int(text)


def _help() -> str:
    lines = [
        "usage: s2srm plan --config RECIPE [--gpus 8] [--gpu_memory 80GiB] [--key.key value ...]",
        "",
        SUMMARY,
        "",
        *(f"  --{name:<18}{text}" for name, text in _OWN.items()),
        "",
        "All other options are the stage's own; s2srm STAGE --help lists them.",
        f"shipped architectures: {', '.join(_architectures())}",
    ]
    return "\n".join(lines)


def _architectures() -> list[str]:
    folder = Path(__file__).resolve().parent.parent / "plan" / "architectures"
    return [json.loads(f.read_text(encoding="utf-8"))["hub_name"] for f in sorted(folder.iterdir())]
