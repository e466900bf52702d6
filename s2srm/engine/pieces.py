"""What this rank holds of a trained model: pieces of float32 weights and their optimiser's state.

Plain torch and ZeRO-0 hold every parameter whole; ZeRO-1 and 2 cut the flattened row of all
parameters, ZeRO-3 every parameter for itself. In each case the optimiser knows a tensor, whole or
flat, and a piece is a range of it. Weights in bfloat16 are always the rounded masters, so that
masters and moments are all there is to save.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2srm import distributed


@dataclass(frozen=True)
class Piece:
    """Elements start, start + 1, ... of one trained parameter, flattened.

    name, shape  of the whole parameter
    count        number of elements of the piece
    key, offset  the tensor that the optimiser trains, and where in it, flattened, the piece begins
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    key: Tensor
    offset: int

    @property
    def weight(self) -> Tensor:
        """(count,) view of the master weights: what is written into it changes them."""
        return self.part_of(self.key)

    def part_of(self, tensor: Tensor) -> Tensor:
        """(count,) view of the piece's part of a tensor shaped like `key`: Adam's exp_avg, say."""
        assert tensor.is_contiguous(), "a copy would be filled instead of the tensor"
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters by name, tied ones once."""
    return ((n, p) for n, p in module.named_parameters() if p.requires_grad)


def whole_pieces(module: nn.Module, masters: Iterable[tuple[Tensor, Tensor]] = ()) -> list[Piece]:
    """Of unsharded parameters. masters: (weight, its float32 copy) where the copy is trained."""
    master_of = {id(weight): master for weight, master in masters}
    return [
        Piece(name, tuple(p.shape), 0, p.numel(), master_of.get(id(p), p), 0)
        for name, p in trained(module)
    ]


def zero_12_pieces(module: nn.Module, flat_partitions: Sequence[Tensor]) -> list[Piece]:
    """Of DeepSpeed's ZeRO-1 and 2: fragments of parameters in this rank's flat partitions."""
    found: list[Piece] = []
    for name, parameter in trained(module):
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue  # Other ranks train this parameter.
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = flat_partitions[mapping.param_group_index]
        shape = tuple(parameter.shape)
        found.append(Piece(name, shape, here.start, here.numel, flat, there.start))
    return found


def zero_3_pieces(module: nn.Module, optimizer: Any) -> list[Piece]:
    """Of DeepSpeed's ZeRO-3 optimizer: this rank's partition of every parameter, padding left out.

    optimizer: DeepSpeed's own around torch's.
    """
    found: list[Piece] = []
    for name, parameter in trained(module):
        sharded: Any = parameter
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = distributed.rank() * size
        count = max(0, min(size, sharded.ds_numel - start))
        if count > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            found.append(Piece(name, tuple(sharded.ds_shape), start, count, flat, offset))
    return found


def optimiser_state(optimizer: torch.optim.Optimizer, piece: Piece) -> dict[str, Tensor]:
    """Views of the piece's part of every moment, and `step` (1,); empty before the first step."""
    state: Mapping[str, Any] = optimizer.state.get(piece.key, {})
    found: dict[str, Tensor] = {}
    for kind, value in state.items():
        if kind == "step":
            found[kind] = torch.as_tensor(value, dtype=torch.float32).reshape(1)
        elif isinstance(value, Tensor):
            found[kind] = piece.part_of(value)
    return found


def start_state(optimizer: torch.optim.Optimizer, key: Tensor, kinds: Iterable[str]) -> None:
    """Give a tensor the state that torch's optimisers make in their first step, all zero."""
    on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    step = torch.zeros((), device=key.device if on_device else "cpu")
    moments = {kind: torch.zeros_like(key, requires_grad=False) for kind in kinds if kind != "step"}
    optimizer.state[key] = {"step": step, **moments}
