"""A bar on a terminal, few plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from s2srm import progress
from s2srm.progress import ProgressBar


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(total: int, seconds_per_step: float, clock: Clock, steps: int | None = None) -> list[str]:
    out = io.StringIO()
    with ProgressBar(total, "rm", console=Console(file=out, width=200)) as bar:
        for _ in range(total if steps is None else steps):
            clock.now += seconds_per_step
            bar.advance(1, tokens=50, loss=0.5)
    return out.getvalue().splitlines()


def test_fast_work_prints_one_line_at_its_end(clock):
    shown = lines(1000, 0.001, clock)
    assert len(shown) == 1
    assert "1000/1000" in shown[0] and "loss 0.5" in shown[0]


def test_slow_work_prints_a_line_every_five_per_cent(clock):
    shown = lines(100, 10.0, clock)
    assert len(shown) == 20
    assert shown[0] == "rm: step 5/100 | 50 s, 950 s left | 5 tokens/s  loss 0.5"


def test_medium_work_prints_a_line_every_five_seconds(clock):
    assert len(lines(100, 1.0, clock)) == 20
    assert len(lines(1000, 0.1, clock)) == 20


def test_work_that_stops_early_says_where(clock):
    assert "7/1000" in lines(1000, 0.01, clock, steps=7)[-1]


def test_bar_on_a_terminal(clock):
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=True)
    with ProgressBar(10, "ppo", console=console) as bar:
        clock.now += 2.0
        bar.advance(4, tokens=100, kl=0.25)
    assert "4/10" in out.getvalue() and "50 tokens/s" in out.getvalue()
    assert "kl 0.25" in out.getvalue()


def test_other_ranks_are_silent(clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert lines(10, 10.0, clock) == []
