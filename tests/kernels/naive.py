"""The definitions, as on a blackboard: dense, slow, differentiated by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def make(n, d, v, seed=0, dtype=torch.float64, bias=True, ignored=0.3, scale=1.0):
    """hidden, weight, bias with gradients, and targets of which some are ignored."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        values = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_()

    target = torch.randint(0, v, (n,), generator=g)
    target[torch.rand(n, generator=g) < ignored] = -100
    return normal(n, d), normal(v, d), normal(v) if bias else None, target


def logits(hidden, weight, bias=None, softcap=None, temperature=1.0):
    z = hidden @ weight.t()
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logprobs(hidden, weight, target, ignore_index=-100, **head):
    """(logprobs, entropy, lse), zeros in ignored rows."""
    z = logits(hidden, weight, **head)
    live = target != ignore_index
    logp = torch.log_softmax(z, dim=-1)
    picked = logp.gather(1, target.where(live, 0)[:, None].long()).squeeze(1)
    entropy = -(logp.exp() * logp).sum(-1)
    zero = torch.zeros((), dtype=z.dtype)
    return tuple(torch.where(live, t, zero) for t in (picked, entropy, z.logsumexp(-1)))


def cross_entropy(
    hidden,
    weight,
    target,
    row_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    **head,
):
    z = logits(hidden, weight, **head)
    live = target != ignore_index
    losses = torch.nn.functional.cross_entropy(
        z,
        target.long(),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    losses = (losses + z_loss * z.logsumexp(-1) ** 2) * live
    if row_weight is not None:
        losses = losses * row_weight
    if reduction == "none":
        return losses
    return losses.sum() / (max(int(live.sum()), 1) if reduction == "mean" else 1)


def ppo_loss(
    hidden,
    weight,
    target,
    old_logprobs,
    advantages,
    clip_low=0.2,
    clip_high=0.2,
    ref_logprobs=None,
    kl_coef=0.0,
    entropy_coef=0.0,
    normalizer=None,
    max_log_ratio=math.inf,
    row_weight=None,
    dual_clip=None,
    cu_seqlens=None,
    **head,
):
    """(loss, the seven metrics). With cu_seqlens the ratios are those of sequences."""
    live = target != -100
    logp, entropy, _ = (t[live] for t in logprobs(hidden, weight, target, **head))
    old, advantage = old_logprobs[live], advantages[live]
    far = [logp - old, (old if ref_logprobs is None else ref_logprobs[live]) - logp]
    if cu_seqlens is not None:
        far[0] = sequence_means(far[0], live, cu_seqlens)
    near = [difference.clamp(-max_log_ratio, max_log_ratio) for difference in far]
    ratio, d = near[0].exp(), near[1]
    unclipped = ratio * advantage
    low = -math.inf if clip_low is None else 1 - clip_low
    clipped = ratio.clamp(low, math.inf if clip_high is None else 1 + clip_high) * advantage
    k3 = d.exp() - 1 - d
    objective, clips = torch.minimum(unclipped, clipped), clipped < unclipped
    if dual_clip is not None:
        lowest = torch.where(advantage < 0, dual_clip * advantage, -math.inf)
        clips = clips | (lowest > objective)
        objective = torch.maximum(objective, lowest)
    rows = -objective - entropy_coef * entropy
    if kl_coef:
        rows = rows + kl_coef * k3
    if row_weight is not None:
        rows = rows * row_weight[live]
    loss = rows.sum() / (live.sum() if normalizer is None else normalizer)
    clip_fraction = clips.to(logp.dtype).mean()
    bounded = (far[0] != near[0]) | (far[1] != near[1])
    means = (clip_fraction, -d.mean(), k3.mean(), entropy.mean(), ratio.mean())
    return loss, (*means, ratio.max(), bounded.to(logp.dtype).mean())


def sequence_means(values, live, cu_seqlens):
    """Of (R,) values of the live rows: the mean over its sequence's, at each of them."""
    means = torch.zeros_like(values)
    first = 0
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        last = first + int(live[start:end].sum())
        if last > first:
            means[first:last] = values[first:last].mean()
        first = last
    return means


def token_rewards(response, agree, cu_seqlens, positive=1.0, negative=1.0, match=0.0):
    """Token by token; agree is a (N,) bool."""
    rewards, index = [], []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        k = end - start
        for t in range(start, end):
            if not agree[t]:
                k = min(k, t - start)
            if t - start < k:
                rewards.append(positive)
            else:
                rewards.append(match if agree[t] else -negative)
        index.append(k)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(index, dtype=torch.int64)


def gae(rewards, values, cu_seqlens, gamma=1.0, lam=0.95, bootstrap=None):
    """Backwards through every sequence."""
    advantages = torch.zeros_like(rewards)
    bounds = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    for b, (start, end) in enumerate(bounds):
        following = torch.zeros((), dtype=rewards.dtype)
        next_value = following if bootstrap is None else bootstrap[b]
        for t in reversed(range(start, end)):
            delta = rewards[t] + gamma * next_value - values[t]
            following = delta + gamma * lam * following
            advantages[t], next_value = following, values[t]
    return advantages, advantages + values


def grads(outputs, inputs, seed=0) -> list[Tensor]:
    """Gradients under random upstream gradients, the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    outputs = [o for o in outputs if o.requires_grad]
    upstream = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype) for o in outputs]
    present = [i for i in inputs if i is not None and i.requires_grad]
    return list(torch.autograd.grad(outputs, present, upstream))
