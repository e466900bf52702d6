"""The LM head on live rows, in bounded memory: the part that all vocabulary operations share.

    z = (hidden @ weight.T + bias);  z = softcap * tanh(z / softcap);  z = z / temperature

in at least float32. Rows with ignore_index are dropped before anything is read. The rest are taken
in chunks of at most max(TILE * V, 2**24) logits, and every product inside a chunk is made from
tiles of exactly TILE rows, the last one padded with zeros: a BLAS picks its order of summation by
the shape of the product, so a fixed shape is what gives a row the same bits in any batch (with
the same number of threads).

Left out: tiling over the vocabulary. The upcast weight is held whole for the length of the call.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from s2srm_kernels._checks import compute_dtype
from s2srm_kernels._shards import Shard, find_shard

TILE = 128
_CHUNK_ELEMENTS = 2**24


def live_rows(target: Tensor, ignore_index: int, num_classes: int) -> Tensor:
    """(R,) int64: the rows whose target is not ignore_index, ascending.

    ValueError for a live target outside [0, num_classes), naming the first such row. On CUDA this
    is the one synchronisation of an operator: the counts come over in a single transfer.
    """
    if target.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=target.device)
    live = target != ignore_index
    bad = live & ((target < 0) | (target >= num_classes))
    counts: list[int] = torch.stack([live.sum(), bad.sum(), bad.byte().argmax()]).tolist()
    num_live, num_bad, row = counts
    if num_bad:
        raise ValueError(
            f"target[{row}] is {int(target[row])}: neither in [0, {num_classes}) nor "
            f"ignore_index {ignore_index}"
        )
    return torch.nonzero_static(live, size=num_live).squeeze(1)


class Head:
    """One call's live rows, weight and options. R live rows, V columns on this rank."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        softcap: float | None,
        temperature: float,
        ignore_index: int,
        group: str | None,
    ) -> None:
        self.hidden = hidden
        self.dtype = compute_dtype(hidden)
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.softcap = softcap
        self.temperature = temperature
        self.shard: Shard = find_shard(group, weight.shape[0], weight.device)
        self.rows = live_rows(target, ignore_index, self.shard.num_total)
        self.target = target[self.rows].long()

    @property
    def num_live(self) -> int:
        """R."""
        return self.rows.shape[0]

    def chunks(self) -> Iterator[slice]:
        """Consecutive slices of the live rows."""
        step = max(1, _CHUNK_ELEMENTS // self.weight.shape[0] // TILE) * TILE
        for start in range(0, self.num_live, step):
            yield slice(start, min(start + step, self.num_live))

    def live_hidden(self, chunk: slice) -> Tensor:
        """(P, D): the chunk's rows of hidden, padded with zero rows to a multiple of TILE."""
        return pad_rows(self.hidden[self.rows[chunk]].to(self.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """(P, D) padded rows -> (P, V) logits in a fresh buffer."""
        z = matmul_tiles(hidden, self.weight.t())
        if self.bias is not None:
            z += self.bias
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z /= self.temperature
        return z

    def local_target(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """(P,) column of each target on this rank, 0 where another rank owns it; (P,) owned."""
        column = pad_rows(self.target[chunk]) - self.shard.offset
        owned = (column >= 0) & (column < self.shard.num_local)
        return column.where(owned, 0), owned

    def live(self, values: Tensor | None) -> Tensor | None:
        """(N,) -> (R,) values of the live rows; the others are never read."""
        return None if values is None else values[self.rows].to(self.dtype)

    def scatter(self, values: Tensor) -> Tensor:
        """(R, ...) -> (N, ...), zeros in ignored rows."""
        full = values.new_zeros((self.hidden.shape[0], *values.shape[1:]))
        return full.index_copy_(0, self.rows, values)


def pad_rows(values: Tensor, fill: float = 0) -> Tensor:
    """Rows of `fill` appended up to a multiple of TILE."""
    missing = -values.shape[0] % TILE
    if missing == 0:
        return values
    return torch.cat([values, values.new_full((missing, *values.shape[1:]), fill)])


def matmul_tiles(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, TILE rows at a time."""
    product = left.new_empty((left.shape[0], right.shape[1]))
    for start in range(0, left.shape[0], TILE):
        tile = slice(start, start + TILE)
        torch.mm(left[tile], right, out=product[tile])
    return product
