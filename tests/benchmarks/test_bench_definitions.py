import pytest
import torch

from benchmarks import problems
from benchmarks.definitions import VOCABULARY_OPS, evaluate
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import normal_problem
from benchmarks.products import BOTH, modes_of
from benchmarks.providers.base import OUTPUTS
from benchmarks.providers.eager import Eager
from benchmarks.providers.ours import Ours
from benchmarks.shapes import Shape

SHAPE = Shape("test", 60, 9, 41)
OPTIONS = {
    "linear_cross_entropy": [{}, {"label_smoothing": 0.2, "z_loss": 0.01}, {"row_weight": True}],
    "linear_ppo_loss": [{}, {"kl_coef": 0.3}, {"entropy_coef": 0.2, "softcap": 2.0}],
    "linear_logprobs": [{}, {"temperature": 0.7}],
    "linear_token_stats": [{}, {"softcap": 3.0}],
}
CASES = [(op, options) for op in VOCABULARY_OPS for options in OPTIONS[op]]


def make(options, cpu, bias=True):
    problem = normal_problem(SHAPE, torch.float64, cpu, ignored=0.4)
    if bias:
        problem.bias = torch.linspace(-1, 1, 41, dtype=torch.float64).requires_grad_()
    for name, value in options.items():
        setattr(problem, name, torch.linspace(0.1, 2, 60) if name == "row_weight" else value)
    return problem


@pytest.mark.parametrize("provider", [Eager(), Ours("reference")], ids=lambda p: p.name)
@pytest.mark.parametrize(("op", "options"), CASES, ids=str)
def test_the_oracle_the_baseline_and_the_reference_agree(op, options, provider, cpu, monkeypatch):
    """Three derivations of one thing: chunks of rows, the whole matrix, closed-form gradients."""
    monkeypatch.setattr(problems, "CHUNK_ELEMENTS", 41 * 7)
    problem = make(options, cpu)
    assert len(problem.chunks()) > 3
    backward = BOTH in modes_of(op)
    exact = evaluate(op, problem, OUTPUTS[op], torch.float64, backward)
    run = provider.build(op, problem)
    outputs, gradients = outputs_and_gradients(run, problem, backward)
    assert set(outputs) == set(exact.outputs)
    for name, value in outputs.items():
        torch.testing.assert_close(value, exact.outputs[name].to(value.dtype), msg=name)
    assert set(gradients) == ({"hidden", "weight", "bias"} if backward else set())
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, exact.gradients[name], msg=name)


def test_row_losses_are_the_summands_of_the_loss(cpu):
    problem = make({}, cpu)
    made = evaluate("linear_ppo_loss", problem, ("loss",), torch.float64, gradients=False)
    assert made.gradients == {}
    assert made.row_losses is not None
    torch.testing.assert_close(made.row_losses.mean(), made.outputs["loss"])


def test_losses_of_every_row(cpu):
    problem = make({}, cpu, bias=False)
    made = evaluate("linear_cross_entropy", problem, ("losses",), torch.float64, gradients=True)
    losses = made.outputs["losses"]
    assert losses.shape == (60,)
    assert (losses != 0).sum() == problem.num_live
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(
            problem.logits(problem.hidden, problem.weight, None), problem.target, reduction="none"
        ),
        [problem.weight],
        problem.upstream("losses").double(),
    )
    torch.testing.assert_close(made.gradients["weight"], expected[0])


def test_gradients_are_rounded_to_the_dtype_once(cpu):
    problem = normal_problem(SHAPE, torch.bfloat16, cpu)
    made = evaluate("linear_logprobs", problem, ("logprobs",), torch.bfloat16, gradients=True)
    assert {g.dtype for g in made.gradients.values()} == {torch.bfloat16}
    assert made.outputs["logprobs"].dtype == torch.float32
