"""Preferences, demonstrations and prompts from data files and hub data sets.

A row that cannot be used is an error with its place and the reason, or is skipped and counted
(data.on_bad_row). A column that is missing from the whole data set is always an error.

chosen == rejected is a bad row of preferences: the Bradley-Terry gradient of such a pair is
exactly zero, and as a correction example it teaches the reward model to copy what it is given.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from s2srm import distributed
from s2srm.bounds import check_bounds
from s2srm.config import DataConfig
from s2srm.data.adapters import make_adapter
from s2srm.data.base import Adapter
from s2srm.data.columns import CONTEXT_KEYS, missing_column, unread_prompt_columns
from s2srm.data.fields import BadRow, Fields
from s2srm.data.readers import read_rows
from s2srm.data.repetition import check_repetition, strip_prompt
from s2srm.data.schema import Demonstration, LoadReport, Need, Preference, Prompt, Row
from s2srm.errors import UserError
from s2srm.watchdog import pulse

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Columns are the union over so many first rows: JSON rows may leave out keys that are null.
_PEEK_ROWS = 100


def load_preferences(cfg: DataConfig) -> tuple[list[Preference], LoadReport]:
    """Triples (prompt, chosen, rejected). UserError for a path, column or row that is wrong."""

    def convert(adapter: Adapter, row: Fields, where: str) -> Preference:
        prompt, *texts = adapter.preference(row)
        if cfg.prompt_in_response == "strip":
            texts = [strip_prompt(prompt, text) for text in texts]
        chosen, rejected = texts
        if chosen == rejected:
            raise BadRow("chosen and rejected are the same text, so there is no preference")
        return Preference(prompt, chosen, rejected, where)

    rows, report = _load(cfg, "preference", "chosen", convert)
    if cfg.prompt_in_response == "refuse":
        check_repetition(cfg, [(r.prompt, (r.chosen, r.rejected), r.where) for r in rows])
    return rows, report


def load_demonstrations(
    cfg: DataConfig, response_column: str = "chosen"
) -> tuple[list[Demonstration], LoadReport]:
    """Prompts with the response to imitate: the chosen one, or the column `response`."""

    def convert(adapter: Adapter, row: Fields, where: str) -> Demonstration:
        prompt, response = adapter.demonstration(row, response_column)
        if cfg.prompt_in_response == "strip":
            response = strip_prompt(prompt, response)
        return Demonstration(prompt, response, where)

    rows, report = _load(cfg, "demonstration", response_column, convert)
    if cfg.prompt_in_response == "refuse":
        check_repetition(cfg, [(r.prompt, (r.response,), r.where) for r in rows])
    return rows, report


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
    check_bounds(cfg, "data")
    rows = read_rows(cfg.path, cfg.split, cfg.subset)
    head = list(itertools.islice(rows, _PEEK_ROWS))
    adapter: Adapter | None = None
    good: list[T] = []
    columns: dict[str, None] = {}
    num_rows = num_bad = 0
    first_bad: str | None = None
    for row in itertools.chain(head, rows):
        num_rows += 1
        pulse.beat()
        columns.update(dict.fromkeys(row.data))
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
    if adapter is None or not good:
        why = f"{num_rows} rows, all bad; the first: {first_bad}" if num_rows else "it has no rows"
        raise UserError(f"data path {cfg.path!r} gives nothing to use: {why}")
    _log_columns(cfg, adapter, adapter.reads(need, response_column), list(columns))
    return good, LoadReport(num_rows, num_bad, first_bad)


def log_rows(cfg: DataConfig, num_rows: int, report: LoadReport, num_long: int) -> None:
    """Say how many rows there are, and how many were skipped and why."""
    skipped = f"{report.num_bad} bad and {num_long} unusable rows skipped"
    if report.first_bad_reason:
        skipped += f" (first: {report.first_bad_reason})"
    if distributed.is_main():
        level = logging.WARNING if report.num_bad or num_long else logging.INFO
        logger.log(level, "%s: %d rows; %s", cfg.path, num_rows, skipped)


def _adapter(
    cfg: DataConfig, head: list[Row], row: Row, need: Need, response_column: str
) -> Adapter:
    """The format's adapter, after a check that the columns it needs are there at all."""
    sample: dict[str, Any] = {}
    for peeked in (*head, row):
        for column, value in peeked.data.items():
            if sample.get(column) in (None, "", []):
                sample[column] = value
    columns = list(sample)
    adapter = make_adapter(cfg.format, cfg.columns, columns, sample)
    context = {key: cfg.columns[key] for key in CONTEXT_KEYS if cfg.columns.get(key)}
    for part, column in {**adapter.required(need, response_column), **context}.items():
        if column not in columns:
            raise missing_column(row.source, part, column, adapter.name, need, sample)
    return adapter


def _log_columns(cfg: DataConfig, adapter: Adapter, reads: list[str], columns: list[str]) -> None:
    """One line; a warning where a column that is not read may belong to the prompt."""
    unread = [c for c in columns if c not in reads]
    suspects = unread_prompt_columns(unread, adapter.names, cfg.columns)
    logger.log(
        logging.WARNING if suspects else logging.INFO,
        "%s: format %s reads %s%s%s",
        cfg.path,
        adapter.name,
        ", ".join(c for c in columns if c in reads),
        f"; not read: {', '.join(unread[:12])}{', ...' * (len(unread) > 12)}" if unread else "",
        f"; may belong to the prompt: {', '.join(suspects)} (see data.columns)" if suspects else "",
    )
