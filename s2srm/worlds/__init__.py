"""Three miniature generated worlds in which every part of the pipeline can be seen to work.

Each world has a vocabulary, prompts, a noisy writer whose demonstrations make the SFT policy, an
annotator whose preferences carry a bias of stated size, and a programmatic judge that knows the
truth, has no such bias, and trains no method.
"""

from __future__ import annotations

from s2srm.errors import UserError, did_you_mean
from s2srm.worlds.base import SPLITS, Gold, Split, World, WorldSizes
from s2srm.worlds.instructions import InstructionWorld
from s2srm.worlds.safety import SafetyWorld
from s2srm.worlds.summarization import SummarizationWorld

__all__ = [
    "SPLITS",
    "WORLDS",
    "Gold",
    "InstructionWorld",
    "SafetyWorld",
    "Split",
    "SummarizationWorld",
    "World",
    "WorldSizes",
    "get_world",
]

WORLDS: dict[str, type[World]] = {
    SafetyWorld.name: SafetyWorld,
    SummarizationWorld.name: SummarizationWorld,
    InstructionWorld.name: InstructionWorld,
}
"""Name -> class; a class is called without arguments for the world with its stated biases."""


def get_world(name: str) -> World:
    """The world of that name with its default settings; UserError naming the nearest if unknown."""
    if name not in WORLDS:
        near = did_you_mean(name, WORLDS, cutoff=0.3)
        raise UserError(f"unknown world {name!r}{near or '; worlds: ' + ', '.join(WORLDS)}")
    return WORLDS[name]()
