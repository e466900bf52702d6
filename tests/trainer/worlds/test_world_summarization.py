"""Summarisation: the judge's F1 of statements and the annotator's preference for length."""

import itertools
import random
from dataclasses import replace
from statistics import mean

import pytest

from s2srm.worlds.summarization import SummarizationConfig, SummarizationWorld

WORLD = SummarizationWorld()
PROMPT = (
    "post : yesterday i moved to oslo . ivan feared the bees . i cooked some soup . "
    "it rained again . it seems that i bought a lamp . ivan cooked some rice . tl;dr :"
)
FULL = "i moved to oslo and cooked some soup and bought a lamp ."


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (FULL, 1.0),
        ("i bought a lamp and moved to oslo and cooked some soup", 1.0),  # any order, no full stop
        ("i moved to oslo . i cooked some soup . i bought a lamp .", 1.0),
        ("i moved to oslo .", 2 / 4),
        ("i moved to oslo and moved to oslo and moved to oslo .", 2 / 6),  # repeats cost
        (f"{FULL} the street was quiet .", 6 / 7),  # filler costs
        ("i moved to rome and cooked some soup and bought a lamp .", 4 / 6),  # a wrong value
        ("ivan moved to oslo and cooked some soup and bought a lamp .", 0.0),  # said of another
        ("i cooked some soup and ivan feared the bees .", 2 / 5),
        ("ivan cooked some rice . i cooked some soup .", 2 / 5),
        ("moved to oslo and cooked some soup .", 0.0),  # of nobody
        (" ".join(["i", *["soup"] * 40]), 0.0),
        ("", 0.0),
    ],
)
def test_score(response: str, score: float) -> None:
    assert WORLD.judge(PROMPT, response).score == pytest.approx(score)


def test_run_on_text_counts_as_several_statements() -> None:
    run_on = f"{FULL} {' '.join(['soup'] * 20)}"
    assert WORLD.judge(PROMPT, run_on).score == pytest.approx(6 / (3 + 20 / 4 + 3))


def test_the_judge_does_not_reward_length() -> None:
    for prompt in WORLD.prompts(100, 0, "test"):
        reference = WORLD.reference_response(prompt)
        padded = reference.replace(" .", " and the day was cold .")
        assert WORLD.judge(prompt, padded).score < WORLD.judge(prompt, reference).score
        assert WORLD.judge(prompt, padded).needed_length == len(reference.split())


INVENTED = FULL.replace(" .", " and the street was quiet .")
FILLED = FULL.replace(" .", " and it rained again .")


def _share_first(world: SummarizationWorld, first: str, second: str) -> float:
    rng = random.Random(0)
    return mean(world.prefers_first(rng, PROMPT, first, second) for _ in range(2000))


@pytest.mark.parametrize("probability", [0.5, 0.85, 1.0])
def test_at_equal_quality_the_longer_is_preferred_as_often_as_stated(probability: float) -> None:
    world = SummarizationWorld(replace(SummarizationConfig(), longer_preferred=probability))
    repeated = FULL.replace(" .", " and bought a lamp .")
    for longer in (FILLED, repeated, FULL.replace(" .", " and ivan feared the bees .")):
        assert _share_first(world, longer, FULL) == pytest.approx(probability, abs=0.03)
        assert _share_first(world, FULL, longer) == pytest.approx(1 - probability, abs=0.03)


def test_quality_goes_before_length() -> None:
    short, long_but_poor = FULL, "i moved to oslo and moved to oslo and it rained again ."
    assert _share_first(WORLD, short, long_but_poor) == pytest.approx(0.9, abs=0.03)
    # Filler that the post does not hold is a false statement, not padding.
    assert _share_first(WORLD, FULL, INVENTED) == pytest.approx(0.9, abs=0.03)


def test_equal_quality_and_length_is_a_coin() -> None:
    first, second = "i moved to oslo .", "i bought a lamp ."
    assert _share_first(WORLD, first, second) == pytest.approx(0.5, abs=0.04)


def _clauses(summary: str) -> set[str]:
    return set(summary.removeprefix("i ").rstrip(" .").split(" and "))


def test_preference_rows_lean_to_the_longer_at_equal_facts() -> None:
    """The bias is visible in the rows themselves, not only in the annotator's rule."""
    longer = []
    for row in WORLD.preferences(3000, 0):
        facts = _clauses(WORLD.reference_response(row["prompt"]))
        first, second = (_clauses(row[key]) for key in ("chosen", "rejected"))
        words = len(row["chosen"].split()) - len(row["rejected"].split())
        if first >= facts and second >= facts and words:
            longer.append(words > 0)
    assert len(longer) > 100
    assert mean(longer) == pytest.approx(WORLD.config.longer_preferred, abs=0.09)


def test_out_of_distribution_posts_are_longer_and_join_relations_that_never_met() -> None:
    def pairs(split) -> set[frozenset[str]]:
        found = set()
        for prompt in WORLD.prompts(800, 0, split):
            clauses = _clauses(WORLD.reference_response(prompt))
            relations = [clause.rsplit(" ", 1)[0] for clause in clauses]
            found |= {frozenset(pair) for pair in itertools.combinations(relations, 2)}
        return found

    every = 8 * 7 // 2
    assert len(pairs("train")) == every - 4
    assert len(pairs("ood") - pairs("train")) == 4
    lengths = {s: mean(len(p.split()) for p in WORLD.prompts(200, 0, s)) for s in ("test", "ood")}
    assert lengths["ood"] > lengths["test"] + 5


@pytest.mark.parametrize(
    "prompt", ["", "post : . tl;dr :", PROMPT[:20], "post : lena lost my hat . tl;dr :"]
)
def test_a_broken_post_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt"):
        WORLD.judge(prompt, FULL)
