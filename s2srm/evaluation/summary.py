"""From judged responses to the numbers of the table: per split and temperature, per policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from s2srm.evaluation.statistics import mean_interval, per_prompt, wins
from s2srm.worlds.base import Judgement


@dataclass(frozen=True)
class Record:
    """One response of one policy, judged."""

    policy: str
    split: str
    temperature: float
    sample: int
    prompt: str
    response: str
    finished: bool
    judgement: Judgement

    def row(self) -> dict[str, Any]:
        """As one line of responses.jsonl."""
        values = asdict(self)
        return values | values.pop("judgement")


def summarise(
    records: Sequence[Record], against: Sequence[str], num_resamples: int
) -> list[dict[str, Any]]:
    """One group per (split, temperature), in order of appearance, each

        {"split", "temperature", "num_prompts", "policies": {name: {
            "score", "agreement", "refusal", "safety", "length", "over_needed", "finished":
                interval | None,
            "win_rate": {other: interval}}}}

    where an interval is {"mean", "low", "high", "n"} over prompts. refusal is over prompts that
    are not harmful, safety over harmful ones, length in words, over_needed is length minus the
    needed length. A win rate is paired by prompt and sample; ties count half.
    """
    groups: dict[tuple[str, float], dict[str, list[Record]]] = {}
    for record in records:
        key = (record.split, record.temperature)
        groups.setdefault(key, {}).setdefault(record.policy, []).append(record)
    summaries: list[dict[str, Any]] = []
    for (split, temperature), by_policy in groups.items():
        first = next(iter(by_policy.values()))
        summaries.append(
            {
                "split": split,
                "temperature": temperature,
                "num_prompts": len({record.prompt for record in first}),
                "policies": {
                    name: _policy(rows, num_resamples)
                    | {"win_rate": _win_rates(name, by_policy, against, num_resamples)}
                    for name, rows in by_policy.items()
                },
            }
        )
    return summaries


def _policy(rows: Sequence[Record], num_resamples: int) -> dict[str, Any]:
    """Intervals of one policy's own numbers."""

    def interval(pairs: list[tuple[str, float]]) -> dict[str, float] | None:
        prompts, values = [p for p, _ in pairs], [v for _, v in pairs]
        found = mean_interval(per_prompt(prompts, values), num_resamples)
        return None if found is None else asdict(found)

    judged = [(row.prompt, row.judgement) for row in rows]
    return {
        "score": interval([(p, j.score) for p, j in judged if j.score is not None]),
        "agreement": interval([(p, j.agreement) for p, j in judged if j.agreement is not None]),
        "refusal": interval([(p, float(j.refused)) for p, j in judged if not j.harmful_prompt]),
        "safety": interval(
            [(p, float(j.safe)) for p, j in judged if j.harmful_prompt and j.safe is not None]
        ),
        "length": interval([(p, float(j.length)) for p, j in judged]),
        "over_needed": interval(
            [
                (p, float(j.length - j.needed_length))
                for p, j in judged
                if j.needed_length is not None
            ]
        ),
        "finished": interval([(row.prompt, float(row.finished)) for row in rows]),
    }


def _win_rates(
    name: str,
    by_policy: dict[str, list[Record]],
    against: Sequence[str],
    num_resamples: int,
) -> dict[str, Any]:
    """Win rate of one policy against each of the others that were asked for."""
    rates: dict[str, Any] = {}
    for other in against:
        if other == name:
            continue
        ours, theirs = _aligned(by_policy[name], by_policy[other])
        scored = [
            (a.prompt, a.judgement.score, b.judgement.score)
            for a, b in zip(ours, theirs, strict=True)
            if a.judgement.score is not None and b.judgement.score is not None
        ]
        won = wins([a for _, a, _ in scored], [b for _, _, b in scored])
        found = mean_interval(per_prompt([p for p, _, _ in scored], won), num_resamples)
        if found is not None:
            rates[other] = asdict(found)
    return rates


def _aligned(ours: list[Record], theirs: list[Record]) -> tuple[list[Record], list[Record]]:
    """Both policies' records; they answer the same prompts in the same order."""
    pairs = zip(ours, theirs, strict=True)
    assert all((a.prompt, a.sample) == (b.prompt, b.sample) for a, b in pairs)
    return ours, theirs
