"""`s2srm correct`: one response through a reward model, for people to read."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from s2srm.commands.parsing import parse
from s2srm.config import Precision, TokenRewardConfig
from s2srm.errors import UserError
from s2srm.validation import at_least, model_path, token_reward

SUMMARY = "Show an RM's correction of one response, and the reward of every token."


@dataclass(frozen=True)
class CorrectConfig:
    """One prompt and response through a seq2seq RM."""

    rm: str = ""
    """Folder of a trained seq2seq RM."""
    prompt: str = ""
    """The prompt; asked for on a terminal where it is not given."""
    response: str = ""
    """The response; asked for on a terminal where it is not given."""
    token: TokenRewardConfig = field(default_factory=TokenRewardConfig)
    """How the RM's statistics become token rewards."""
    max_new_tokens: int = 512
    """Longest correction, in tokens."""
    precision: Precision = "float32"
    """Floating-point type of the RM."""
    plain: bool = False
    """No colours: one token per line with its reward."""
    json: bool = False
    """Print one JSON object instead."""


def run(argv: Sequence[str]) -> None:
    """Score, correct, print."""
    cfg = parse(CorrectConfig, argv, "correct", SUMMARY)
    if not cfg.rm:
        raise UserError("rm is missing: the folder of a trained seq2seq RM")
    model_path("rm", cfg.rm)
    token_reward("token", cfg.token)
    at_least("max_new_tokens", cfg.max_new_tokens, 1)
    prompt = cfg.prompt or _ask("prompt")
    response = cfg.response or _ask("response")
    from rich.console import Console

    from s2srm.commands.libraries import quiet_libraries
    from s2srm.config import ModelConfig
    from s2srm.evaluation.feedback import FeedbackModel
    from s2srm.report.terminal import print_feedback

    quiet_libraries()
    model = FeedbackModel(
        ModelConfig(path=cfg.rm, precision=cfg.precision),
        cfg.token,
        max_correction_tokens=cfg.max_new_tokens,
    )
    ids, answer = model.encode(prompt, response)
    feedback = model.explain([ids], [answer], [prompt])[0]
    if cfg.json:
        print(json.dumps(feedback.row(), ensure_ascii=False))
    else:
        print_feedback(feedback, Console(highlight=False), plain=cfg.plain)


def _ask(name: str) -> str:
    """Read a text from the terminal. UserError where there is none, or nothing was typed."""
    text = input(f"{name}: ") if sys.stdin.isatty() else ""
    if not text:
        raise UserError(f"{name} is missing")
    return text
