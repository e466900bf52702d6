"""Tables, plots and verdicts from made-up rows."""

from __future__ import annotations

import dataclasses
import random
from xml.etree import ElementTree

import pytest

from benchmarks import report
from benchmarks.charts import Bar, bar_chart, curve_chart
from benchmarks.limits import beyond_results_mib, verdicts
from benchmarks.report import latest, render, write
from benchmarks.rows import Row, append_line, append_row

CPU, GPU = "CPU Intel Xeon", "NVIDIA H100 80GB HBM3"
SHAPE = "2048x640x65536"


def row(provider, ms, ratio=1.1, **fields):
    common = {
        "op": "linear_cross_entropy",
        "version": "1",
        "shape": SHAPE,
        "num_rows": 2048,
        "num_live": 2048,
        "hidden_size": 640,
        "vocab_size": 65536,
        "dtype": "float32",
        "ignored": 0.0,
        "mode": "forward+backward",
        "inputs": "normal",
        "device": CPU,
        "torch": "2.13",
        "triton": "3.9",
        "python": "3.11",
        "num_threads": 2,
        "sources": "abc",
        "command": "python -m benchmarks.compare",
        "date": "2026-11-22",
        "passed": True,
        "errors": {"d_weight": 2e-7},
        "eager_errors": {"d_weight": 1e-7},
    }
    if ms is not None:
        common |= {
            "p20_ms": ms * 0.9,
            "p50_ms": ms,
            "p80_ms": ms * 1.2,
            "rounds": 5,
            "anchor": "3 products",
            "anchor_ms": ms / ratio,
            "ratio": ratio,
            "share": 1 / ratio,
            "tflops": 0.1,
            "peak_extra_mib": 200.0,
            "result_mib": 165.0,
        }
    return Row(**{**common, "provider": provider, **fields})


def gpu_row(provider, ms, ratio=1.05, **fields):
    return row(
        *(provider, ms, ratio),
        **{
            "device": GPU,
            "shape": "gemma-2b:8192",
            "num_rows": 8192,
            "dtype": "bfloat16",
            **fields,
        },
    )


ROWS = [
    row("s2srm-cpp", 900.0),
    row("torch-eager", 1200.0, 1.4),
    row("quack", None, reason="needs a GPU", passed=None, errors={}),
    row("s2srm-cpp", 910.0, ignored=0.4),
    gpu_row("s2srm-triton", 40.0),
    gpu_row("liger-triton", 160.0, 4.2, peak_extra_mib=5000.0),
]


def claims(rows):
    return {v.claim: (v.measured, v.met) for v in verdicts(rows)}


def test_the_order_of_the_rows_changes_nothing():
    expected = render(ROWS)
    for seed in range(5):
        shuffled = ROWS.copy()
        random.Random(seed).shuffle(shuffled)
        assert render(shuffled) == expected


def test_the_last_row_of_a_call_counts():
    rows = [row("s2srm-cpp", 900.0), row("torch-eager", 1.0), row("s2srm-cpp", 700.0)]
    assert [r.p50_ms for r in latest(rows)] == [700.0, 1.0]
    assert "| 700 (630 to 840) |" in render(rows)[0]
    assert "900" not in render(rows)[0]


def test_tables_say_what_was_measured():
    text, plots = render(ROWS)
    assert "| quack | linear_cross_entropy | needs a GPU |" in text
    assert "linear_cross_entropy, forward+backward, float32, 40% ignored rows" in text
    assert "| 35.0 | d_weight 2.0e-07 (1.0e-07) |" in text
    assert "**s2srm-cpp** | 900 (810 to 1080) | 1.100 |" in text
    for name, chart in plots.items():
        assert f"](plots/{name})" in text
        root = ElementTree.fromstring(chart)
        assert root.tag.endswith("svg")
        assert [e.text for e in root.iter() if e.text and "product" in e.text]


def test_missing_devices_are_said_plainly():
    text, _ = render(ROWS[:2])
    assert "There are no rows of a GPU yet" in text
    text, _ = render(ROWS[4:])
    assert "There are no rows of a CPU yet" in text
    assert "no rows of a GPU" not in text
    text, plots = render([])
    assert "no rows of a GPU" in text
    assert "no rows of a CPU" in text
    assert plots == {}


