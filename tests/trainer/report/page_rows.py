"""Rows that the tests of the page share."""

from __future__ import annotations

INTERVAL = {"mean": 0.8125, "low": 0.75, "high": 0.875, "n": 16}
FEEDBACK = {
    "policy": "ppo",
    "prompt": "say <b>hi</b>",
    "response": "one two three",
    "tokens": ["one", " two", " <three>", "<eos>"],
    "rewards": [1.0, -1.0, 0.0, 1.0],
    "rm_tokens": ["one", "2", " <three>", "<eos>"],
    "divergence_index": 1,
    "correction": "one 2 three",
    "correction_tokens": ["one", " 2", " <three>", "<eos>"],
    "finished": True,
    "sum": 1.0,
    "gold": 0.5,
    "gold_correction": 1.0,
}


def policy(**changes):
    base = dict.fromkeys(
        ("score", "agreement", "refusal", "safety", "length", "over_needed", "finished")
    )
    return base | {"win_rate": {}} | changes
