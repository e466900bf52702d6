"""Segments through an engine in packed micro-batches, the results back in the segments' order.

Without gradients: training packs its own micro-batches, which `base.run_microbatches` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s2srm.engine.base import Engine, dummy_batch, map_microbatches
from s2srm.packing import Packed, Segment, pack, rows_of, split_by_budget


class PackedSegments:
    """This rank's segments, packed once; any number of engines may run over them."""

    def __init__(
        self,
        segments: Sequence[Segment],
        groups: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> None:
        """
        segments: this rank's; there may be none.
        groups: the segments (by number) of each micro-batch; every segment in exactly one.
        device: the engines'.
        """
        order = torch.tensor([i for group in groups for i in group], dtype=torch.int64)
        assert order.sort().values.equal(torch.arange(len(segments))), "not every segment once"
        self.batches = [pack([segments[i] for i in group]).to(device) for group in groups]
        """The micro-batches."""
        self._sequences = order.argsort()
        predicted = torch.tensor([0, *(segments[i].num_predicted for i in order.tolist())])
        self._rows = rows_of(predicted.cumsum(0), self._sequences.tolist())

    @classmethod
    def within(
        cls, segments: Sequence[Segment], budget: int, device: torch.device | str
    ) -> PackedSegments:
        """In micro-batches of at most `budget` tokens; a longer segment has its own."""
        return cls(segments, split_by_budget([len(s.tokens) for s in segments], budget), device)

    def map(self, engine: Engine, fn: Callable[[Packed], Sequence[Tensor]]) -> list[Tensor]:
        """fn over all micro-batches, each of its tensors end to end in the segments' order.

        All ranks must call it; those with fewer micro-batches than the others run dummies, and
        fn over one of them where there is no segment at all.

        Args:
            fn: calls the engine once. Each tensor that it gives has an entry along its first
                dimension for every predicted token of the batch, or for every sequence.

        Returns:
            As many tensors as fn gives. Of no segments they are empty, with fn's dtypes.
        """
        if not self.batches:
            (dummy,) = map_microbatches(engine, [dummy_batch(engine.device)], fn)
            return [tensor[:0] for tensor in dummy]
        found = map_microbatches(engine, self.batches, fn)
        return [self._in_order(torch.cat(parts)) for parts in zip(*found, strict=True)]

    def _in_order(self, packed: Tensor) -> Tensor:
        """Entries in the order of the micro-batches, put into the order of the segments."""
        # As many rows as sequences means one row in each: the two orders are the same then.
        per_sequence = packed.shape[0] == self._sequences.numel()
        inverse = self._sequences if per_sequence else self._rows
        assert packed.shape[0] == inverse.numel(), "neither an entry a row nor one a sequence"
        return packed[inverse.to(packed.device)]
