"""The rows-first order of the engine, a chunk of rows at a time: statistics, dz, its products."""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2srm_kernels.checks import kept_dtype
from s2srm_kernels.lm_head.backward import no_gradients
from s2srm_kernels.lm_head.engine import (
    FLOOR,
    RowStatistics,
    ThreeGradients,
    Upstream,
    UpstreamOf,
    Wanted,
)
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.statistics import merge
from s2srm_kernels.triton import launch, launch_backward
from s2srm_kernels.triton.launch import Storage
from s2srm_kernels.triton.launch_backward import Coefficients
from s2srm_kernels.triton.problem import Problem
from s2srm_kernels.triton.products import product_into


def row_coefficients(head: Head, statistics: RowStatistics, upstream: Upstream) -> Coefficients:
    """(6, R) max, log_sum, a, b, c and the target's entry of every row's dz (see backward).

    A target on another rank has an entry too, which no column asks for.
    """
    target_logp = statistics.logprobs
    others = torch.zeros_like(upstream.logprobs)
    constant, slope = others, others
    if upstream.lse is not None:
        others = others + upstream.lse
    if upstream.mean_logprob is not None:
        others = others - upstream.mean_logprob
        constant = upstream.mean_logprob / head.shard.num_total
    linear = others - upstream.logprobs
    if upstream.entropy is not None:
        slope, entropy = upstream.entropy, statistics.entropy
        linear = linear - slope * entropy
        others = others - slope * (target_logp.clamp(min=FLOOR) + entropy)
    at_target = others * target_logp.exp() - upstream.logprobs * target_logp.expm1() + constant
    if head.softcap is not None:
        capped = statistics.target_logit * (head.temperature / head.softcap)
        at_target = at_target * (1 - capped.square())
    dz = torch.stack([linear, slope, constant, at_target]) / head.temperature
    values = torch.cat([torch.stack([statistics.max_logit, statistics.log_sum]), dz])
    return Coefficients(values, upstream.entropy is not None, upstream.mean_logprob is not None)


class LogitGradients(NamedTuple):
    """dz = row_scale[:, None] * matrix of a chunk: (r, V) and (r,), or None where it is 1."""

    matrix: Tensor
    row_scale: Tensor | None


def in_one_pass(
    problem: Problem,
    rows: slice,
    targets: Tensor,
    upstream_of: UpstreamOf,
    wanted: Wanted,
    storage: Storage,
) -> tuple[RowStatistics, LogitGradients]:
    """Exponentials relative to the target's logit; only the target's entry is touched again."""
    packed = launch.exponentials(problem, rows, targets, wanted.entropy, storage)
    part = merge(packed, problem.head)
    coefficients = row_coefficients(problem.head, part, upstream_of(part, rows))
    _, log_sum, linear, _, _, at_target = coefficients.values.unbind()
    # Of a row in which all but the target's entry vanish, they come out as this much of that entry.
    least = at_target * 2.0**-24
    linear = torch.where(linear.abs() < least.abs(), least, linear)
    scale = linear * (-log_sum).exp()
    entry = torch.where(scale == 0, 0.0, at_target / scale)
    launch_backward.set_targets(problem, rows, entry, storage.exponentials)
    return part, LogitGradients(storage.exponentials, scale)


def in_two_passes(
    problem: Problem,
    rows: slice,
    targets: Tensor,
    upstream_of: UpstreamOf,
    wanted: Wanted,
    storage: Storage,
) -> tuple[RowStatistics, LogitGradients]:
    """Exponentials relative to the largest logit so far, then dz in their place."""
    packed = launch.statistics(problem, rows, targets, wanted, storage=storage)
    part = merge(packed, problem.head)
    coefficients = row_coefficients(problem.head, part, upstream_of(part, rows))
    launch_backward.stored_gradients(problem, rows, coefficients, storage)
    return part, LogitGradients(storage.exponentials, None)


class Sums:
    """Gradients made chunk by chunk of `step` rows, in the dtype that they are kept in."""

    def __init__(self, problem: Problem, needs: Sequence[bool], step: int) -> None:
        self.problem = problem
        self.dtype = kept_dtype(problem.hidden.dtype)
        self.hidden, self.weight, self.bias = no_gradients(problem.head, needs)
        self.hidden = self.hidden.to(self.dtype)
        if step >= problem.num_rows:
            # One product, which sums in the compute dtype, and one rounding.
            self.weight = self.weight.new_empty(self.weight.shape, dtype=self.dtype)

    def add(self, rows: slice, dz: LogitGradients) -> None:
        """The products of one chunk."""
        problem, (matrix, scale) = self.problem, dz
        hidden, accumulate = problem.hidden[rows], rows.start > 0
        if self.hidden.numel():
            product = problem.empty(matrix.shape[0], hidden.shape[1])
            product_into(matrix, problem.weight, product)
            if scale is not None:
                product *= scale[:, None]
            self.hidden.index_copy_(0, problem.head.rows[rows], product.to(self.dtype))
        if self.weight.numel():
            if scale is not None:
                hidden = (hidden * scale[:, None]).to(hidden.dtype)
            product_into(matrix.t(), hidden, self.weight, accumulate)
        if self.bias.numel():
            if scale is None:
                self.bias += matrix.sum(dim=0, dtype=self.bias.dtype)
            else:
                part = self.bias.new_empty(self.bias.shape[0], 1)
                product_into(matrix.t(), scale[:, None].to(matrix.dtype), part)
                self.bias += part.squeeze(1)

    def result(self) -> ThreeGradients:
        """In the dtype that they are kept in."""
        return self.hidden, self.weight.to(self.dtype), self.bias.to(self.dtype)
