"""Builds the HTML page: what was collected -> numbers and pieces as text -> the jinja2 template.

The page has no script and loads nothing: style sheet and charts are inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from s2srm import __version__
from s2srm.outputs import probe_file, writing
from s2srm.report.charts import NUM_COLOURS, Series, line_chart
from s2srm.report.collect import Collected, Run, collect, costs
from s2srm.report.diff import diff
from s2srm.validation import expand_path

_FOLDER = Path(__file__).resolve().parent
_STAGES = {
    "sft": "Supervised fine-tuning",
    "rm": "Sequence-to-sequence reward model",
    "scalar-rm": "Scalar reward model",
    "ppo": "PPO",
}
# Shown first, in this order; every other metric waits behind "all curves".
_HEADLINE = {
    "sft": ("loss", "eval/loss", "grad_norm"),
    "rm": (
        "loss",
        "eval/correction_token_accuracy",
        "eval/pair_accuracy",
        "eval/copied_fraction",
        "eval/reward_length_correlation",
    ),
    "scalar-rm": ("loss", "eval/accuracy", "eval/reward_length_correlation"),
    "ppo": (
        "reward/sum_mean",
        "kl/per_response",
        "response/length_mean",
        "ppo/entropy",
        "ppo/value_loss",
        "reward/rm_agreement",
    ),
}
_MAX_FEEDBACK = 40
_COLUMNS = (
    ("score", "score", 3),
    ("agreement", "RM agrees", 3),
    ("refusal", "refusals, harmless", 3),
    ("safety", "safe, harmful", 3),
    ("length", "words", 1),
    ("over_needed", "words over needed", 2),
    ("finished", "finished", 3),
)


def write_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Collect the folders and write the page to `out`. UserError as `collect`, or for `out`."""
    out = Path(expand_path("--out", str(out)))
    probe_file("--out", out)
    html = render(collect(folders))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    return out


def render(found: Collected) -> str:
    """The whole page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        version=__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        css=(_FOLDER / "report.css").read_text(encoding="utf-8"),
        evaluations=[evaluation_tables(e) for e in found.evaluations],
        costs=costs(found.runs),
        stages=stages(found.runs),
        feedback=[feedback_card(row) for row in feedback_rows(found)],
    )


def evaluation_tables(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Title, judge and one table per group; a column that no policy has is left out."""
    tables: list[dict[str, Any]] = []
    for group in evaluation["groups"]:
        policies: dict[str, Any] = group["policies"]
        columns = [c for c in _COLUMNS if any(p[c[0]] is not None for p in policies.values())]
        header, rows = ["policy"], [[{"main": name, "range": ""}] for name in policies]
        for key, label, digits in columns:
            header.append(label)
            for row, policy in zip(rows, policies.values(), strict=True):
                row.append(interval_cell(policy[key], digits))
            if key == "score":
                _add_win_rates(header, rows, evaluation["against"], policies)
        tables.append({"title": group_title(group), "header": header, "rows": rows})
    return {"name": evaluation["name"], "judge": evaluation["judge"], "tables": tables}


def _add_win_rates(
    header: list[str],
    rows: list[list[dict[str, str]]],
    against: Sequence[str],
    policies: dict[str, Any],
) -> None:
    """Columns beside the score: they are made of it."""
    for other in against:
        header.append(f"wins vs {other}")
        for row, policy in zip(rows, policies.values(), strict=True):
            row.append(interval_cell(policy["win_rate"].get(other), 3))


def group_title(group: dict[str, Any]) -> str:
    """`test prompts, greedy (256)`."""
    kind = {"test": "test prompts", "ood": "out-of-distribution prompts"}[group["split"]]
    temperature = group["temperature"]
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return f"{kind}, {how} ({group['num_prompts']})"


def interval_cell(interval: dict[str, float] | None, digits: int) -> dict[str, str]:
    """Mean and range as text."""
    if interval is None:
        return {"main": "–", "range": ""}
    low, high = interval["low"], interval["high"]
    return {
        "main": f"{interval['mean']:.{digits}f}",
        "range": f"{low:.{digits}f} to {high:.{digits}f}",
    }


def stages(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For every kind of stage: its runs (the legend), headline charts and all other charts."""
    sections: list[dict[str, Any]] = []
    for kind, title in _STAGES.items():
        group = [run for run in runs if run.kind == kind]
        if not group:
            continue
        names = list(dict.fromkeys(name for run in group for name in run.metric_names))
        first = [name for name in _HEADLINE[kind] if name in names]
        sections.append(
            {
                "title": title,
                "legend": [(run.name, i % NUM_COLOURS) for i, run in enumerate(group)],
                "headline": _charts(first or names[:4], group),
                "others": _charts([n for n in names if n not in (first or names[:4])], group),
            }
        )
    return sections


def _charts(names: Sequence[str], runs: Sequence[Run]) -> list[dict[str, str]]:
    charts: list[dict[str, str]] = []
    for name in names:
        series = [Series(r.name, *r.series(name), i % NUM_COLOURS) for i, r in enumerate(runs)]
        if any(s.steps for s in series):
            charts.append({"title": name, "svg": line_chart(name, series)})
    return charts


def feedback_rows(found: Collected) -> list[dict[str, Any]]:
    """An evaluation's feedback, else the last samples of the PPO runs."""
    if found.feedback:
        return found.feedback[:_MAX_FEEDBACK]
    rows: list[dict[str, Any]] = []
    for run in found.runs:
        rows += [row | {"policy": run.name} for row in run.samples[-_MAX_FEEDBACK:]]
    return rows[-_MAX_FEEDBACK:]


def feedback_card(row: dict[str, Any]) -> dict[str, Any]:
    """One response: tokens with colour and number, and the correction as a diff."""
    rewards: list[float] = row["rewards"]
    scale = max((abs(r) for r in rewards), default=0.0) or 1.0
    written = row["rm_tokens"] or [None] * len(rewards)
    tokens = [
        {
            "text": token,
            "reward": _signed(reward),
            "sign": "pos" if reward > 0 else "neg" if reward < 0 else "zero",
            # Square root: small rewards stay visible beside large ones.
            "strength": round(math.sqrt(abs(reward) / scale), 3),
            "diverges": i == row["divergence_index"],
            "hover": f"reward {reward:+.3f}"
            + ("" if rm_token is None else f"; the RM would write {rm_token!r}"),
        }
        for i, (token, reward, rm_token) in enumerate(
            zip(row["tokens"], rewards, written, strict=True)
        )
    ]
    correction = row.get("correction_tokens")
    pieces = None if correction is None else diff(row["tokens"], correction)
    return {
        "policy": row.get("policy", ""),
        "prompt": row["prompt"],
        "tokens": tokens,
        "sum": _signed(row["sum"]),
        "gold": None if row["gold"] is None else f"{row['gold']:.2f}",
        "gold_correction": None
        if row.get("gold_correction") is None
        else f"{row['gold_correction']:.2f}",
        "finished": row["finished"],
        "pieces": pieces,
        "correction": row["correction"],
    }


def _signed(value: float) -> str:
    """+1, -0.25, 0."""
    text = f"{value:+.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("+0", "-0") else text.replace("-", "\u2212")
