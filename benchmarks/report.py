"""Tables and plots of benchmarks/results/, generated from the rows and from nothing else.

    python -m benchmarks.report

The same rows give the same bytes. Of rows for the same call and provider the last one counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.charts import Bar, Point, bar_chart, curve_chart
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.limits import beyond_results_mib, device_kind, is_ours, same_call, verdicts
from benchmarks.products import MODES
from benchmarks.providers.sequences import SEQUENCE_OPS
from benchmarks.rows import RESULTS, CaseRow, Row, read_cases, read_rows
from benchmarks.tables import absent, case_tables, claims

_HEADER = """# Results

Made by `python -m benchmarks.report` from the rows (`*.jsonl`) in this folder; do not edit. How
they come about and how to read them: [benchmarks/README.md](../README.md).
"""
_NO_GPU = """
## GPU

There are no rows of a GPU yet, so nothing is claimed for one. `make gpu` on a machine that has one
measures and writes them.
"""
_NO_CPU = """
## CPU

There are no rows of a CPU yet. `python -m benchmarks.compare` writes them.
"""


def latest(rows: Sequence[Row]) -> list[Row]:
    """One row for each call and provider, the last; sorted as they are shown."""
    last = {(same_call(row), row.provider): row for row in rows}
    order = {op: index for index, op in enumerate((*VOCABULARY_OPS, *SEQUENCE_OPS))}

    def key(row: Row) -> tuple[object, ...]:
        call = (row.dtype, row.inputs, row.ignored, row.num_rows, row.shape)
        return (row.device, order[row.op], MODES.index(row.mode), *call, row.provider)

    return sorted(last.values(), key=key)


def render(rows: Sequence[Row], cases: Sequence[CaseRow] = ()) -> tuple[str, dict[str, str]]:
    """(Markdown, file name -> SVG). cases: rows of `make gpu`'s other stages."""
    rows = latest(rows)
    parts, plots = [_HEADER], {}
    kinds = {device_kind(row) for row in rows}
    for device in dict.fromkeys(row.device for row in (*rows, *cases)):
        mine = [row for row in rows if row.device == device]
        parts += [f"\n## {device}\n", _environment(mine), _verdict_table(mine)]
        parts.append(_text(case_tables([row for row in cases if row.device == device])))
        for op in dict.fromkeys(row.op for row in mine):
            for mode in MODES:
                for group in _groups([r for r in mine if (r.op, r.mode) == (op, mode)]):
                    parts.append(_table(group))
                    if any(row.ratio is not None for row in group):
                        name, chart = _chart(group)
                        plots[name] = chart
                        parts.append(f"\n![{_title(group[0])}](plots/{name})\n")
        for curve in _curves(mine):
            plots |= curve
            parts += [f"\n![{name}](plots/{name})\n" for name in curve]
        parts.append(_reasons(mine))
    if "cuda" not in kinds:
        parts.append(_NO_GPU)
    if "cpu" not in kinds:
        parts.append(_NO_CPU)
    return "".join(parts), plots


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """By dtype, inputs and fraction of ignored rows."""
    keys = dict.fromkeys((r.dtype, r.inputs, r.ignored) for r in rows)
    return [[r for r in rows if (r.dtype, r.inputs, r.ignored) == key] for key in keys]


def _environment(rows: Sequence[Row]) -> str:
    """Versions and dates, one line for each combination that occurs."""
    lines = dict.fromkeys(
        f"* {row.date}: torch {row.torch}, triton {row.triton}, Python {row.python}, "
        f"{row.num_threads} threads, kernel sources `{row.sources}`; `{row.command}`\n"
        for row in sorted(rows, key=lambda row: row.date)
    )
    return "\n" + "".join(lines)


def _verdict_table(rows: Sequence[Row]) -> str:
    if not verdicts(rows):
        return "\nNo row of ours that a limit is asked of.\n"
    return "\n### What is asked\n" + _text(claims(rows))


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _title(row: Row) -> str:
    ignored = f", {row.ignored:.0%} ignored rows" if row.ignored else ""
    inputs = "" if row.inputs == "normal" else f", {row.inputs}"
    return f"{row.op}, {row.mode}, {row.dtype}{ignored}{inputs}"


