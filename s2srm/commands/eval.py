"""`s2srm eval`."""

from __future__ import annotations

from collections.abc import Sequence

from s2srm.commands.parsing import parse
from s2srm.evaluation.config import EvalConfig, validate_eval

SUMMARY = "Compare policies on the same prompts: score, win rates, refusals, length."


def run(argv: Sequence[str]) -> None:
    """Evaluate, print the tables and the folder."""
    cfg = validate_eval(parse(EvalConfig, argv, "eval", SUMMARY))
    from s2srm import distributed
    from s2srm.commands.libraries import quiet_libraries
    from s2srm.evaluation.run import evaluate
    from s2srm.report.terminal import print_evaluation, wide_console

    quiet_libraries()
    result = evaluate(cfg)
    if distributed.is_main():
        print_evaluation(result.output / "eval.json", wide_console())
        print(f"evaluation: {result.output}")
