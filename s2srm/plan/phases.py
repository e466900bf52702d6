"""Bytes of one rank by phase and kind, added up from holdings, passes and workspaces.

A phase has moments (the passes of a model, its optimiser's step); a phase takes what its largest
moment takes. Everything is as from the second optimiser step on, when moments exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from s2srm.plan.states import Holding

Kind = Literal[
    "weights",
    "master weights",
    "gradients",
    "optimiser",
    "activations",
    "KV cache",
    "gathered policy",
    "ZeRO live parameters",
    "buckets",
    "head workspace",
    "libraries",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
Bytes = Mapping[Kind, float]


@dataclass(frozen=True)
class Moment:
    """What a rank holds at some point of a phase."""

    phase: str
    what: str
    bytes: Bytes

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Head:
    """Bytes that a loss's head and the embedding take in a backward.

    workspace  chunks of logits
    gradient   of the head's weight, float32, while it is summed and until it is accumulated
    embedding  the dense gradient that the embedding's backward makes
    """

    workspace: float = 0.0
    gradient: float = 0.0
    embedding: float = 0.0
    is_tied: bool = False


def add(*parts: Bytes) -> dict[Kind, float]:
    """Kind by kind; kinds that nobody has are left out."""
    found: dict[Kind, float] = {
        kind: float(sum(part.get(kind, 0.0) for part in parts)) for kind in KINDS
    }
    return {kind: value for kind, value in found.items() if value > 0}


Awake = Literal["all", "weights", "nothing"]
"""What of a model is on the device; the rest waits in host memory (s2srm/engine/sleep.py)."""


def at_rest(holding: Holding, awake: Awake = "all") -> Bytes:
    """Between steps."""
    buffers = awake == "all" or not holding.buffers_sleep
    found: dict[Kind, float] = {}
    if awake != "nothing":
        found["weights"] = holding.weights
    if awake == "all":
        found |= {"master weights": holding.master, "optimiser": holding.optimiser}
    if buffers:
        found |= {"gradients": holding.gradients_held, "buckets": holding.buckets}
    return found


def forward(holding: Holding, activations: float, head: float = 0.0) -> Bytes:
    """Beside `at_rest`, in a pass without gradients."""
    return {
        "activations": activations,
        "head workspace": head,
        "ZeRO live parameters": holding.live,
    }


def training_moments(
    name: str,
    holding: Holding,
    resting: Bytes,
    activations: float,
    head: Head,
    num_microbatches: int,
) -> Iterable[Moment]:
    """Of a minibatch's update of one model, the others resting.

    With one micro-batch gradients grow while activations are freed, and the larger of the two
    counts; with more, the second begins with all gradients there. The gradient of a head that is
    tied to the embedding waits for the embedding's own, through all the layers' backward. A
    reduction's temporaries fall where a bucket is full: at the end of the backward, or in between
    where the bucket is smaller than the model.
    """
    gradients = holding.gradients - holding.gradients_held
    before = gradients if num_microbatches > 1 else 0.0
    yield Moment(
        name,
        "forward and backward",
        add(
            resting,
            forward(holding, activations, head.workspace + head.gradient),
            {"gradients": before},
        ),
    )
    yield Moment(
        name,
        "embedding's gradient",
        add(
            resting,
            {
                "gradients": gradients + (head.gradient if head.is_tied else 0) + head.embedding,
                "ZeRO live parameters": holding.live,
            },
        ),
    )
    yield Moment(
        name,
        "gradients reduced",
        add(
            resting,
            {
                "gradients": gradients,
                "buckets": holding.reduction,
                "ZeRO live parameters": holding.live,
            },
        ),
    )
    yield Moment(
        name,
        "optimiser step",
        add(resting, {"gradients": gradients + holding.step}),
    )


def largest(moments: Iterable[Moment]) -> Moment:
    """The moment that takes most."""
    return max(moments, key=lambda moment: moment.total)


def by_phase(moments: Iterable[Moment]) -> list[Moment]:
    """The largest moment of every phase, in the order of the phases."""
    found: dict[str, list[Moment]] = {}
    for moment in moments:
        found.setdefault(moment.phase, []).append(moment)
    return [largest(group) for group in found.values()]
