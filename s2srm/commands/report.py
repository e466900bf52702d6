"""`s2srm report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from s2srm.errors import UserError

SUMMARY = "Write one self-contained HTML page about training runs and evaluations."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """argparse would print its usage first; a command's errors are one line."""
        raise UserError(message)


def run(argv: Sequence[str]) -> None:
    """Write the page and say where it is."""
    parser = _Parser(prog="s2srm report", description=SUMMARY)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of such folders"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the HTML file to write")
    arguments = parser.parse_args(argv)
    from s2srm.report.page import write_report

    print(f"report: {write_report(arguments.runs, arguments.out)}")
