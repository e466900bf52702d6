"""Which values of a setting make sense, written on its field and checked from there.

    gamma: Annotated[float, Bounds(0, 1)] = 1.0
    betas: tuple[Annotated[float, Bounds(0, below=1)], ...] = (0.9, 0.95)
    max_steps: PositiveInt | None = None

Left out: what concerns several settings or the disk (`validation`), and types, which the command
line's parser and the type checker hold.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from s2srm.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """low <= value <= high, above < value < below; None does not bound. NaN is never inside."""

    low: float | None = None
    high: float | None = None
    _: dataclasses.KW_ONLY
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the value lies inside."""
        return (
            value == value
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """`lie between 0 and 1`, `be at least 0 and less than 1`: what follows `must`."""
        if self.low is not None and self.high is not None:
            return f"lie between {self.low} and {self.high}"
        limits = {
            "at least": self.low,
            "greater than": self.above,
            "at most": self.high,
            "less than": self.below,
        }
        return "be " + " and ".join(f"{k} {v}" for k, v in limits.items() if v is not None)


PositiveInt = Annotated[int, Bounds(1)]
NonNegativeInt = Annotated[int, Bounds(0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(0)]


def check_bounds(cfg: Any, key: str = "") -> None:
    """Check every setting of a config dataclass, groups and items of lists included.

    key: the dotted name of cfg itself, where it is a group. UserError for the first value outside
    its bounds, or not among the options of its Literal.
    """
    hints = typing.get_type_hints(type(cfg), include_extras=True)
    for field in dataclasses.fields(cfg):
        _check(f"{key}.{field.name}".lstrip("."), hints[field.name], getattr(cfg, field.name))


def rules_of(annotation: Any) -> Iterator[str]:
    """What must hold of a value or of its items, for people: `lie between 0 and 1`."""
    if typing.get_origin(annotation) is Annotated:
        yield from (str(rule) for rule in annotation.__metadata__ if isinstance(rule, Bounds))
    for inner in typing.get_args(annotation):
        yield from rules_of(inner)


def _check(key: str, annotation: Any, value: Any) -> None:
    if dataclasses.is_dataclass(value):
        check_bounds(value, key)
        return
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for rule in annotation.__metadata__:
            if isinstance(rule, Bounds) and not rule.holds(value):
                raise UserError(f"{key} must {rule}, got {value}")
        _check(key, options[0], value)
    elif origin in (Union, types.UnionType) and value is not None:
        for option in options:
            _check(key, option, value)
    elif origin is Literal and value not in options:
        raise UserError(f"{key} must be one of {', '.join(map(str, options))}, got {value!r}")
    elif origin is dict and isinstance(value, Mapping):
        for name, item in value.items():
            _check(f"{key}.{name}", options[1], item)
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        each = options[:1] * len(value) if origin is list or Ellipsis in options else options
        for i, (item, option) in enumerate(zip(value, each, strict=False)):
            _check(f"{key}[{i}]", option, item)
