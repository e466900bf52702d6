"""What a backend of the vocabulary operations computes; everything else is written once in ops/.

An engine knows no loss. It turns a `Head` into row statistics, and per-row upstream gradients of
those statistics (`Upstream`) into the gradients of hidden, weight and bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.noise import Noise

# Blocks of the logits that may be left out of a backward together (see skipping).
SKIP_ROWS = 128
SKIP_COLUMNS = 256

ThreeGradients = tuple[Tensor, Tensor, Tensor]
"""d_hidden (N, D) with zeros in ignored rows, d_weight (V, D), d_bias (V,); each (0,) where it is
not needed (no bias included)."""


# exp(-1000) is 0 in float32 and float64, and 0 * -1000 is 0 where 0 * -inf would be NaN: a logit
# of -inf (a suppressed token) has no mass, no entropy and no gradient.
FLOOR = -1000.0


def widened(rows: Tensor) -> Tensor:
    """In float64 where the device has it: of a value for each row, which costs nothing."""
    return rows if rows.device.type == "mps" else rows.double()


class Packed:
    """The columns of `Engine.statistics`'s result, and their number."""

    maximum = 0
    rest = 1
    weighted_shift = 2
    shift = 3
    target_logit = 4
    argmax = 5
    above = 6
    width = 7


class Wanted(NamedTuple):
    """Which statistics are read beside log p(target), lse and, where thresholds are given, `above`.

    Of the others an engine may leave out what it likes: their fields are unspecified, but finite.
    maximum: max_logit and argmax. entropy: expected_shift. mean: mean_shift.
    """

    maximum: bool = True
    entropy: bool = True
    mean: bool = True


ALL = Wanted()


class RowStatistics(NamedTuple):
    """(R,) each, in the compute dtype; argmax, an id of the whole vocabulary, and above int64.

    log_sum is lse - max_logit, log_sum_low what rounding took from it; expected_shift is E_p[z -
    max_logit]; mean_shift is the plain mean over the vocabulary of z - max_logit; above counts the
    logits greater than the target's, where that was asked for. What is read off them is rounded
    once.
    """

    max_logit: Tensor
    log_sum: Tensor
    expected_shift: Tensor
    mean_shift: Tensor
    target_logit: Tensor
    argmax: Tensor
    above: Tensor
    log_sum_low: Tensor

    @property
    def logprobs(self) -> Tensor:
        """log p(target), never above 0."""
        return self.logprobs_at(self.target_logit[:, None]).squeeze(1)

    def logprobs_at(self, logits: Tensor) -> Tensor:
        """(R, K) logits of the rows -> their log p."""
        below = widened(logits) - self.max_logit[:, None]
        return (below - self._log_sum()[:, None]).to(self.log_sum.dtype)

    @property
    def entropy(self) -> Tensor:
        """-sum p log p, nats."""
        return (self._log_sum() - self.expected_shift).to(self.log_sum.dtype)

    @property
    def lse(self) -> Tensor:
        """log sum e^z."""
        return (widened(self.max_logit) + self._log_sum()).to(self.log_sum.dtype)

    @property
    def mean_logprob(self) -> Tensor:
        """Mean over the vocabulary of log p."""
        return (self.mean_shift - self._log_sum()).to(self.log_sum.dtype)

    def _log_sum(self) -> Tensor:
        return widened(self.log_sum) + self.log_sum_low


class Upstream(NamedTuple):
    """(R,) upstream gradient of each row statistic, in the compute dtype; None is zero."""

    logprobs: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logprob: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Upstream:
        """function of every field that is not None."""
        entropy, lse, mean_logprob = (None if t is None else function(t) for t in self[1:])
        return Upstream(function(self.logprobs), entropy, lse, mean_logprob)


class Entries(NamedTuple):
    """Gradients dz of single logits that are known already: (R, K) columns, -1 where there is no
    such column on this rank, and values in the compute dtype. Of a column that stands twice in a
    row both values are the same."""

    columns: Tensor
    values: Tensor


