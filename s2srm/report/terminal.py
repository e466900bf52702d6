"""The same tables and heat maps as the page, in a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2srm.evaluation.feedback import Feedback
from s2srm.report.diff import diff
from s2srm.report.page import evaluation_tables

_CELL_GAP = 1


def print_evaluation(path: Path, console: Console) -> None:
    """Every table of an eval.json: mean with its 95% interval below."""
    tables = evaluation_tables({"name": path.parent.name, **json.loads(path.read_text("utf-8"))})
    for table in tables["tables"]:
        console.print(_table(table))
    console.print(
        f"score: {tables['judge']}; under each mean its 95% bootstrap interval over prompts; win "
        "rates are paired by prompt, ties count half",
        style="dim",
    )


def _table(table: dict[str, Any]) -> Table:
    grid = Table(
        title=table["title"],
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i, name in enumerate(table["header"]):
        grid.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in table["rows"]:
        cells: list[Text] = []
        for cell in row:
            text = Text(cell["main"])
            if cell["range"]:
                text.append(f"\n{cell['range'].replace(' to ', '–')}", style="dim")
            cells.append(text)
        grid.add_row(*cells)
    return grid


def print_feedback(feedback: Feedback, console: Console, *, plain: bool) -> None:
    """Response with a reward under every token, correction as a diff; plain: no colours."""
    k = feedback.divergence_index
    where = (
        "the RM would have written the same"
        if k is None
        else f"the RM diverges at token {k + 1} of {len(feedback.tokens)}"
    )
    if plain:
        _print_plain(feedback, console, where)
        return
    console.print(Text("prompt", style="bold"))
    console.print(Text(feedback.prompt))
    console.print(Text(f"\nresponse  (reward {feedback.sum:+g}; {where})", style="bold"))
    for line in _heat_lines(feedback, console.width):
        console.print(line)
    console.print(Text("correction", style="bold"))
    text = Text()
    for piece in diff(feedback.tokens, feedback.correction_tokens):
        style = {"same": "", "deleted": "red strike", "inserted": "green underline"}[piece.change]
        text.append(piece.text, style=style)
    console.print(text)


def _heat_lines(feedback: Feedback, width: int) -> list[Text]:
    """Pairs of lines, wrapped to the width: token texts on green or red, rewards under them."""
    lines: list[Text] = []
    top, bottom = Text(), Text()
    for i, (token, reward) in enumerate(zip(feedback.tokens, feedback.rewards, strict=True)):
        shown = token.replace("\n", "\u21b5").strip() or "\u00b7"
        number = f"{reward:+.2g}" if reward else "0"
        cell = max(len(shown), len(number))
        if top.cell_len + cell + _CELL_GAP > width and top.cell_len:
            lines += [top, bottom]
            top, bottom = Text(), Text()
        style = "black on green" if reward > 0 else "white on red" if reward < 0 else "dim"
        if i == feedback.divergence_index:
            style += " underline"
        top.append(shown.ljust(cell), style=style).append(" " * _CELL_GAP)
        bottom.append(number.ljust(cell + _CELL_GAP), style="dim")
    return [*lines, top, bottom]


def _print_plain(feedback: Feedback, console: Console, where: str) -> None:
    written = feedback.rm_tokens or [""] * len(feedback.tokens)
    console.print(f"prompt: {feedback.prompt}", markup=False, soft_wrap=True)
    console.print(f"response: {feedback.response}", markup=False, soft_wrap=True)
    console.print(f"reward {feedback.sum:+g}; {where}", markup=False)
    for token, reward, rm_token in zip(feedback.tokens, feedback.rewards, written, strict=True):
        note = f"   RM: {rm_token!r}" if rm_token and rm_token.strip() != token.strip() else ""
        console.print(f"{reward:+6.2f}  {token!r}{note}", markup=False, soft_wrap=True)
    console.print(f"correction: {feedback.correction}", markup=False, soft_wrap=True)


def wide_console() -> Console:
    """Standard output; 110 columns where it is no terminal, so that tables in a log stay whole."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)
