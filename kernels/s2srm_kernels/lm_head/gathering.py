"""Weights that are sharded for the optimiser's sake (FSDP2, any DTensor): gathered for the call.

Every rank passes its own rows and the same DTensor. The whole weight is gathered, and its gradient,
one rank's share of the sum over the ranks, is summed back into the weight's placement: reduced and
scattered to Shard, reduced to Replicate. It comes back as a DTensor of that placement. The sum is
not divided by the number of ranks: a loss is divided by a count over all of them (`normalizer`), or
the caller divides.

Left out: a DTensor that is split over the vocabulary for tensor parallelism, whose ranks pass the
same rows; its local slice and `vocab_group` do that without gathering anything.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from typing import Any, cast

from torch import Tensor


def gather_head(
    weight: Tensor, bias: Tensor | None, group: str | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias whole on this rank; the identity for plain tensors."""
    return _gathered("weight", weight, group), None if bias is None else _gathered(
        "bias", bias, group
    )


def _gathered(name: str, tensor: Any, group: str | None) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return cast(Tensor, tensor)
    if group is not None:
        raise ValueError(
            f"{name} is a DTensor: with vocab_group (process_group=) pass {name}.to_local(), this "
            f"rank's slice of the vocabulary, or without it {name}, or {name}.full_tensor()"
        )
    from torch.distributed.tensor import Partial

    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name} is a DTensor with a Partial placement, {tensor.placements}: redistribute it"
        )
    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
