"""Bytes that an engine holds for one model: weights, masters, gradients, moments, buffers.

Every function is arithmetic on numbers of parameters; P is the number of ranks. Sources: the
engines (s2srm/engine), and DeepSpeed 0.19 (runtime/zero/stage3.py and stage_1_and_2.py) by the name
of what allocates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from s2srm.engine.deepspeed_engine import REDUCE_BUCKET_ELEMENTS

FLOAT32 = 4
MOMENTS = {"adamw": 2, "sgd": 0}
"""float32 numbers that an optimiser keeps for each parameter."""


@dataclass(frozen=True)
class Holding:
    """Bytes on the device of one rank, from the second optimiser step on.

    weights            what the forward computes with (its partition under ZeRO-3)
    master             float32 copies that the optimiser trains
    optimiser          moments
    gradients_held     buffers that stay between steps
    gradients          all that is accumulated when the optimiser steps, gradients_held included
    step               temporaries of the optimiser's step
    buckets            buffers for collectives that stay between steps
    reduction          temporaries of a collective over gradients
    live               whole parameters under ZeRO-3 during a pass
    whole              all parameters, where a rollout gathers them
    host               of the above, what lies in the host's memory instead, pinned
    buffers_sleep      whether gradients_held and buckets wait too where engine.offload is idle
    """

    weights: float = 0
    master: float = 0
    optimiser: float = 0
    gradients_held: float = 0
    gradients: float = 0
    step: float = 0
    buckets: float = 0
    reduction: float = 0
    live: float = 0
    whole: float = 0
    host: float = 0
    buffers_sleep: bool = False


@dataclass(frozen=True)
class ZeroSizes:
    """DeepSpeed's settings of sizes, in elements; all but the bucket are its own defaults. The
    bucket is never larger than the model."""

    reduce_bucket: int = REDUCE_BUCKET_ELEMENTS
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000


@dataclass(frozen=True)
class Trainee:
    """A model as an engine sees it: elements held and trained, the largest tensor, bytes of one.

    optimizer: None where it is frozen.
    """

    held: int
    trained: int
    largest: int
    layer: int
    small: int
    itemsize: int
    optimizer: Literal["adamw", "sgd"] | None


def torch_engine(model: Trainee) -> Holding:
    """TorchEngine: everything whole.

    float32: 4 weights + 4 gradients + 8 moments bytes a parameter; bfloat16: 2 + 4 masters + 4 + 8,
    a gradient in bfloat16 living only until it is added to its master's. Fused optimisers need no
    temporaries.
    """
    weights = model.held * model.itemsize
    if model.optimizer is None:
        return Holding(weights=weights)
    narrow = model.itemsize < FLOAT32
    return Holding(
        weights=weights,
        master=model.trained * FLOAT32 if narrow else 0,
        optimiser=model.trained * FLOAT32 * MOMENTS[model.optimizer],
        gradients=model.trained * max(FLOAT32, model.itemsize),
    )


def zero_engine(model: Trainee, stage: int, ranks: int, offload: bool, sizes: ZeroSizes) -> Holding:
    """DeepSpeedEngine."""
    if stage == 3:
        return _zero_3(model, ranks, offload, sizes)
    if model.optimizer is None or stage == 0:
        # Frozen models are TorchEngine's below ZeRO-3, and ZeRO-0 reduces whole gradients.
        bucket = min(sizes.reduce_bucket, model.trained) * FLOAT32
        return replace(torch_engine(model), reduction=bucket)
    return _zero_12(model, stage, ranks, sizes)


def _zero_3(model: Trainee, ranks: int, offload: bool, sizes: ZeroSizes) -> Holding:
    """Partitions of weights (lp_param_buffer), of masters, which are a copy in float32 too
    (fp32_partitioned_groups_flat), of gradients (grad_partitions_flat_buffer, float32 by
    grad_accum_dtype) and of moments, each 1/P; one sub-group's gradients again in the step.

    The bucket (ipg_buckets, in the weights' type) collects gradients until it is full;
    reduce_scatter_coalesced then copies it. Live: parameters stay whole while fewer than max_live
    are and the next use is nearer than max_reuse; one layer is gathered beyond that, and the
    prefetch bucket. Tensors below the persistence threshold are whole always.
    """
    small = model.small * model.itemsize
    weights = model.held * model.itemsize / ranks + small * (ranks > 1)
    reach = min(sizes.max_live, sizes.max_reuse) + model.layer + sizes.prefetch_bucket
    whole = model.held * model.itemsize
    live = min(model.held, reach) * model.itemsize
    if model.optimizer is None:
        return Holding(
            weights=small if offload else weights,
            live=live,
            whole=whole,
            host=weights - small if offload else 0,
        )
    part = model.trained * FLOAT32 / ranks
    moments = part * MOMENTS[model.optimizer]
    sub_group = min(model.trained / ranks, sizes.sub_group)
    bucket = min(sizes.reduce_bucket, model.trained) * model.itemsize
    return Holding(
        weights=weights,
        master=0 if offload else part,
        optimiser=0 if offload else moments,
        gradients_held=0 if offload else part,
        gradients=0 if offload else part,
        step=0 if offload else sub_group * FLOAT32,
        buckets=bucket,
        reduction=bucket,
        live=live,
        whole=whole,
        host=3 * part + moments if offload else 0,
        buffers_sleep=True,
    )


def _zero_12(model: Trainee, stage: int, ranks: int, sizes: ZeroSizes) -> Holding:
    """Whole weights; masters (single_partition_of_fp32_groups, a copy in float32 too) and moments
    1/P; float32 gradients whole until the step in stage 1, 1/P (averaged_gradients) in stage 2.
    The bucket is in the weights' type."""
    part = model.trained * FLOAT32 / ranks
    used = min(sizes.reduce_bucket, model.trained)
    gradients = model.trained * FLOAT32 if stage == 1 else part
    return Holding(
        weights=model.held * model.itemsize,
        master=part,
        optimiser=part * MOMENTS[model.optimizer or "sgd"],
        gradients=gradients,
        step=part,
        buckets=used * model.itemsize,
        reduction=used * model.itemsize,
    )
