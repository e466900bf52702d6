import math

import pytest
import torch

from benchmarks import checking
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import normal_problem
from benchmarks.providers.base import OUTPUTS
from benchmarks.providers.eager import Eager
from benchmarks.shapes import Shape

SHAPE = Shape("test", 200, 16, 300)


def checked(op, cpu, spoil, dtype=torch.float32, backward=True):
    """(errors, whether they pass) of eager after `spoil(outputs, gradients)`."""
    problem = normal_problem(SHAPE, dtype, cpu, ignored=0.3)
    truth = checking.find_truth(op, problem, OUTPUTS[op], backward)
    outputs, gradients = outputs_and_gradients(Eager().build(op, problem), problem, backward)
    spoil(outputs, gradients, problem)
    errors = checking.compare(op, problem, truth.exact, outputs, gradients)
    return errors, checking.within(errors, truth, dtype)


def nothing(outputs, gradients, problem):
    pass


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprobs", "linear_ppo_loss"])
def test_eager_passes_its_own_rule(op, cpu):
    errors, passed = checked(op, cpu, nothing)
    assert passed
    assert set(errors) == {*OUTPUTS[op], "d_hidden", "d_weight"}
    assert 0 < errors["d_weight"] < 1e-5


def test_token_stats_pass_without_gradients(cpu):
    errors, passed = checked("linear_token_stats", cpu, nothing, backward=False)
    assert passed
    assert set(errors) == set(OUTPUTS["linear_token_stats"])


@pytest.mark.parametrize("name", ["hidden", "weight"])
@pytest.mark.parametrize("factor", [1 + 1e-4, 0.0, -1.0, math.nan])
def test_a_wrong_gradient_fails(name, factor, cpu):
    def spoil(outputs, gradients, problem):
        gradients[name] *= factor

    errors, passed = checked("linear_logprobs", cpu, spoil)
    assert not passed
    assert errors[f"d_{name}"] > 1e-5


def test_one_wrong_row_of_a_gradient_fails(cpu):
    def spoil(outputs, gradients, problem):
        gradients["weight"][7] = 0

    assert not checked("linear_cross_entropy", cpu, spoil)[1]


def test_a_phantom_column_fails(cpu):
    """A column of zeros beyond the vocabulary enters the sum of exponentials."""

    def spoil(outputs, gradients, problem):
        outputs["logprobs"] -= 1e-3

    assert not checked("linear_logprobs", cpu, spoil)[1]


@pytest.mark.parametrize(
    "wrong", [lambda ids: ids + 1, lambda ids: ids + 10**6, lambda ids: ids * 0]
)
def test_a_wrong_argmax_fails(wrong, cpu):
    def spoil(outputs, gradients, problem):
        outputs["argmax"] = wrong(outputs["argmax"])

    errors, passed = checked("linear_token_stats", cpu, spoil, backward=False)
    assert not passed
    assert errors["argmax"] > 1e-3


def test_the_other_of_two_equal_maxima_is_no_error(cpu):
    problem = normal_problem(SHAPE, torch.float32, cpu)
    with torch.no_grad():
        problem.weight[200:] = problem.weight[:100]
    truth = checking.find_truth("linear_token_stats", problem, ("argmax", "max_logit"), False)
    argmax = truth.exact.outputs["argmax"]
    other = torch.where(
        argmax >= 200, argmax - 200, torch.where(argmax < 100, argmax + 200, argmax)
    )
    assert not torch.equal(argmax, other)
    made = checking.compare("linear_token_stats", problem, truth.exact, {"argmax": other}, {})
    assert made["argmax"] < 1e-6


def test_ignored_rows_are_not_compared(cpu):
    def spoil(outputs, gradients, problem):
        outputs["entropy"][problem.target < 0] = 99.0

    assert checked("linear_logprobs", cpu, spoil)[1]


def test_a_loss_is_not_held_to_eagers_luck(cpu):
    """A mean's error is that of its rows, so a loss that is off by one rounding passes."""

    def spoil(outputs, gradients, problem):
        outputs["loss"] = outputs["loss"] * (1 + 2**-23)

    assert checked("linear_cross_entropy", cpu, spoil)[1]

    def far(outputs, gradients, problem):
        outputs["loss"] = outputs["loss"] * (1 + 1e-5)

    assert not checked("linear_cross_entropy", cpu, far)[1]


def test_relative_error():
    truth = torch.tensor([3.0, 4.0])
    assert checking.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert checking.relative_error(truth[:1], truth) == math.inf
    assert checking.relative_error(torch.tensor([3.0, math.nan]), truth) == math.inf
    assert checking.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert checking.relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    big = torch.ones(2**15, 2)
    assert checking.relative_error(big * 1.5, big) == pytest.approx(0.5)
