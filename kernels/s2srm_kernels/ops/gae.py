"""Generalised advantage estimation over packed sequences.

    delta_t = r_t + gamma * V_{t+1} - V_t,   V_{T+1} = bootstrap
    A_t = delta_t + gamma * lam * A_{t+1},   A_{T+1} = 0;          returns = A + V

The recursion is a scan with a constant decay, made by doubling: after pass k every A_t holds the
terms of the next 2^k steps, so log2(longest) passes over all rows at once. Source: arXiv
1506.02438, equation 16; the scan by doubling is Hillis and Steele's (CACM 1986).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2srm_kernels.checks import (
    check_device,
    check_floating,
    check_rows,
    check_tensors,
    compute_dtype,
)
from s2srm_kernels.cu_seqlens import check_cu_seqlens_shape, find_segments
from s2srm_kernels.dispatch import define, schema_of, select
from s2srm_kernels.options import Number, pack_options, unpack_options

_NAME = "gae"


class Advantages(NamedTuple):
    """(N,) each, float32 (float64 if rewards, values or bootstrap are)."""

    advantages: Tensor
    returns: Tensor


def _reference(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    options: Tensor,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gamma, lam = unpack_options(options, "gamma", "lam")
    num_rows = rewards.shape[0]
    segments = find_segments(cu_seqlens, num_rows)
    dtype = _result_dtype(rewards, values, bootstrap)
    rewards, values = rewards.to(dtype), values.to(dtype)
    ends = values.new_zeros(segments.end.shape) if bootstrap is None else bootstrap.to(dtype)
    num_after = segments.end[segments.sequence] - 1 - segments.position
    next_values = values.roll(-1).where(num_after > 0, ends[segments.sequence])
    advantages = rewards + gamma * next_values - values
    decay, step = gamma * lam, 1
    while step < segments.longest:
        reach = (advantages[step:] * decay).where(num_after[:-step] >= step, 0)
        advantages = torch.cat([advantages[:-step] + reach, advantages[-step:]])
        decay, step = decay * decay, step * 2
    return advantages, advantages + values


def _result_dtype(rewards: Tensor, values: Tensor, bootstrap: Tensor | None) -> torch.dtype:
    return compute_dtype(rewards, values, rewards if bootstrap is None else bootstrap)


def _fake(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, options: Tensor, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(rewards, values, bootstrap)
    return (
        rewards.new_empty(rewards.shape, dtype=dtype),
        rewards.new_empty(rewards.shape, dtype=dtype),
    )


define(_NAME, schema_of(_reference), _fake, reference=_reference)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: Number = 1.0,
    lam: Number = 0.95,
    bootstrap: Tensor | None = None,
    impl: str = "auto",
) -> Advantages:
    """Advantages and returns (advantages + values) of packed sequences.

    rewards, values (N,) floating; cu_seqlens (B + 1,) int32 or int64, sequences may be empty;
    bootstrap (B,) floating: the value after each sequence's last row, 0 by default (a sequence that
    ended); gamma and lam in [0, 1]. Nothing is differentiable: the inputs are detached. Float32 at
    least. A row's value is decided by its own sequence alone. Its bits are too with cpp on the CPU;
    the reference's depend on the longest sequence, and on CUDA on the row's place in the batch.
    Every backend gives the same bits for the same call.

    ValueError: a bad shape, dtype, device, option, an `impl` that is not available, or cu_seqlens
    that do not start at 0, ascend and end at N (checked in the operator: one synchronisation on
    CUDA).
    """
    check_tensors(_NAME, rewards=rewards, values=values, cu_seqlens=cu_seqlens, bootstrap=bootstrap)
    options = pack_options(gamma=gamma, lam=lam)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (N,), got {tuple(rewards.shape)}")
    check_floating("rewards", rewards)
    check_rows("values", values, rewards, "rewards")
    check_floating("values", values)
    check_cu_seqlens_shape(cu_seqlens, rewards, "rewards")
    if bootstrap is not None:
        if bootstrap.shape != (cu_seqlens.shape[0] - 1,):
            raise ValueError(
                f"bootstrap must have shape ({cu_seqlens.shape[0] - 1},), one value for each "
                f"sequence, got {tuple(bootstrap.shape)}"
            )
        check_floating("bootstrap", bootstrap)
        check_device("bootstrap", bootstrap, rewards, "rewards")
        bootstrap = bootstrap.detach()
    op = select(_NAME, impl, rewards.device)
    return Advantages(*op(rewards.detach(), values.detach(), cu_seqlens, options, bootstrap))
