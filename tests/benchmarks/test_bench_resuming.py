"""A comparison that was ended, and what the next process does with its file."""

from __future__ import annotations

import pytest
import torch

from benchmarks import compare
from benchmarks.cases import CUT_SHORT, RESTART
from benchmarks.measure import Session
from benchmarks.problems import normal_problem
from benchmarks.products import BOTH, FORWARD
from benchmarks.providers.eager import Eager
from benchmarks.resuming import LOST, Progress, call_of
from benchmarks.rows import environment, read_cases, read_rows
from benchmarks.shapes import Shape

SHAPE = Shape("test", 16, 8, 50)
OPS = ("linear_logprobs", "linear_token_stats", "linear_cross_entropy")
CASES = [compare.Case(op, SHAPE) for op in OPS]


class Provider(Eager):
    """Eager under another name; `build` may be told to fail."""

    def __init__(self, name, fails=None):
        self.name, self.fails, self.built = name, fails, []

    def build(self, op, problem):
        self.built.append(op)
        if self.fails is not None:
            raise self.fails
        return super().build(op, problem)


@pytest.fixture
def run(tmp_path, monkeypatch, cpu):
    """run(providers) -> exit status of a process that compares them on CASES."""
    monkeypatch.setattr(compare, "make_cases", lambda options: CASES)
    monkeypatch.setattr(
        compare, "_problem", lambda *_: normal_problem(SHAPE, torch.float32, cpu, seed=1)
    )
    processes = iter(range(100))

    def start(providers, *arguments):
        monkeypatch.setattr(compare, "providers_named", lambda names: list(providers))
        number = next(processes)
        monkeypatch.setattr(Session, "process", property(lambda self: f"process {number}"))
        out = str(tmp_path / "rows.jsonl")
        few = ("--device", "cpu", "--seconds", "0.001", "--rounds", "1", "1")
        return compare.main(["--resume", "--out", out, *few, *arguments])

    return start


def rows_of(tmp_path, provider):
    return [row for row in read_rows([tmp_path / "rows.jsonl"]) if row.provider == provider]


def test_calls_whose_rows_are_there_are_left_out(run, tmp_path, capsys):
    ours = Provider("ours")
    assert run([ours], "--budget", "0") == CUT_SHORT
    assert run([ours]) == 0
    assert sorted(ours.built) == sorted(OPS)
    assert run([ours]) == 0
    assert sorted(ours.built) == sorted(OPS)
    assert capsys.readouterr().out.count("its rows are there") == len(OPS)
    peer = Provider("peer")
    assert run([ours, peer]) == 0, "one of them has no row"
    assert len(ours.built) == 2 * len(OPS) and len(peer.built) == len(OPS)
    modes = [row.mode for row in rows_of(tmp_path, "peer")]
    assert modes == [FORWARD, BOTH, FORWARD, FORWARD, BOTH]


def test_who_ends_the_context_has_a_row_and_is_left_out_after_the_second(run, tmp_path):
    wild = Provider("wild", RuntimeError("Triton Error [CUDA]: an illegal memory access"))
    ours = Provider("ours")
    statuses = [run([ours, wild]) for _ in range(3)]
    assert statuses == [RESTART, RESTART, 0]
    assert wild.built == list(OPS[:2])
    reasons = [row.reason for row in rows_of(tmp_path, "wild")]
    assert all(reason.startswith(LOST) for reason in reasons[:2])
    assert reasons[-1] == "left out: it ended the CUDA context in 2 other calls"
    timed = {(row.op, row.mode) for row in rows_of(tmp_path, "ours") if row.p50_ms is not None}
    assert len(timed) == 5, "everything of the others is measured"
    assert run([ours, wild]) == 0 and len(wild.built) == 2


def test_who_is_checked_as_two_processes_end_is_left_out_of_the_call(run, tmp_path):
    hanging, ours = Provider("hanging", KeyboardInterrupt()), Provider("ours")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run([hanging, ours])
    assert hanging.built == [OPS[0]] * 2 and not ours.built
    hanging.fails = None
    assert run([hanging, ours]) == 0
    assert hanging.built[2:] == list(OPS[1:]) and ours.built == list(OPS)
    assert "2 processes were ended" in rows_of(tmp_path, "hanging")[0].reason


def test_one_end_from_outside_is_held_against_nobody(run, tmp_path):
    slow = Provider("slow", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run([slow])
    slow.fails = None
    assert run([slow]) == 0
    assert all(row.reason is None for row in rows_of(tmp_path, "slow"))


def test_a_call_whose_timing_ends_two_processes_is_given_up(run, monkeypatch, capsys):
    ours = Provider("ours")

    def end(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as inside:
        inside.setattr("benchmarks.measure.time_in_turns", end)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run([ours])
    assert run([ours]) == 0
    assert f"{OPS[0]} test ignored 0: given up" in capsys.readouterr().out
    assert ours.built == [OPS[0]] * 2 + list(OPS[1:])


def test_rows_of_other_sources_do_not_count(tmp_path, run, cpu):
    assert run([Provider("ours")]) == 0
    path, common = tmp_path / "rows.jsonl", environment(cpu)
    call = call_of(OPS[0], "test", 0.0, "float32")
    assert Progress(path, common).done(call, ["ours"], [FORWARD])
    for field in ("sources", "device", "torch", "triton"):
        assert not Progress(path, common | {field: "other"}).done(call, ["ours"], [FORWARD])
    assert all(case.part == "compare" for case in read_cases([path]))


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("1000", 1000), ("64M", 64 * 2**20), ("4G", 2**32)]
)
def test_bounds_of_the_workspace(text, number):
    assert compare.parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "M", "1.5G", "-1", "4g", "4GB"])
def test_a_bad_bound_is_named(text, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--workspaces", text, "--device", "cpu"])
    assert f"--workspaces {text!r}" in capsys.readouterr().err