class Draws(NamedTuple):
    """What `Engine.sample` found among this rank's columns.

    perturbed (R,): the largest perturbed logit, compute dtype, -inf where all are suppressed.
    columns (R,) int64: where it is, of equal ones the lowest.
    packed (R, 7): the bits of `statistics` with these columns for targets; None where they are not
    to be had in the same pass.
    """

    perturbed: Tensor
    columns: Tensor
    packed: Tensor | None


UpstreamOf = Callable[[RowStatistics, slice], Upstream]


class Engine(Protocol):
    """R live rows, V columns of this rank, T = ceil(V / SKIP_COLUMNS) tiles of columns."""

    def target_logits(self, head: Head, columns: Tensor | None = None) -> Tensor:
        """(R,) compute dtype: each row's logit at its target, -inf where another rank owns it.

        With columns (R, K), -1 for none: (R, K) logits at those.

        The same bits as the same logit inside `statistics`, so that ties are told from maxima.
        """
        ...

    def statistics(
        self,
        head: Head,
        target_logits: Tensor | None,
        tiles: bool,
        wanted: Wanted = ALL,
    ) -> tuple[Tensor, Tensor | None]:
        """(R, Packed.width) statistics over this rank's columns in the compute dtype: one product.

        The columns of `Packed`: the maximum, no lower than finfo.min; rest, sum e^(z-max) without
        the maximum's own term; weighted_shift, the sum of e^(z-max) (z-max) over the same columns,
        where z = -inf adds 0; shift, sum (z-max) over all columns; the target's logit, -inf if not
        owned; argmax, the column of the maximum, of equal ones the lowest; above, the number of
        columns with z > target_logits[row], which may be another rank's, 0 where target_logits is
        None. Numbers of columns are exact up to 2**24.

        With `tiles` also (R, T): log-sum-exp of every tile of columns.
        """
        ...

    def sample(self, head: Head, noise: Noise | None, suppressed: Tensor | None) -> Draws:
        """The largest perturbed logit z + noise of every row: one product, as in `statistics`.

        noise: of the ids of the whole vocabulary, None for none. suppressed (V,) bool: columns that
        are not drawn; they count in the statistics.
        """
        ...

    def gradients_in_forward(
        self, hidden: Tensor, weight: Tensor, workspace_bytes: int | None
    ) -> bool:
        """Whether `statistics_with_gradients` fits the workspace; None is the engine's own bound.

        Decided by shapes and dtypes alone.
        """
        ...

    def statistics_with_gradients(
        self,
        head: Head,
        upstream_of: UpstreamOf,
        needs: Sequence[bool],
        workspace_bytes: int | None,
        wanted: Wanted = ALL,
        proportional: bool = False,
    ) -> tuple[RowStatistics, ThreeGradients]:
        """Both from the same logits, chunk by chunk: three products, on one rank.

        upstream_of(statistics of the chunk's rows, slice of the live rows) gives the chunk's
        upstream gradients; proportional: of log p(target) and lse alone, so that dz is
        proportional to p but for the target's entry, whatever their values. Where neither maximum
        nor mean is wanted, max_logit may be any reference that log_sum and expected_shift are
        relative to. Gradients in the compute dtype or in `kept_dtype`.
        """
        ...

    def gradients(
        self,
        head: Head,
        statistics: RowStatistics,
        upstream: Upstream,
        needs: Sequence[bool],
        live: Tensor | None,
        entries: Entries | None = None,
    ) -> ThreeGradients:
        """The logits made again, with the merged statistics: up to three products.

        live: (>= ceil(R / SKIP_ROWS), T) bool; a block where it is False adds nothing to any
        gradient and need not be computed. entries stand in place of what the formula of `backward`
        gives for them; their blocks are live. Gradients in the inputs' dtype, rounded once; with a
        group d_hidden is this rank's share alone, in the compute dtype.
        """
        ...

    def scale_(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        """Multiply gradients in the inputs' dtype in place by a 0-d factor; nothing to do by 1."""
        ...