def test_only_failures():
    text, plots = render([row("torch-eager", None, reason="out of memory", passed=False)])
    assert "No provider has a time." in text
    assert "out of memory" in text
    assert plots == {}


def test_files(tmp_path):
    for one in ROWS:
        append_row(tmp_path / "a.jsonl", one)
    (tmp_path / "plots").mkdir()
    stale = tmp_path / "plots" / "stale.svg"
    stale.write_text("old")
    assert report.main(["--results", str(tmp_path)]) == 0
    first = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert not stale.exists()
    write(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == first
    assert first["README.md"].decode() == render(ROWS)[0]


def test_cpu_limits():
    met = claims([row("s2srm-cpp", 900.0, 1.15), row("torch-eager", 900.0)])
    assert met["time over 3 products"] == ("1.150", True)
    assert met["speed over torch-eager"] == ("1.00", True)
    assert met["MiB beyond results"] == ("35.0", True)
    assert met["error over eager's"] == ("2.00", True)
    missed = claims(
        [
            row("s2srm-cpp", 900.0, 1.16, peak_extra_mib=229.0),
            row("torch-eager", 890.0),
            # Not a baseline on the CPU.
            row("torch-chunked", 1.0),
        ]
    )
    assert missed["time over 3 products"] == ("1.160", False)
    assert missed["speed over torch-eager"] == ("0.99", False)
    assert missed["MiB beyond results"] == ("64.0", False)


def test_no_limit_is_asked_of_other_shapes_or_backends():
    other = claims([row("s2srm-cpp", 900.0, 3.0, shape="100x10x10")])
    assert set(other) == {"error over eager's"}
    assert claims([row("s2srm-reference", 900.0, 3.0), row("torch-eager", 1.0)]) == {}


def test_a_failed_check_is_a_verdict():
    failed = row("s2srm-cpp", None, passed=False, errors={"d_weight": 1e-3}, reason="wrong")
    assert claims([failed])["error over eager's"] == ("10000.00", False)


def test_gpu_limits():
    rows = [
        gpu_row("s2srm-triton", 40.0, 1.1, peak_extra_mib=400.0),
        gpu_row("quack", 41.0, peak_extra_mib=500.0),
        gpu_row("cce", 80.0, peak_extra_mib=450.0),
        gpu_row("s2srm-reference", 10.0),
        gpu_row("cce-exact", None, reason="wrong", passed=False),
        gpu_row("verl", 1.0, ignored=0.4),
    ]
    found = claims(rows)
    assert found["time over 3 products"] == ("1.100", True)
    assert found["speed over quack"] == ("1.02", True)
    assert found["peak MiB of s2srm-triton, least of peers: cce"] == ("400.0", True)
    lean = [*rows, gpu_row("liger-triton", 90.0, peak_extra_mib=300.0)]
    claim = "least of peers: liger-triton"
    assert claims(lean)[f"peak MiB of s2srm-triton, {claim}"] == ("400.0", False)
    lean.append(gpu_row("s2srm-triton-64MiB", 60.0, workspace_bytes=2**26, peak_extra_mib=290.0))
    assert claims(lean)[f"peak MiB of s2srm-triton-64MiB, {claim}"] == ("290.0", True)
    assert claims(lean)["speed over quack"] == ("1.02", True)
    rows[0] = dataclasses.replace(rows[0], p50_ms=42.0, peak_extra_mib=460.0, ratio=1.11)
    found = claims(rows)
    assert found["time over 3 products"] == ("1.110", False)
    assert found["speed over quack"] == ("0.98", False)
    assert found["peak MiB of s2srm-triton, least of peers: cce"] == ("460.0", False)


def sequence_row(**fields):
    return gpu_row(
        "s2srm-cpp", 1.0, **{"op": "gae", "hidden_size": None, "mode": "forward", **fields}
    )


def test_gpu_limits_of_sequences():
    long = sequence_row(num_rows=2**24, ratio=1.9)
    assert claims([long])["time over copy"] == ("1.90", True)
    assert not claims([dataclasses.replace(long, ratio=2.1)])["time over copy"][1]
    short = sequence_row(num_rows=2**13, kernel_ms=0.0199)
    assert claims([short])["microseconds of kernels"] == ("19.9", True)
    assert not claims([dataclasses.replace(short, kernel_ms=0.02)])["microseconds of kernels"][1]
    assert claims([dataclasses.replace(short, provider="s2srm-reference")]) == {}


def test_memory_beyond_results():
    assert beyond_results_mib(row("s2srm-cpp", 1.0)) == 35.0
    assert beyond_results_mib(row("s2srm-cpp", 1.0, peak_extra_mib=1.0)) == 0.0
    assert beyond_results_mib(row("s2srm-cpp", None)) is None


def test_bars():
    bars = [Bar("ours <&>", 1.05, True), Bar("slow", 90.0, False)]
    root = ElementTree.fromstring(bar_chart("a & b", [("shape", bars)], 1.0, "3 products"))
    widths = [float(e.attrib["width"]) for e in root.iter() if e.tag.endswith("rect")]
    assert widths[1] / widths[0] == pytest.approx(8 / 1.05, rel=1e-2)
    texts = [e.text for e in root.iter() if e.text]
    assert "90.00 (cut)" in texts
    assert "ours <&>" in texts
    with pytest.raises(ValueError, match="no bars"):
        bar_chart("empty", [("shape", [])], 1.0, "x")


def test_time_against_memory_is_a_plot_of_ours_and_the_peers():
    rows = [
        gpu_row("s2srm-triton", 40.0, 1.08, peak_extra_mib=4000.0),
        gpu_row("quack", 41.0, 1.10, peak_extra_mib=6000.0),
        gpu_row("verl", None, reason="wrong"),
    ]
    assert not any("memory" in name for name in render(rows)[1])
    for mib, ratio in ((0, 1.4), (1024, 1.2)):
        fields = {"workspace_bytes": mib * 2**20, "peak_extra_mib": 500.0 + mib}
        rows.append(gpu_row(f"s2srm-triton-{mib}MiB", 50.0, ratio, **fields))
    text, plots = render(rows)
    (name,) = (name for name in plots if "memory" in name)
    assert f"](plots/{name})" in text and "gemma-2b-8192-memory" in name
    root = ElementTree.fromstring(plots[name])
    line = next(e.attrib["points"] for e in root.iter() if e.tag.endswith("polyline"))
    xs, ys = zip(*(map(float, point.split(",")) for point in line.split()), strict=True)
    assert len(xs) == 3 and list(xs) == sorted(xs), "ours alone, from lean to fast"
    assert list(ys) == sorted(ys), "faster is lower, and lower on the page is a larger y"
    assert sum(e.tag.endswith("circle") for e in root.iter()) == 4
    with pytest.raises(ValueError, match="no points"):
        curve_chart("empty", [], "x", "y")


def test_the_report_has_the_other_stages_of_make_gpu(tmp_path):
    common = {"device": GPU, "sources": "s", "command": "c", "date": "d", "torch": "2.11"}
    path = tmp_path / "gpu" / "nvidia.jsonl"
    kernels = {f"kernel_{index}": float(9 - index) for index in range(6)}
    figures = {"call_ms": 41.5, "tflops": 700.0, "gap_ms": 0.25, "kernels": kernels}
    swept = {"shipped_ms": 12.0, "group 16": 0.97, "4 stages": "not timed: other lse"}
    for part, case, made in (
        ("ceilings", "copy", {"gb_per_s": 3000.0, "p50_ms": 2.0}),
        ("profile", "linear_ppo_loss gemma-2b:8192", figures),
        ("sweep", "linear_ppo_loss gemma-2b:8192", swept),
        ("counters", "statistics_kernel", {"Occupancy: Registers": "168"}),
    ):
        fields = {"part": part, "case": case, "status": "passed", "figures": made}
        append_line(path, fields | common)
    append_row(path, gpu_row("s2srm-triton", 40.0))
    write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| copy | 3000 GB/s | 2 |" in text
    assert "| 41.5 | 700 | 0.25 | `kernel_0` 9, `kernel_1` 8, `kernel_2` 7, `kernel_3` 6 |" in text
    assert "| 12 | group 16 0.970; 4 stages: not timed: other lse |" in text
    assert "| Occupancy: Registers | 168 |" in text
    assert "**s2srm-triton**" in text and "no rows of a GPU" not in text
