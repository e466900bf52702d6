"""Bounds stand on the field: every one holds, by whoever checks, and the help shows them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from s2srm.bounds import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, check_bounds
from s2srm.commands.parsing import build_parser
from s2srm.config import DataConfig, KLConfig, PPOConfig, RMConfig, ScalarRMConfig, SFTConfig
from s2srm.data.loading import load_prompts
from s2srm.errors import UserError
from s2srm.ppo.kl import KLController

Share = Annotated[float, Bounds(0, below=1)]


@dataclass(frozen=True)
class Group:
    """A group."""

    rate: PositiveFloat = 1.0
    """Rate."""
    shares: tuple[Share, Share] = (0.5, 0.25)
    """Shares."""


@dataclass(frozen=True)
class Settings:
    """Every kind of annotation that a config has."""

    count: PositiveInt | None = None
    """A count."""
    kind: Literal["a", "b"] = "a"
    """A kind."""
    scale: Annotated[float, Bounds(above=0, high=1)] = 1.0
    """A scale."""
    gamma: Annotated[float, Bounds(0, 1)] = 1.0
    """Gamma."""
    many: list[NonNegativeInt] = field(default_factory=list)
    """Many."""
    pairs: dict[str, PositiveInt] = field(default_factory=dict)
    """Pairs."""
    free: float = 0.0
    """Free."""
    group: Group = field(default_factory=Group)
    other: Group | None = None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'"),
        ({"scale": 0.0}, "scale must be greater than 0 and at most 1, got 0.0"),
        ({"scale": 1.5}, "scale must be greater than 0 and at most 1, got 1.5"),
        ({"gamma": 2}, "gamma must lie between 0 and 1, got 2"),
        ({"gamma": math.nan}, "gamma must lie between 0 and 1, got nan"),
        ({"many": [0, 3, -1]}, "many[2] must be at least 0, got -1"),
        ({"pairs": {"x": 1, "y": 0}}, "pairs.y must be at least 1, got 0"),
        ({"group": Group(rate=-1.0)}, "group.rate must be greater than 0, got -1.0"),
        ({"group": Group(rate=math.nan)}, "group.rate must be greater than 0, got nan"),
        (
            {"other": Group(shares=(0.0, 1.0))},
            "other.shares[1] must be at least 0 and less than 1, got 1.0",
        ),
    ],
)
def test_a_value_outside_names_key_rule_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_bounds(Settings(**changes))
    assert str(error.value) == message
    with pytest.raises(UserError) as error:
        check_bounds(Settings(**changes), "outer")
    assert str(error.value) == f"outer.{message}"


def test_values_on_the_bounds_are_inside() -> None:
    check_bounds(Settings())
    check_bounds(Settings(1, "b", 1.0, 0.0, [0], {"x": 1}, math.nan, Group(1e-9, (0.0, 0.99))))
    check_bounds(Settings(gamma=1.0, scale=1e-12, other=Group()))


@pytest.mark.parametrize("cls", [SFTConfig, RMConfig, ScalarRMConfig, PPOConfig])
def test_defaults_are_inside_and_no_number_is_without_bounds(cls: type) -> None:
    """But for the reward of a token that agrees again, which may have either sign."""
    check_bounds(cls())
    found = []

    def look(cfg: Any, key: str) -> None:
        for f in dataclasses.fields(cfg):
            value = getattr(cfg, f.name)
            if dataclasses.is_dataclass(value):
                look(value, f"{key}{f.name}.")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                try:
                    check_bounds(dataclasses.replace(cfg, **{f.name: math.nan}))
                except UserError:
                    continue
                found.append(f"{key}{f.name}")

    look(cls(), "")
    assert set(found) <= {"reward.token.match"}


def test_what_is_built_from_a_part_of_a_config_checks_that_part() -> None:
    with pytest.raises(UserError, match=r"kl\.target must be greater than 0, got 0"):
        KLController(KLConfig(controller="adaptive", target=0.0))
    with pytest.raises(UserError, match=r"data\.limit must be at least 1, got 0"):
        load_prompts(DataConfig(path="nowhere.jsonl", limit=0))


def test_help_shows_the_bounds() -> None:
    text = " ".join(build_parser(Settings, "x", "").format_help().split())
    for shown in (
        "A count. Must be at least 1. (type",
        "A scale. Must be greater than 0 and at most 1. (type",
        "Gamma. Must lie between 0 and 1. (type: float",
        "Shares. Must be at least 0 and less than 1. (type: tuple[float, float]",
        "Many. Must be at least 0. (type",
        "Free. (type",
    ):
        assert shown in text
    # An optional group as well, whose settings have the same help.
    assert text.count("Rate. Must be greater than 0.") >= 1
