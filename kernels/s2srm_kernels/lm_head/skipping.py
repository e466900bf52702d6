"""Which blocks of a backward may be left out: those whose softmax mass is known to be small.

The forward stores the log-sum-exp of every (row, tile of SKIP_COLUMNS columns), hence the exact
softmax mass of the tile, before any product of the backward. A row may lose its lightest tiles as
long as their mass together is at most `skip_mass`; a block of SKIP_ROWS rows is left out where all
of its rows may lose the tile and none has its target there. With g the row's upstream gradient of
log p(target) alone, the error of its hidden gradient is then

    |error| <= |g| * skipped mass * max_v |W_v|        (norms; softcap's slope is at most 1)

Rows are blocked in the order of the live rows. Source: the idea of skipping is Cut Cross-Entropy's
(arXiv 2411.09009), which looks at the largest |p| of a block instead, after making its logits.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from s2srm_kernels.lm_head.engine import SKIP_COLUMNS, SKIP_ROWS, Engine, RowStatistics, Wanted
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.statistics import row_statistics


@dataclass
class SkipReport:
    """Filled by an operation that is called with skip_mass.

    mass (N,): the softmax mass that the backward leaves out of each row, in its blocks on this
    rank; at most skip_mass, 0 in ignored rows.
    """

    mass: Tensor | None = None


def statistics_and_plan(
    engine: Engine,
    head: Head,
    skip_mass: float | None,
    wanted: Wanted,
    extra_columns: Tensor | None = None,
) -> tuple[RowStatistics, Tensor, Tensor]:
    """(statistics, live blocks, (R,) skipped mass); without skip_mass no plan and zeros.

    extra_columns (R, K): tiles that a row may not lose, beside its target's; -1 for none.
    """
    stats, tile_lse = row_statistics(engine, head, wanted, tiles=skip_mass is not None)
    if tile_lse is None or skip_mass is None:
        no_plan = head.rows.new_empty((0, 0), dtype=torch.bool)
        return stats, no_plan, torch.zeros_like(stats.max_logit)
    columns = head.columns[:, None]
    if extra_columns is not None:
        columns = torch.cat([columns, extra_columns], dim=1)
    return stats, *_plan_blocks(head, columns, tile_lse, stats.lse, skip_mass)


def fake_plan(hidden: Tensor, weight: Tensor, skips: bool) -> Tensor:
    """Shape of the live blocks."""
    shape = (0, 0)
    if skips:
        shape = (-(-hidden.shape[0] // SKIP_ROWS), -(-weight.shape[0] // SKIP_COLUMNS))
    return hidden.new_empty(shape, dtype=torch.bool)


def _plan_blocks(
    head: Head, columns: Tensor, tile_lse: Tensor, lse: Tensor, skip_mass: float
) -> tuple[Tensor, Tensor]:
    """(ceil(N / SKIP_ROWS), T) bool of the blocks to compute, (R,) mass that the rest holds.

    columns (R, K): whose tiles stay, -1 for none.
    tile_lse (R, T) of this rank's tiles, lse (R,) over the whole vocabulary. With a group every
    rank plans for its own slice with its share of skip_mass, and reports its own mass.
    """
    mass = (tile_lse - lse[:, None]).exp()
    if head.shard.group is not None:
        skip_mass = skip_mass / dist.get_world_size(head.shard.group)
    ascending, order = mass.sort(dim=1, stable=True)
    # Sums of the lightest tiles: float64, so that the bound is kept and not nearly kept.
    affordable = ascending.cumsum(dim=1, dtype=torch.float64) <= skip_mass
    skippable = torch.zeros_like(affordable).scatter_(1, order, affordable)
    tiles = columns.clamp(min=0) // SKIP_COLUMNS
    needed = torch.zeros_like(skippable, dtype=torch.int32)
    skippable &= needed.scatter_add_(1, tiles, (columns >= 0).int()) == 0
    num_rows, num_tiles = mass.shape
    num_blocks = -(-head.hidden.shape[0] // SKIP_ROWS)
    padding = num_blocks * SKIP_ROWS - num_rows
    padded = torch.cat([skippable, skippable.new_ones(padding, num_tiles)])
    live = ~padded.view(num_blocks, SKIP_ROWS, num_tiles).all(dim=1)
    dead = ~live.repeat_interleave(SKIP_ROWS, dim=0)[:num_rows]
    return live, mass.masked_fill(~dead, 0).sum(dim=1)
