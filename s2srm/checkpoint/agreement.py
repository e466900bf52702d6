"""Whether a checkpoint may be gone on from with these settings.

Settings that change nothing, or only the last bits of a sum, are free; more or fewer steps are free
where no learning rate depends on their number; everything else must be what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2srm.errors import UserError

_FREE = {
    "output",
    "overwrite",
    "save_every",
    "keep_checkpoints",
    "resume",
    "watchdog",
    "log",
    "eval_every",
    "keep_best",
}
_ROUNDING = {"engine", "microbatch_tokens", "attention", "gradient_checkpointing"}
"""Names, at any depth, whose value only changes the order in which numbers are added."""
_LENGTH = {"max_steps", "epochs", "total_steps"}


def check_agreement(
    saved: dict[str, Any], now: dict[str, Any], default: dict[str, Any], where: Path
) -> list[str]:
    """Compare two configs of one stage as dictionaries; returns what will change the last bits.

    default: the stage's default config, for settings that `saved` is too old to know.
    Raises UserError that names the first key that must not differ.
    """
    rounding: list[str] = []
    before, after = dict(_flat(_completed(saved, default))), dict(_flat(now))
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        names = key.split(".")
        if old == new or names[0] in _FREE or _same_path(old, new):
            continue
        change = f"{key} is {new!r}, the run in {where} has {old!r}"
        if _ROUNDING & set(names):
            rounding.append(f"{key} {old!r} -> {new!r}")
        elif key not in _LENGTH:
            raise UserError(
                f"{change}: a resumed run keeps what shapes its result; take that value, or "
                "another output and --resume never"
            )
        elif schedules := _decaying(after):
            raise UserError(
                f"{change}: with {schedules[0]} the learning rate of every step depends on it; "
                "only a constant schedule can be made longer or shorter"
            )
    return rounding


def _decaying(flat: dict[str, Any]) -> list[str]:
    """Schedules that know their end."""
    return [
        f"{key} {value}"
        for key, value in flat.items()
        if key.split(".")[-1] == "schedule" and value != "constant"
    ]


def _same_path(old: Any, new: Any) -> bool:
    """Two names of one file or folder that exists."""
    if not (isinstance(old, str) and isinstance(new, str) and old and new):
        return False
    return Path(new).exists() and Path(old).resolve() == Path(new).resolve()


def _completed(saved: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """The saved config, with the defaults of settings that came later."""
    found = dict(saved)
    for key, value in default.items():
        if key not in found:
            found[key] = value
        elif isinstance(value, dict) and isinstance(found[key], dict):
            found[key] = _completed(found[key], value)
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
