"""The page shows what the runs hold, escapes it, and needs nothing from outside."""

from __future__ import annotations

import json
import re

import pytest
from page_rows import FEEDBACK
from rich.console import Console

from s2srm.errors import UserError
from s2srm.report.collect import collect, costs
from s2srm.report.diff import Piece, diff
from s2srm.report.page import feedback_card, write_report
from s2srm.report.terminal import print_evaluation


def test_page_is_self_contained_and_complete(demo, tmp_path):
    html = write_report([demo], tmp_path / "new" / "page.html").read_text()
    assert not re.findall(r'(?:src|href)="|url\(|@import|<script', html)
    assert html.count("<article>") == 11
    assert html.count("<svg") == 2
    assert "0.812" in html and "0.750 to 0.875" in html
    for title in ("test prompts, greedy (16)", "out-of-distribution prompts, temperature 1 (16)"):
        assert title in html
    assert "wins vs sft" in html and "safe, harmful" not in html, (
        "columns without values are left out"
    )


def test_text_of_models_is_escaped(demo, tmp_path):
    html = write_report([demo], tmp_path / "page.html").read_text()
    assert "<b>hi</b>" not in html and "say &lt;b&gt;hi&lt;/b&gt;" in html
    assert "&lt;three&gt;" in html and "<three>" not in html


def test_cost_table_links_each_ppo_to_its_rm(demo):
    (cost,) = costs(collect([demo]).runs)
    assert (cost.name, cost.reward, cost.models_in_memory) == ("ppo", "seq2seq", 4)
    assert (cost.rm_steps, cost.rm_seconds, cost.ppo_seconds) == (3, 20.0, 20.0)


def test_runs_of_unknown_rm_are_still_listed(demo):
    (cost,) = costs(collect([demo / "ppo"]).runs)
    assert cost.triples == "unknown" and cost.rm_steps is None


def test_card_marks_colour_divergence_and_difference():
    card = feedback_card(FEEDBACK)
    assert [t["sign"] for t in card["tokens"]] == ["pos", "neg", "zero", "pos"]
    assert [t["diverges"] for t in card["tokens"]] == [False, True, False, False]
    assert [t["reward"] for t in card["tokens"]] == ["+1", "\u22121", "0", "+1"]
    assert "'2'" in card["tokens"][1]["hover"]
    assert [p.change for p in card["pieces"]] == ["same", "deleted", "inserted", "same"]


def test_card_without_rm_tokens_or_correction():
    row = FEEDBACK | {
        "rm_tokens": None,
        "correction_tokens": None,
        "correction": None,
        "gold": None,
    }
    card = feedback_card(row)
    assert card["pieces"] is None and card["gold"] is None


def test_samples_of_ppo_stand_in_where_there_is_no_evaluation(demo, tmp_path):
    rows = [FEEDBACK | {"step": i} for i in range(3)]
    for row in rows:
        del row["correction_tokens"], row["gold_correction"], row["policy"]
    (demo / "ppo" / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    html = write_report([demo / "ppo"], tmp_path / "page.html").read_text()
    assert html.count("<article>") == 3 and "one 2 three" in html


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_folders_without_runs_are_named(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match="x"):
        collect([tmp_path / "x"])


def test_metrics_without_config_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        collect([tmp_path])


def test_diff_joins_back_to_both_texts():
    ours, theirs = ["a", " b", " c", " d"], ["a", " c", " x", " d", " e"]
    pieces = diff(ours, theirs)
    assert "".join(p.text for p in pieces if p.change != "inserted") == "".join(ours)
    assert "".join(p.text for p in pieces if p.change != "deleted") == "".join(theirs)
    assert diff(["a"], ["a"]) == [Piece("same", "a")]


def test_terminal_table_has_the_same_numbers(demo, capsys):
    print_evaluation(demo / "eval" / "eval.json", Console(width=110, highlight=False))
    shown = capsys.readouterr().out
    assert shown.count("0.812") == 12 and "0.750–0.875" in shown
