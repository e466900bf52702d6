"""How long ranks wait for each other where responses stay, and where they are dealt by tokens.

    python -m benchmarks.balance --ranks 2 8 32

Simulated at the recipes' sizes: minibatches of --minibatch responses, prompt and response lengths
log-uniform. For each: tokens of the fullest rank over the mean, mean and worst of the minibatches,
and the least that the lengths allow (the longest sequence of a minibatch bounds it).
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence

from s2srm.balance import deal, max_over_mean


def loads(lengths: Sequence[int], shares: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of every rank."""
    return [sum(lengths[i] for i in share) for share in shares]


def bound(lengths: Sequence[int], num_ranks: int) -> float:
    """Over the mean: the longest sequence, at least 1."""
    return max(1.0, max(lengths) * num_ranks / sum(lengths))


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.balance", description=(__doc__ or "").partition("\n")[0]
    )
    add = made.add_argument
    add("--ranks", nargs="+", type=int, default=[2, 8, 32])
    add("--minibatch", type=int, default=128)
    add("--shortest", type=int, default=8)
    add("--longest", type=int, default=512)
    add("--minibatches", type=int, default=200)
    add("--seed", type=int, default=0)
    options = made.parse_args(arguments)
    low, high = math.log(options.shortest), math.log(options.longest)
    draw = random.Random(options.seed)
    batches = [
        [
            sum(round(math.exp(draw.uniform(low, high))) for _ in range(2))
            for _ in range(options.minibatch)
        ]
        for _ in range(options.minibatches)
    ]
    print("| ranks | responses stay: mean, worst | dealt: mean, worst | least possible, worst |")
    print("| --- | --- | --- | --- |")
    for ranks in options.ranks:
        stay = [max_over_mean([sum(b[r::ranks]) for r in range(ranks)]) for b in batches]
        dealt = [max_over_mean(loads(b, deal(b, ranks))) for b in batches]
        least = max(bound(b, ranks) for b in batches)
        columns = [f"{sum(x) / len(x):.3f}, {max(x):.3f}" for x in (stay, dealt)]
        print(f"| {ranks} | {columns[0]} | {columns[1]} | {least:.3f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
