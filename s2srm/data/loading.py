"""Preferences, demonstrations and prompts from data files and hub data sets.

A row that cannot be used is an error with its place and the reason, or is skipped and counted
(data.on_bad_row). A column that is missing from the whole data set is always an error.

chosen == rejected is a bad row of preferences: the Bradley-Terry gradient of such a pair is
exactly zero, and as a correction example it teaches the reward model to copy what it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

from s2srm.config import DataConfig
from s2srm.data.adapters import Adapter, did_you_mean, make_adapter
from s2srm.data.fields import BadRow, Fields
from s2srm.data.readers import read_rows
from s2srm.data.schema import Demonstration, LoadReport, Need, Preference, Prompt, Row
from s2srm.errors import UserError

T = TypeVar("T")

# Columns are the union over so many first rows: JSON rows may leave out keys that are null.
_PEEK_ROWS = 100


def load_preferences(cfg: DataConfig) -> tuple[list[Preference], LoadReport]:
    """Triples (prompt, chosen, rejected). UserError for a path, column or row that is wrong."""

    def convert(adapter: Adapter, row: Fields, where: str) -> Preference:
        prompt, chosen, rejected = adapter.preference(row)
        if chosen == rejected:
            raise BadRow("chosen and rejected are the same text, so there is no preference")
        return Preference(prompt, chosen, rejected, where)

    return _load(cfg, "preference", "chosen", convert)


def load_demonstrations(
    cfg: DataConfig, response_column: str = "chosen"
) -> tuple[list[Demonstration], LoadReport]:
    """Prompts with the response to imitate: the chosen one, or the column `response`."""

    def convert(adapter: Adapter, row: Fields, where: str) -> Demonstration:
        return Demonstration(*adapter.demonstration(row, response_column), where)

    return _load(cfg, "demonstration", response_column, convert)


def load_prompts(cfg: DataConfig) -> tuple[list[Prompt], LoadReport]:
    """Prompts alone; the columns of the responses are not read where the prompt has its own."""

    def convert(adapter: Adapter, row: Fields, where: str) -> Prompt:
        return Prompt(adapter.prompt(row), where)

    return _load(cfg, "prompt", "chosen", convert)


def _load(
    cfg: DataConfig,
    need: Need,
    response_column: str,
    convert: Callable[[Adapter, Fields, str], T],
) -> tuple[list[T], LoadReport]:
    if cfg.limit is not None and cfg.limit < 1:
        raise UserError(f"data.limit must be at least 1, got {cfg.limit}")
    rows = read_rows(cfg.path, cfg.split, cfg.subset)
    head = list(itertools.islice(rows, _PEEK_ROWS))
    adapter: Adapter | None = None
    good: list[T] = []
    num_rows = num_bad = 0
    first_bad: str | None = None
    for row in itertools.chain(head, rows):
        num_rows += 1
        try:
            if row.error is not None:
                raise BadRow(row.error)
            adapter = adapter or _adapter(cfg, head, row, need, response_column)
            good.append(convert(adapter, row.data, row.where))
        except BadRow as bad:
            if cfg.on_bad_row == "error":
                raise UserError(
                    f"{row.where}: {bad} (data.on_bad_row: skip leaves out bad rows)"
                ) from None
            num_bad += 1
            first_bad = first_bad or f"{row.where}: {bad}"
        if len(good) == cfg.limit:
            break
    if not good:
        why = f"{num_rows} rows, all bad; the first: {first_bad}" if num_rows else "it has no rows"
        raise UserError(f"data path {cfg.path!r} gives nothing to use: {why}")
    return good, LoadReport(num_rows, num_bad, first_bad)


def _adapter(
    cfg: DataConfig, head: list[Row], row: Row, need: Need, response_column: str
) -> Adapter:
    """The format's adapter, after a check that the columns it needs are there at all."""
    columns = list(dict.fromkeys(key for peeked in (*head, row) for key in peeked.data))
    adapter = make_adapter(cfg.format, cfg.columns, columns, row.data)
    missing = [c for c in adapter.required(need, response_column) if c not in columns]
    if missing:
        raise UserError(
            f"{row.source}: no column {missing[0]!r}, which format {adapter.name} needs; "
            f"found {', '.join(map(repr, columns)) or 'none'}"
            f"{did_you_mean(missing[0], columns)}"
        )
    return adapter
