"""Summarisation: the judge's F1 of statements and the annotator's preference for length."""

import random
from dataclasses import replace
from statistics import mean

import pytest

from s2srm.worlds.summarization import SummarizationConfig, SummarizationWorld

WORLD = SummarizationWorld()
PROMPT = (
    "title : mara post : yesterday mara moved to oslo . ivan fears bees . mara likes soup . "
    "we heard a bell . we heard that mara bought a lamp . ivan likes rice . tl;dr :"
)
FULL = "mara moved to oslo and likes soup and bought a lamp ."


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (FULL, 1.0),
        ("mara bought a lamp and moved to oslo and likes soup", 1.0),  # any order, no full stop
        ("mara moved to oslo . mara likes soup . mara bought a lamp .", 1.0),
        ("mara moved to oslo .", 2 / 4),
        ("mara moved to oslo and moved to oslo and moved to oslo .", 2 / 6),  # repeats cost
        (f"{FULL} the street was quiet .", 6 / 7),  # filler costs
        ("mara moved to rome and likes soup and bought a lamp .", 4 / 6),  # a wrong value
        ("ivan moved to oslo and likes soup and bought a lamp .", 0.0),  # said of another
        ("mara likes soup and ivan fears bees .", 2 / 5),
        ("ivan likes rice . mara likes soup .", 2 / 5),
        ("moved to oslo and likes soup .", 0.0),  # of nobody
        (" ".join(["mara", *["soup"] * 40]), 0.0),
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


PADDED = FULL.replace(" .", " and the street was quiet .")
FILLED = FULL.replace(" .", " and we heard a bell .")


def _share_first(world: SummarizationWorld, first: str, second: str) -> float:
    rng = random.Random(0)
    return mean(world.prefers_first(rng, PROMPT, first, second) for _ in range(2000))


@pytest.mark.parametrize("probability", [0.5, 0.85, 1.0])
def test_at_equal_quality_the_longer_is_preferred_as_often_as_stated(probability: float) -> None:
    world = SummarizationWorld(replace(SummarizationConfig(), longer_preferred=probability))
    repeated = FULL.replace(" .", " and likes soup .")
    for longer in (FILLED, repeated, FULL.replace(" .", " and ivan fears bees .")):
        assert _share_first(world, longer, FULL) == pytest.approx(probability, abs=0.03)
        assert _share_first(world, FULL, longer) == pytest.approx(1 - probability, abs=0.03)


def test_quality_goes_before_length() -> None:
    short, long_but_poor = FULL, "mara moved to oslo and moved to oslo and we heard a bell ."
    assert _share_first(WORLD, short, long_but_poor) == pytest.approx(0.9, abs=0.03)
    # Filler that the post does not hold is a false statement, not padding.
    assert _share_first(WORLD, FULL, PADDED) == pytest.approx(0.9, abs=0.03)


def test_equal_quality_and_length_is_a_coin() -> None:
    first, second = "mara moved to oslo .", "mara bought a lamp ."
    assert _share_first(WORLD, first, second) == pytest.approx(0.5, abs=0.04)


def test_preference_rows_lean_to_the_longer_at_equal_facts() -> None:
    """The bias is visible in the rows themselves, not only in the annotator's rule."""
    longer = []
    for row in WORLD.preferences(3000, 0):
        facts = set(WORLD.reference_response(row["prompt"]).rstrip(" .").split(" and "))
        first, second = (set(row[k].rstrip(" .").split(" and ")) for k in ("chosen", "rejected"))
        words = len(row["chosen"].split()) - len(row["rejected"].split())
        if first >= facts and second >= facts and words:
            longer.append(words > 0)
    assert len(longer) > 100
    assert mean(longer) == pytest.approx(WORLD.config.longer_preferred, abs=0.09)


def test_out_of_distribution_posts_are_longer_and_state_new_relations_of_the_title() -> None:
    def relations(split) -> set[tuple[str, str]]:
        found = set()
        for prompt in WORLD.prompts(800, 0, split):
            name, _, rest = WORLD.reference_response(prompt).rstrip(" .").partition(" ")
            found |= {(name, clause.rsplit(" ", 1)[0]) for clause in rest.split(" and ")}
        return found

    train, ood = relations("train"), relations("ood")
    assert len(train) == 16 * 6
    assert len(ood - train) == 16 * 2
    lengths = {s: mean(len(p.split()) for p in WORLD.prompts(200, 0, s)) for s in ("test", "ood")}
    assert lengths["ood"] > lengths["test"] + 5


@pytest.mark.parametrize("prompt", ["", "title : mara post : . tl;dr :", PROMPT[:20], "mara"])
def test_a_broken_post_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt"):
        WORLD.judge(prompt, FULL)