def _table(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row.p50_ms is not None]
    title = f"\n### {_title(rows[0])}\n\n"
    if not measured:
        return f"{title}No provider has a time.\n"
    anchor = measured[0].anchor
    rate = "TFLOP/s" if measured[0].hidden_size is not None else "GB/s"
    lines = [
        title,
        f"| shape | provider | p50 ms (p20 to p80) | over {anchor} | {rate} "
        "| peak MiB beyond results | worst error (eager's) |\n",
        "| --- | --- | --- | --- | --- | --- | --- |\n",
    ]
    for row in measured:
        name = f"**{row.provider}**" if is_ours(row) else row.provider
        value = row.tflops if row.tflops is not None else row.gb_per_s
        extra = beyond_results_mib(row)
        lines.append(
            f"| {row.shape} | {name} | {row.p50_ms:.4g} ({row.p20_ms:.4g} to {row.p80_ms:.4g}) "
            f"| {row.ratio:.3f} | {value:.3g} | {extra:.1f} | {_worst(row)} |\n"
        )
    return "".join(lines)


def _worst(row: Row) -> str:
    """The error that is largest against eager's, with its name."""
    if not row.errors:
        return ""
    eager = row.eager_errors
    name = max(row.errors, key=lambda n: (row.errors[n] / (eager.get(n) or 1e-300), n))
    return f"{name} {row.errors[name]:.1e} ({eager.get(name, 0.0):.1e})"


def _chart(rows: Sequence[Row]) -> tuple[str, str]:
    shapes = dict.fromkeys(row.shape for row in rows if row.ratio is not None)
    groups = [
        (
            shape,
            [
                Bar(row.provider, row.ratio, is_ours(row))
                for row in sorted(rows, key=lambda r: (r.ratio or 0.0, r.provider))
                if row.shape == shape and row.ratio is not None
            ],
        )
        for shape in shapes
    ]
    first = next(row for row in rows if row.ratio is not None)
    title = f"{_title(first)}: time over {first.anchor}"
    slug = _slug(f"{first.device} {_title(first)}")
    return f"{slug}.svg", bar_chart(title, groups, 1.0, first.anchor or "")


def _curves(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """Time against memory: one plot for each call that has rows under several workspace bounds."""
    for call in dict.fromkeys(same_call(row) for row in rows if row.workspace_bytes is not None):
        mine = [
            row
            for row in rows
            if same_call(row) == call and row.ratio is not None and row.peak_extra_mib is not None
        ]
        bounded = [row for row in mine if row.workspace_bytes is not None]
        if len(bounded) < 2:
            continue
        first = bounded[0]
        points = [
            Point(row.provider, row.peak_extra_mib or 0.0, row.ratio or 0.0, is_ours(row))
            for row in mine
        ]
        title = f"{_title(first)}, {first.shape}: time over {first.anchor} against peak MiB"
        yield {
            f"{_slug(f'{first.device} {_title(first)} {first.shape} memory')}.svg": curve_chart(
                title, points, "peak MiB, results included", f"time over {first.anchor}"
            )
        }


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _reasons(rows: Sequence[Row]) -> str:
    lines = absent(rows)
    return "\n### Not measured\n" + _text(lines) if lines else ""


def write(folder: Path) -> None:
    """README.md and plots/*.svg from the rows in `folder` and its gpu/; other plots are removed."""
    files = sorted([*folder.glob("*.jsonl"), *(folder / "gpu").glob("*.jsonl")])
    text, plots = render(read_rows(files), read_cases(files))
    (folder / "README.md").write_text(text, encoding="utf-8")
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    for stale in target.glob("*.svg"):
        if stale.name not in plots:
            stale.unlink()
    for name, chart in plots.items():
        (target / name).write_text(chart, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").partition("\n")[0]
    )
    made.add_argument("--results", type=Path, default=RESULTS, help="folder with the rows")
    options = made.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    write(options.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
