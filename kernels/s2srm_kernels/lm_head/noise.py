"""Gumbel noise that is a function of (seed, position, id): the same bits on every backend.

Adding it to the logits z and taking the maximum draws from softmax(z) (Gumbel-max: Gumbel 1954,
Maddison et al., arXiv 1411.0030). The integers are Philox-4x32-10 (Salmon, Moraes, Dror and Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    key        the seed's low and high 32 bits
    counter    (16 * (id // 64) + id % 16, the position's low and high 32 bits, 0)
    word       number id % 64 // 16 of the four, so that neighbours in a vector are neighbours here
    k          its upper 31 bits;  w = (k + 1/2) / 2^31;  noise = -log(-log(1 - w))

What follows the integers is float32 arithmetic of additions and multiplications in one order, none
of them fused: csrc/ and triton/ repeat it operation by operation, and the noise agrees to the last
bit. w is never rounded to 0 or 1: k counts from the end that is nearer. Noise lies in [-3.1, 22.2],
and an id whose probability is below 2^-32 is drawn too seldom.

Left out: any state. A draw can be repeated, and made in any order or batch.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Ids that share 16 counters, and these counters.
BLOCK_IDS = 64
BLOCK_COUNTERS = 16

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_QUARTER, _LARGEST = 2**29, 2**31 - 1
_SQRT_HALF_BITS, _ONE_BITS, _MANTISSA = 0x3F3504F3, 0x3F800000, 0x7FFFFF
# log(1 + f) / f^3 for f in [sqrt(1/2) - 1, sqrt(2) - 1], after its first two terms, and log(2) in
# two parts: Cephes' logf.
_SERIES = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_LN2 = (0.693359375, -2.12194440e-4)


class Noise(NamedTuple):
    """(R,) int64 each: what a row's noise is keyed by, beside the id."""

    seeds: Tensor
    positions: Tensor


def gumbel(noise: Noise, first_id: int, num_ids: int) -> Tensor:
    """(R, num_ids) float32 standard Gumbel noise of the ids from first_id on."""
    seeds, positions = (part[:, None] for part in noise)
    first_block, last_block = first_id // BLOCK_IDS, -(-(first_id + num_ids) // BLOCK_IDS)
    counters = torch.arange(
        first_block * BLOCK_COUNTERS, last_block * BLOCK_COUNTERS, device=seeds.device
    )[None, :]
    halves = (positions & _LOW, (positions >> 32) & _LOW)
    words = philox(
        (counters, *halves, torch.zeros_like(counters)), (seeds & _LOW, (seeds >> 32) & _LOW)
    )
    by_block = torch.stack([w.unflatten(1, (-1, BLOCK_COUNTERS)) for w in words], dim=2)
    skipped = first_id - first_block * BLOCK_IDS
    return gumbel_of_words(by_block.flatten(1)[:, skipped : skipped + num_ids])


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of counters and keys that broadcast: int64 with values below 2^32."""
    a, b, c, d = counter
    first, second = key
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(a, _MULTIPLIERS[0])
        high_c, low_c = _multiply(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = (first + _INCREMENTS[0]) & _LOW, (second + _INCREMENTS[1]) & _LOW
    return a, b, c, d


def gumbel_of_words(words: Tensor) -> Tensor:
    """32-bit words, as int64 -> float32 noise."""
    k = words >> 1
    from_zero = (k.float() + 0.5) * 2.0**-31
    from_one = ((_LARGEST - k).float() + 0.5) * 2.0**-31
    fraction, exponent = _split(from_one)
    near_zero = k < _QUARTER
    fraction = torch.where(near_zero, -from_zero, fraction)
    exponential = -_log(fraction, exponent.masked_fill(near_zero, 0.0))
    return -_log(*_split(exponential))


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * factor, which int64 would not hold."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x > 0 as (1 + fraction) * 2^exponent with 1 + fraction in [sqrt(1/2), sqrt(2))."""
    bits = x.view(torch.int32) + (_ONE_BITS - _SQRT_HALF_BITS)
    exponent = ((bits >> 23) - 127).float()
    return ((bits & _MANTISSA) + _SQRT_HALF_BITS).view(torch.float32) - 1.0, exponent


def _log(fraction: Tensor, exponent: Tensor) -> Tensor:
    square = fraction * fraction
    series = torch.full_like(fraction, _SERIES[0])
    for coefficient in _SERIES[1:]:
        series = series * fraction + coefficient
    rest = series * fraction * square + exponent * _LN2[1]
    return (fraction + (rest - square * 0.5)) + exponent * _LN2[0]
