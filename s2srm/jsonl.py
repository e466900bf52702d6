"""The JSONL files that runs leave: one object a line, UTF-8, a newline at the end of each.

Left out: data sets, which people write (`data.json_lines`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from s2srm.errors import UserError


def json_line(row: Mapping[str, Any]) -> str:
    """The row as a line, its characters as they are."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write or replace the file."""
    path.write_text("".join(json_line(row) for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's file; a last line that a crash cut short is left out.

    UserError with file and line for any other line that is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8: {error}") from error
    rows: list[dict[str, Any]] = []
    # What stands after the last newline was never finished.
    for number, line in enumerate(lines[:-1], start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected an object, got {row!r:.60}")
        rows.append(row)
    return rows
