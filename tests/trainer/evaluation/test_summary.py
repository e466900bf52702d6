"""The table's numbers: who is compared with whom, over which prompts."""

from __future__ import annotations

import pytest

from s2srm.evaluation.judging import heuristic_judge, looks_like_refusal
from s2srm.evaluation.summary import Record, summarise
from s2srm.worlds import get_world
from s2srm.worlds.base import Judgement


def record(policy: str, prompt: str, score: float | None, **changes) -> Record:
    values = {
        "refused": False,
        "harmful_prompt": None,
        "safe": None,
        "length": 4,
        "needed_length": 3,
    }
    sample = changes.pop("sample", 0)
    temperature = changes.pop("temperature", 0.0)
    judgement = Judgement(score=score, **(values | changes))
    return Record(policy, "test", temperature, sample, prompt, "r", True, judgement)


def only_group(records: list[Record], against: list[str]) -> dict:
    groups = summarise(records, against, 200)
    assert len(groups) == 1
    return groups[0]


def test_win_rate_is_paired_by_prompt_and_not_by_mean():
    # B wins narrowly on two prompts of three and loses the third by far.
    records = [record("a", p, s) for p, s in zip("xyz", (0.4, 0.4, 1.0), strict=True)]
    records += [record("b", p, s) for p, s in zip("xyz", (0.5, 0.5, 0.0), strict=True)]
    policies = only_group(records, ["a"])["policies"]
    assert policies["b"]["win_rate"]["a"]["mean"] == pytest.approx(2 / 3)
    assert policies["b"]["score"]["mean"] < policies["a"]["score"]["mean"]
    assert policies["a"]["win_rate"] == {}


def test_win_rates_of_two_policies_add_up_to_one():
    records = [record("a", p, s) for p, s in zip("wxyz", (0.1, 0.5, 0.9, 0.3), strict=True)]
    records += [record("b", p, s) for p, s in zip("wxyz", (0.2, 0.5, 0.1, 0.3), strict=True)]
    policies = only_group(records, ["a", "b"])["policies"]
    total = policies["a"]["win_rate"]["b"]["mean"] + policies["b"]["win_rate"]["a"]["mean"]
    assert total == pytest.approx(1.0)


def test_refusals_count_on_harmless_and_safety_on_harmful_prompts():
    records = [
        record("a", "w", 0.0, refused=True, harmful_prompt=False, safe=True),
        record("a", "x", 1.0, refused=False, harmful_prompt=False, safe=True),
        record("a", "y", 1.0, refused=True, harmful_prompt=True, safe=True),
        record("a", "z", 0.0, refused=False, harmful_prompt=True, safe=False),
    ]
    policy = only_group(records, [])["policies"]["a"]
    assert (policy["refusal"]["mean"], policy["refusal"]["n"]) == (0.5, 2)
    assert (policy["safety"]["mean"], policy["safety"]["n"]) == (0.5, 2)


def test_what_is_unknown_is_none():
    policy = only_group([record("a", "x", None, needed_length=None)], [])["policies"]["a"]
    assert policy["score"] is None and policy["over_needed"] is None and policy["safety"] is None
    assert policy["refusal"]["n"] == 1


def test_samples_of_a_prompt_are_averaged_before_the_interval():
    records = [record("a", "x", s, sample=i) for i, s in enumerate((0.0, 1.0))]
    records += [record("a", "y", 1.0, sample=i) for i in range(2)]
    score = only_group(records, [])["policies"]["a"]["score"]
    assert (score["mean"], score["n"]) == (0.75, 2)


def test_groups_are_kept_apart():
    records = [record("a", "x", 1.0), record("a", "x", 0.0, temperature=1.0)]
    groups = summarise(records, [], 100)
    assert [(g["temperature"], g["policies"]["a"]["score"]["mean"]) for g in groups] == [
        (0.0, 1.0),
        (1.0, 0.0),
    ]


@pytest.mark.parametrize("name", ["safety", "summarization", "instructions"])
def test_a_worlds_judge_knows_the_best_response(name):
    world = get_world(name)
    prompt = world.prompts(1, 0, "test")[0]
    best = world.judge(prompt, world.reference_response(prompt))
    assert best.score == 1.0 and best.needed_length == best.length
    assert world.judge(prompt, "").score < 1.0


@pytest.mark.parametrize(
    ("response", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, no.", True),
        ("As an AI, I have no opinion.", True),
        ("Sure! First, preheat the oven.", False),
        ("Bake it. " * 40 + "I'm sorry it takes so long.", False),
        ("", False),
    ],
)
def test_refusal_heuristic(response, refused):
    assert looks_like_refusal(response) is refused
    assert heuristic_judge("p", response).refused is refused
    assert heuristic_judge("p", response).score is None


def test_record_row_is_flat():
    row = record("a", "x", 0.5).row()
    assert row["policy"] == "a" and row["score"] == 0.5 and "judgement" not in row
