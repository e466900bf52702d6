"""Instruction following: operations, partial credit, the annotator's errors, new pairs."""

import random
from dataclasses import replace
from statistics import mean

import pytest

from s2srm.worlds.instructions import InstructionConfig, InstructionWorld

WORLD = InstructionWorld()


def prompt(operations: str, style: str = "plain", ending: str = "none", items: str = "") -> str:
    items = items or "pear goat fig".replace("pear", "grape")
    return f"instruction : {operations} format : {style} ending : {ending} input : {items} output :"


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ("sort", "fig goat grape"),
        ("reverse", "fig goat grape"),
        ("uppercase", "GRAPE GOAT FIG"),
        ("animals", "goat"),
        ("plants", "grape fig"),
        ("first", "grape goat"),
        ("count", "3"),
        ("copy", "grape goat fig"),
        ("sort then first", "fig goat"),
        ("first then sort", "goat grape"),
        ("uppercase then animals", "GOAT"),
        ("plants then count", "2"),
    ],
)
def test_reference_response(operations: str, expected: str) -> None:
    assert WORLD.reference_response(prompt(operations)) == expected


def test_formats_endings_and_nothing_left() -> None:
    assert WORLD.reference_response(prompt("copy", "commas", "done")) == "grape , goat , fig done"
    assert WORLD.reference_response(prompt("copy", "dashes", "over")) == "- grape - goat - fig over"
    assert WORLD.reference_response(prompt("animals", "dashes", items="fig corn")) == "- nothing"


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("fig , goat , grape done", 1.0),
        ("fig , goat , grape", 0.9),
        ("fig , goat , grape over", 0.9),
        ("fig goat grape done", 0.8),
        ("fig , goat done", 2 / 3),
        ("fig , goat , grape , fig done", 3 / 4),
        ("goat , fig , grape done", 1 / 3),
        ("fig goat , grape", 0.7),
        ("FIG , GOAT , GRAPE done", 0.0),
        ("done", 0.0),
        (", , ,", 0.0),
        ("", 0.0),
    ],
)
def test_score(response: str, score: float) -> None:
    assert WORLD.judge(prompt("sort", "commas", "done"), response).score == pytest.approx(score)


@pytest.mark.parametrize("accuracy", [0.5, 0.9])
def test_the_annotator_errs_as_often_as_stated(accuracy: float) -> None:
    world = InstructionWorld(replace(InstructionConfig(), accuracy=accuracy))
    rng, task = random.Random(0), prompt("sort", "commas", "done")
    good, bad = "fig , goat , grape done", "fig , grape done"
    assert mean(world.prefers_first(rng, task, good, bad) for _ in range(2000)) == pytest.approx(
        accuracy, abs=0.03
    )
    assert mean(world.prefers_first(rng, task, bad, good) for _ in range(2000)) == pytest.approx(
        1 - accuracy, abs=0.03
    )


def test_the_writer_makes_each_kind_of_error() -> None:
    rng, task = random.Random(0), prompt("sort then reverse", "commas", "done")
    answers = {WORLD.write_response(rng, task) for _ in range(500)}
    assert "grape , goat , fig done" in answers  # right
    assert "grape , goat , fig" in answers  # ending forgotten
    assert "fig , goat , grape done" in answers  # second operation forgotten
    assert "- grape - goat - fig done" in answers  # another format
    assert "grape , goat done" in answers  # an item dropped


def test_pairs_of_operations_out_of_distribution_never_occur_in_training() -> None:
    def pairs(split) -> set[str]:
        return {p.split(" : ")[1].split(" format")[0] for p in WORLD.prompts(2000, 0, split)}

    train, ood = pairs("train"), pairs("ood")
    assert len(ood) == 5 and not train & ood
    assert {op for pair in ood for op in pair.split(" then ")} <= train


@pytest.mark.parametrize(
    "bad",
    [
        "",
        prompt("fly"),
        prompt("sort", "table"),
        prompt("sort", items="fig zebra"),
        "instruction : sort format : plain input : fig output :",
    ],
)
def test_a_broken_task_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="not a prompt"):
        WORLD.judge(bad, "fig")
