"""`s2srm correct`: one response through a reward model, for people to read."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from s2srm.bounds import PositiveInt, check_bounds
from s2srm.commands.parsing import parse
from s2srm.config import Precision, TokenRewardConfig
from s2srm.errors import UserError
from s2srm.validation import expand_paths, model_path

SUMMARY = "Show an RM's correction of one response, and the reward of every token."

TEXTS = ("prompt", "response")
MAX_CORRECTION_TOKENS = 512


@dataclass(frozen=True)
class CorrectConfig:
    """One prompt and response through a seq2seq RM."""

    rm: str = ""
    """Folder of a trained seq2seq RM."""
    prompt: str = ""
    """The prompt, taken as it is (a backslash is a backslash); asked for on a terminal where it is
    not given, or read from standard input where that is no terminal."""
    response: str = ""
    """The response; not given: as for the prompt."""
    token: TokenRewardConfig = field(default_factory=TokenRewardConfig)
    """How the RM's statistics become token rewards."""
    max_new_tokens: PositiveInt | None = None
    """Longest correction, in tokens; null: 512, or what the model's positions leave for it."""
    precision: Precision = "float32"
    """Floating-point type of the RM."""
    plain: bool = False
    """No colours: one token per line with its reward."""
    json: bool = False
    """Print one JSON object instead."""


def run(argv: Sequence[str]) -> None:
    """Score, correct, print."""
    cfg = expand_paths(parse(CorrectConfig, argv, "correct", SUMMARY, texts=TEXTS))
    if not cfg.rm:
        raise UserError("rm is missing: the folder of a trained seq2seq RM")
    model_path("rm", cfg.rm)
    check_bounds(cfg)
    prompt, response = _texts(cfg, argv)
    from rich.console import Console

    from s2srm.commands.libraries import quiet_libraries
    from s2srm.config import ModelConfig
    from s2srm.evaluation.feedback import FeedbackModel, correction_limit, encode
    from s2srm.evaluation.inputs import read_reward_model
    from s2srm.report.terminal import print_feedback

    quiet_libraries()
    reader = read_reward_model("rm", ModelConfig(path=cfg.rm, precision=cfg.precision))
    ids, answer = encode(reader, prompt, response)
    limit = correction_limit(reader, ids, answer, cfg.max_new_tokens, MAX_CORRECTION_TOKENS)
    model = FeedbackModel(reader, cfg.token, max_correction_tokens=limit)
    feedback = model.explain([ids], [answer], [prompt])[0]
    if cfg.json:
        print(json.dumps(feedback.row(), ensure_ascii=False))
    else:
        print_feedback(feedback, Console(highlight=False), plain=cfg.plain)


def _texts(cfg: CorrectConfig, argv: Sequence[str]) -> tuple[str, str]:
    """Prompt and response: from the flags, the terminal, or (one of them) a pipe."""
    flags = {argument.partition("=")[0] for argument in argv}
    found = {name: getattr(cfg, name) for name in TEXTS}
    missing = [name for name, text in found.items() if not text and f"--{name}" not in flags]
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if len(missing) == 2 and not is_terminal:
        raise UserError("prompt and response are missing; one of them may come from a pipe")
    for name in missing:
        found[name] = _ask(name) if is_terminal else _piped()
        if not found[name].strip():
            raise UserError(f"{name} is missing")
    for name, text in found.items():
        if not text.strip():
            raise UserError(f"the {name} is empty")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"the {name} is not valid UTF-8")
    return found["prompt"], found["response"]


def _ask(name: str) -> str:
    """A line from the terminal; nothing at its end (Ctrl-D)."""
    try:
        return input(f"{name}: ")
    except EOFError:
        return ""


def _piped() -> str:
    """All of standard input without its last newline."""
    if sys.stdin is None:
        return ""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not valid UTF-8: {error}") from error
