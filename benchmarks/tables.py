"""Tables of what `make gpu` measured besides the comparison, from the rows and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import short
from benchmarks.limits import verdicts
from benchmarks.rows import CaseRow, Row

_LONGEST = 4
_WITHOUT_TABLE = ("begun", "passed")


def latest_cases(rows: Sequence[CaseRow]) -> list[CaseRow]:
    """The last row of each case that ended, in the order of the cases' first."""
    last = {(r.device, r.part, r.case): r for r in rows if r.status != "begun"}
    return list(last.values())


def case_tables(rows: Sequence[CaseRow]) -> list[str]:
    """Lines for one device: ceilings, time by kernel, candidates, counters, what did not pass."""
    cases = latest_cases(rows)
    parts = {
        part: [row for row in cases if row.part == part and row.status == "passed"]
        for part in ("ceilings", "profile", "sweep", "counters")
    }
    lines = [
        *_ceilings(parts["ceilings"]),
        *_profile(parts["profile"]),
        *_sweep(parts["sweep"]),
        *_counters(parts["counters"]),
    ]
    others = [row for row in cases if row.status not in _WITHOUT_TABLE and row.part != "compare"]
    if others:
        lines += ["", "| part | case | status | |", "| --- | --- | --- | --- |"]
        lines += [_line(r.part, r.case, r.status, r.reason or "") for r in others]
    return lines


def _ceilings(rows: Sequence[CaseRow]) -> list[str]:
    if not rows:
        return []
    lines = ["", "| ceiling | rate | p50 ms |", "| --- | --- | --- |"]
    for row in rows:
        tflops, rate = row.figures.get("tflops"), row.figures.get("gb_per_s")
        said = f"{tflops:.3g} TFLOP/s" if tflops is not None else f"{rate:.4g} GB/s"
        lines.append(_line(row.case, said, short(row.figures["p50_ms"])))
    return lines


def _profile(rows: Sequence[CaseRow]) -> list[str]:
    if not rows:
        return []
    lines = [
        "",
        "| operation and shape | ms | TFLOP/s | of it no kernel | the longest kernels, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        found = row.figures
        kernels = sorted(found["kernels"].items(), key=lambda item: -item[1])[:_LONGEST]
        said = ", ".join(f"`{name[:48]}` {value:.3g}" for name, value in kernels)
        times = (found["call_ms"], found["tflops"], found["gap_ms"])
        lines.append(_line(row.case, *(f"{value:.4g}" for value in times), said))
    return lines


def _sweep(rows: Sequence[CaseRow]) -> list[str]:
    if not rows:
        return []
    lines = [
        "",
        "| operation and shape | shipped ms | time of each candidate over it |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        ratios = {k: v for k, v in row.figures.items() if k != "shipped_ms"}
        measured = sorted((v, k) for k, v in ratios.items() if not isinstance(v, str))
        said = [f"{name} {value:.3f}" for value, name in measured]
        said += [f"{name}: {value}" for name, value in ratios.items() if isinstance(value, str)]
        lines.append(_line(row.case, short(row.figures["shipped_ms"]), "; ".join(said)))
    return lines


def _counters(rows: Sequence[CaseRow]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        lines += ["", f"| {row.case} | |", "| --- | --- |"]
        lines += [_line(name, short(value)) for name, value in row.figures.items()]
    return lines


def claims(rows: Sequence[Row]) -> list[str]:
    """Lines of a table with every claim and what was measured; rows: the latest."""
    found = verdicts(rows)
    if not found:
        return ["", "No row of ours with a time."]
    lines = [
        "",
        "| operation | shape | ignored | mode | claim | measured | asked | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for v in found:
        row, met = v.row, "yes" if v.met else "**no**"
        call = (row.op, row.shape, f"{row.ignored:g}", row.mode)
        lines.append(_line(*call, v.claim, v.measured, v.asked, met))
    return lines


def absent(rows: Sequence[Row]) -> list[str]:
    """Lines of a table with why a provider has no time, once for each reason."""
    calls: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason is not None:
            calls.setdefault((row.provider, row.reason), []).append(row.op)
    if not calls:
        return []
    lines = ["", "| provider | operations | reason |", "| --- | --- | --- |"]
    for (provider, reason), ops in sorted(calls.items()):
        lines.append(_line(provider, ", ".join(dict.fromkeys(ops)), reason))
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
