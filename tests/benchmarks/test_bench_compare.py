"""The comparison as a whole: checked first, then timed, one row for each provider."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import compare, measure
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.measure import Session, measure_vocabulary
from benchmarks.measure_sequences import measure_sequences
from benchmarks.problems import normal_problem, sequence_problem
from benchmarks.products import BOTH, FORWARD, copy, num_products, product_flops, products
from benchmarks.providers.eager import Eager
from benchmarks.rows import environment, read_rows
from benchmarks.shapes import SequenceShape, Shape

SHAPE = Shape("test", 64, 16, 500)


class Wrong(Eager):
    """Right in forward, and with gradients one row of the weight has a part in everything."""

    name = "wrong"

    def build(self, op, problem):
        right = super().build(op, problem)

        def run():
            outputs = right()
            if torch.is_grad_enabled():
                return {
                    name: value + 1e-3 * problem.weight[3].sum() for name, value in outputs.items()
                }
            return outputs

        return run


class Broken(Eager):
    name = "broken"

    def build(self, op, problem):
        raise RuntimeError("no kernel image\nand a long story")


class OutOfMemory(Eager):
    """Right when it is checked, and without room when it is timed."""

    name = "out-of-memory"

    def build(self, op, problem):
        right, calls = super().build(op, problem), []

        def run():
            calls.append(None)
            if len(calls) > 1:
                raise MemoryError("no room")
            return right()

        return run


class Wild(Eager):
    name = "wild"

    def build(self, op, problem):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class HalfInstalled(Eager):
    name = "half-installed"

    def missing(self, device):
        raise OSError("libcute.so: cannot open")


class Refusing(Eager):
    name = "refusing"

    def refuses(self, op, problem, backward):
        return "only on Tuesdays"


@pytest.fixture
def session(tmp_path, cpu):
    return Session(
        device=cpu,
        dtype=torch.float32,
        providers=[Eager(), Broken(), HalfInstalled(), Refusing()],
        named=None,
        environment=environment(cpu),
        out=tmp_path / "rows.jsonl",
        seconds=0.01,
        rounds=(2, 3),
        deadline=time.monotonic() + 1000,
    )


@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_rows_of_a_vocabulary_operation(op, session, cpu, capsys):
    problem = normal_problem(SHAPE, torch.float32, cpu, ignored=0.4)
    modes = [FORWARD] if op == "linear_token_stats" else [FORWARD, BOTH]
    rows = measure_vocabulary(session, op, problem, 0.4, modes)
    assert read_rows([session.out]) == rows
    assert [row.mode for row in rows] == [mode for mode in modes for _ in session.providers]
    for row in rows:
        assert (row.op, row.shape, row.ignored, row.num_live) == (op, "test", 0.4, problem.num_live)
        if row.provider != "torch-eager":
            assert row.p50_ms is row.ratio is row.peak_extra_mib is None
    by_name = {row.provider: row for row in rows}
    assert by_name["broken"].reason == "RuntimeError: no kernel image"
    assert by_name["broken"].passed is False
    assert by_name["half-installed"].reason == "OSError: libcute.so: cannot open"
    assert by_name["refusing"].reason == "only on Tuesdays"
    timed = by_name["torch-eager"]
    assert timed.passed
    assert timed.p20_ms <= timed.p50_ms <= timed.p80_ms
    assert timed.rounds in (2, 3)
    assert timed.ratio * timed.share == pytest.approx(1)
    count = num_products(op, modes[-1])
    assert timed.anchor == ("1 product" if count == 1 else f"{count} products")
    flops = 2 * count * problem.num_live * 16 * 500
    assert timed.tflops == pytest.approx(flops / timed.p50_ms * 1e3 / 1e12)
    if modes[-1] == BOTH:
        assert {"d_hidden", "d_weight"} < set(timed.errors)
        assert timed.result_mib == pytest.approx((64 + 500) * 16 * 4 / 2**20, abs=1e-3)
    assert "no time: only on Tuesdays" in capsys.readouterr().out


def test_what_failed_its_check_gets_no_time(session, cpu):
    session.providers = [Wrong(), Eager()]
    problem = normal_problem(SHAPE, torch.float32, cpu)
    for row in measure_vocabulary(session, "linear_cross_entropy", problem, 0.0, [FORWARD, BOTH]):
        assert row.passed == (row.provider == "torch-eager") == (row.p50_ms is not None)
        if row.provider == "wrong":
            assert row.reason == "an error is more than twice eager's"
            assert row.errors["d_weight"] > row.eager_errors["d_weight"] * 100


def test_what_fails_when_it_is_timed_says_why(session, cpu):
    session.providers = [OutOfMemory(), Eager()]
    problem = normal_problem(SHAPE, torch.float32, cpu)
    bad, good = measure_vocabulary(session, "linear_logprobs", problem, 0.0, [BOTH])
    assert (bad.reason, bad.passed, bad.p50_ms) == ("MemoryError: no room", True, None)
    assert good.p50_ms is not None


def test_a_lost_context_ends_the_run_and_names_its_provider(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "providers_named", lambda names: [Eager(), Wild()])
    out = str(tmp_path / "rows.jsonl")
    assert compare.main(["--shapes", "24x8x100", "--device", "cpu", "--out", out]) == 3
    assert capsys.readouterr().out.splitlines()[-1] == f"{compare.CONTEXT_LOST}wild"


@pytest.mark.parametrize("op", ["gae", "token_rewards"])
def test_rows_of_a_sequence_operation(op, session, cpu):
    problem = sequence_problem(SequenceShape("1000/7", 1000, 7), cpu)
    rows = {row.provider: row for row in measure_sequences(session, op, problem)}
    assert {"s2srm-reference", "torch-padded"} <= set(rows)
    for name in ("s2srm-reference", "torch-padded"):
        row = rows[name]
        assert row.passed
        assert row.anchor == "copy"
        assert row.num_sequences == 7
        bytes_per_token = 16 if op == "gae" else 20
        assert row.gb_per_s == pytest.approx(bytes_per_token * 1000 / row.p50_ms * 1e3 / 1e9)


def test_a_wrong_sequence_result_gets_no_time(session, cpu, monkeypatch):
    problem = sequence_problem(SequenceShape("1000/7", 1000, 7), cpu)

    def off(rewards, values, mask):
        return rewards + 1e-3, values

    monkeypatch.setattr("benchmarks.providers.sequences._padded_gae", off)
    rows = {row.provider: row for row in measure_sequences(session, "gae", problem)}
    assert rows["torch-padded"].passed is False
    assert rows["torch-padded"].p50_ms is None


@pytest.mark.parametrize("count", [1, 3, 4])
def test_products_are_those_of_the_live_rows(count, cpu):
    problem = normal_problem(SHAPE, torch.float32, cpu, ignored=0.5)
    run = products(problem, count)
    cells = {
        name: cell.cell_contents
        for name, cell in zip(run.__code__.co_freevars, run.__closure__, strict=True)
    }
    run()
    hidden, weight = problem.hidden[problem.live], problem.weight
    logits = hidden @ weight.t()
    torch.testing.assert_close(cells["logits"], logits.detach())
    if count > 1:
        torch.testing.assert_close(cells["d_hidden"], (logits @ weight).detach())
        torch.testing.assert_close(cells["d_weight"], (logits.t() @ hidden).detach())
    assert product_flops(problem, count) == 2 * count * problem.num_live * 16 * 500


def test_copy_moves_the_bytes_of_the_operation(cpu):
    problem = sequence_problem(SequenceShape("s", 1000, 3), cpu)
    run = copy("gae", problem)
    cells = [cell.cell_contents for cell in run.__closure__]
    assert sum(tensor.nbytes for tensor in cells) == 16 * 1000
    run()
    assert torch.equal(*cells)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    shape = ["--shapes", "24x8x100", "20x8x90", "--sequences", "50/3", "--ignored", "0", "0.4"]
    assert (
        compare.main(
            [
                *("--op", "linear_ppo_loss", "gae", *shape, "--mode", "forward"),
                *("--providers", "torch-eager", "s2srm-reference", "quack"),
                *("--device", "cpu", "--seconds", "0", "--rounds", "1", "1", "--out", str(out)),
            ]
        )
        == 0
    )
    rows = read_rows([out])
    calls = {(row.op, row.shape, row.ignored) for row in rows}
    vocabulary = {("linear_ppo_loss", s, i) for s in ("24x8x100", "20x8x90") for i in (0.0, 0.4)}
    assert calls == {*vocabulary, ("gae", "50/3", 0.0)}
    assert {row.provider for row in rows} == {"torch-eager", "s2srm-reference", "quack"}
    assert {row.mode for row in rows} == {"forward"}


def test_the_budget_names_what_it_drops(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    compare.main(["--shapes", "24x8x100", "--device", "cpu", "--budget", "0", "--out", str(out)])
    assert not out.exists()
    printed = capsys.readouterr().out
    assert "no time left for 4: linear_cross_entropy 24x8x100 ignored 0;" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "gpt-5"], "gpt-5"),
        (["--providers", "nobody"], "nobody"),
        (["--sequences", "0/0"], "0/0"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        compare.main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_the_anchor_is_gone_before_memory_is_measured(session, cpu, monkeypatch):
    """Its logits would be in use already, and eager's would come on top all the same."""
    session.providers = [Eager()]
    problem = normal_problem(Shape("large", 256, 8, 2**14), torch.float32, cpu)
    rows = measure.measure_vocabulary(session, "linear_cross_entropy", problem, 0.0, [FORWARD])
    assert rows[0].peak_extra_mib > 256 * 2**14 * 4 / 2**20


def test_losses_are_timed_as_loss_backward(cpu):
    problem = normal_problem(SHAPE, torch.float32, cpu)
    run = Eager().build("linear_cross_entropy", problem)
    _, checked = measure.outputs_and_gradients(run, problem, backward=True)
    _, timed = measure.outputs_and_gradients(run, problem, backward=True, checked=False)
    factor = problem.upstream("loss")
    assert factor != 1
    torch.testing.assert_close(timed["weight"] * factor, checked["weight"])
    run = Eager().build("linear_logprobs", problem)
    _, checked = measure.outputs_and_gradients(run, problem, backward=True)
    _, timed = measure.outputs_and_gradients(run, problem, backward=True, checked=False)
    torch.testing.assert_close(timed["weight"], checked["weight"])
