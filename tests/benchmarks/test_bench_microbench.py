"""The bench_*.py files: one for each operation, their cases, and what they time."""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks import microbench
from benchmarks.bench_linear_sample import DecodeShape, bench_linear_sample
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.microbench import time_sequences, time_vocabulary
from benchmarks.providers.sequences import SEQUENCE_OPS
from benchmarks.shapes import SequenceShape, Shape


class Benchmark:
    """The fixture's surface that is used."""

    group = None
    rounds = 0

    def pedantic(self, function, rounds, iterations):
        assert iterations == 1
        self.rounds = rounds
        function()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(microbench, "ON_GPU", False)
    monkeypatch.setattr(microbench, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(microbench, "DTYPE", torch.float32)
    monkeypatch.setattr(microbench, "_SECONDS", 0.01)


@pytest.mark.parametrize("op", (*VOCABULARY_OPS, *SEQUENCE_OPS))
def test_every_operation_has_its_file(op):
    function = getattr(importlib.import_module(f"benchmarks.bench_{op}"), f"bench_{op}")
    (mark,) = function.pytestmark
    providers = {case.values[-1] for case in mark.args[1]}
    anchor = "copy" if op in SEQUENCE_OPS else "products"
    assert {anchor, "s2srm-cpp", "s2srm-reference"} < providers


@pytest.mark.parametrize("name", ["products", "s2srm-reference", "torch-eager"])
@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_vocabulary(op, name):
    benchmark = Benchmark()
    time_vocabulary(benchmark, op, Shape("tiny", 70, 8, 90), "forward", name)
    assert benchmark.group == f"{op}, forward, tiny"
    assert 3 <= benchmark.rounds <= 200


@pytest.mark.parametrize("name", ["copy", "s2srm-reference", "torch-padded"])
@pytest.mark.parametrize("op", SEQUENCE_OPS)
def test_sequences(op, name):
    benchmark = Benchmark()
    time_sequences(benchmark, op, SequenceShape("tiny", 100, 7), name)
    assert benchmark.rounds


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(microbench.checking, "within", lambda *_: False)
    benchmark = Benchmark()
    with pytest.raises(AssertionError):
        time_vocabulary(
            benchmark, "linear_logprobs", Shape("tiny", 70, 8, 90), "forward", "torch-eager"
        )
    assert benchmark.rounds == 0


def test_what_is_not_available_is_skipped():
    with pytest.raises(pytest.skip.Exception, match="triton"):
        time_vocabulary(
            Benchmark(), "linear_logprobs", Shape("tiny", 70, 8, 90), "forward", "s2srm-triton"
        )


@pytest.mark.parametrize("side", ["logits", "torch-multinomial", "s2srm-cpp", "s2srm-reference"])
def test_linear_sample(side):
    benchmark = Benchmark()
    bench_linear_sample(benchmark, DecodeShape("tiny", 3, 8, 50), side)
    assert benchmark.group == "linear_sample, tiny" and benchmark.rounds
