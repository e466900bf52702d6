"""The vocabulary operations in plain PyTorch, as people write them: the baseline and the oracle.

`rows_of` and `loss_of` are what torch eager runs over the whole (N, V) matrix of logits. `evaluate`
takes them over chunks of live rows, so that float64 truth fits beside a model's weight; with the
inputs' own dtype it gives the error that eager PyTorch makes, the measure for everyone.

Left out: statistics of the reward model beyond those that linear_token_stats names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Problem

VOCABULARY_OPS = (
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_token_stats",
    "linear_ppo_loss",
)
SCALAR_OPS = ("linear_cross_entropy", "linear_ppo_loss")


# Indices of rows, or all of them.
Rows = Tensor | slice


@dataclass(frozen=True)
class Evaluation:
    """What an operation gives: outputs by name, gradients of `hidden`, `weight` and `bias`.

    row_losses (live rows,): the summands of a scalar loss, None where the outputs are per row.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    row_losses: Tensor | None


def rows_of(z: Tensor, target: Tensor) -> dict[str, Tensor]:
    """(n,) logprobs, entropy and lse of (n, V) logits; target (n,) in [0, V)."""
    logp = torch.log_softmax(z, dim=-1)
    return {
        "logprobs": logp.gather(1, target[:, None]).squeeze(1),
        "entropy": -(logp.exp() * logp).sum(dim=-1),
        "lse": z.logsumexp(dim=-1),
    }


def stats_of(z: Tensor, target: Tensor) -> dict[str, Tensor]:
    """(n,) fields of linear_token_stats."""
    target_logit = z.gather(1, target[:, None]).squeeze(1)
    max_logit, argmax = z.max(dim=-1)
    return {
        **rows_of(z, target),
        "argmax": argmax,
        "max_logit": max_logit,
        "target_logit": target_logit,
        "rank": (z > target_logit[:, None]).sum(dim=-1),
    }


def cross_entropy_rows(problem: Problem, z: Tensor, target: Tensor, rows: Rows) -> Tensor:
    """(n,) losses of live rows: smoothing, z-loss and row weights as linear_cross_entropy has."""
    losses = F.cross_entropy(z, target, reduction="none", label_smoothing=problem.label_smoothing)
    if problem.z_loss:
        losses = losses + problem.z_loss * z.logsumexp(dim=-1).square()
    if problem.row_weight is not None:
        losses = losses * problem.row_weight[rows].to(losses.dtype)
    return losses


def ppo_rows(problem: Problem, logprobs: Tensor, entropy: Tensor | None, rows: Rows) -> Tensor:
    """(n,) clipped PPO losses of live rows from their (n,) logprobs; entropy only if it counts."""
    dtype = logprobs.dtype
    advantages = problem.advantages[rows].to(dtype)
    ratio = (logprobs - problem.old_logprobs[rows].to(dtype)).exp()
    clipped = ratio.clamp(1 - problem.clip, 1 + problem.clip)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if problem.kl_coef:
        difference = problem.ref_logprobs[rows].to(dtype) - logprobs
        losses = losses + problem.kl_coef * (difference.exp() - 1 - difference)
    if problem.entropy_coef:
        assert entropy is not None
        losses = losses - problem.entropy_coef * entropy
    return losses


def loss_rows(op: str, problem: Problem, z: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """(n,) summands of a scalar operation."""
    if op == "linear_cross_entropy":
        return cross_entropy_rows(problem, z, target, rows)
    if not problem.entropy_coef:
        logprobs = -F.cross_entropy(z, target, reduction="none")
        return ppo_rows(problem, logprobs, None, rows)
    values = rows_of(z, target)
    return ppo_rows(problem, values["logprobs"], values["entropy"], rows)


def evaluate(
    op: str, problem: Problem, names: tuple[str, ...], dtype: torch.dtype, gradients: bool
) -> Evaluation:
    """Outputs `names` of the operation and, if asked, the gradients of <upstream, outputs>.

    Everything is computed in `dtype` from the problem's tensors upcast to it, a chunk of live rows
    at a time; gradients are summed in float32 at least and rounded to `dtype` once.
    Per-row outputs are (N,) with zeros in ignored rows.
    """
    inputs = {name: tensor.detach().to(dtype) for name, tensor in problem.inputs.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    differentiated = inputs if gradients else {}
    grads = {name: torch.zeros_like(t, dtype=wide) for name, t in differentiated.items()}
    pieces: dict[str, list[Tensor]] = {name: [] for name in names}
    scalar = op in SCALAR_OPS and names == ("loss",)
    for rows in problem.chunks():
        leaves = {name: t[rows] if name == "hidden" else t for name, t in inputs.items()}
        leaves = {name: t.detach().requires_grad_(gradients) for name, t in leaves.items()}
        z = problem.logits(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        target = problem.target[rows]
        if op in SCALAR_OPS:
            values = {names[0]: loss_rows(op, problem, z, target, rows)}
        else:
            values = (stats_of if op == "linear_token_stats" else rows_of)(z, target)
        for name in names:
            pieces[name].append(values[name].detach())
        if not gradients:
            continue
        objective = sum(
            (values[n] * _row_upstream(problem, n, rows, scalar).to(z.dtype)).sum() for n in names
        )
        assert isinstance(objective, Tensor)
        made = torch.autograd.grad(objective, list(leaves.values()))
        for name, grad in zip(leaves, made, strict=True):
            if name == "hidden":
                grads[name][rows] = grad.to(wide)
            else:
                grads[name] += grad.to(wide)
    grads = {name: grad.to(dtype) for name, grad in grads.items()}
    joined = {name: torch.cat(parts) for name, parts in pieces.items()}
    if scalar:
        losses = joined["loss"]
        return Evaluation({"loss": losses.sum() / max(1, problem.num_live)}, grads, losses)
    return Evaluation({n: problem.scatter(value) for n, value in joined.items()}, grads, None)


def _row_upstream(problem: Problem, name: str, rows: Tensor, scalar: bool) -> Tensor:
    upstream = problem.upstream(name)
    return upstream / max(1, problem.num_live) if scalar else upstream[rows]
