"""Gloo ranks with unequal slices of the vocabulary against one rank with all of it."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import s2srm_kernels as kernels
from tests.kernels import naive

V, N = 23, 40
SPLITS = {2: (7, 16), 4: (5, 2, 13, 3)}  # columns of each rank


def _slice(rank, sizes):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def _calls(hidden, weight, bias, target, group, impl):
    """Outputs of every vocabulary operation; those with gradients first."""
    rows = torch.linspace(-4, -2, N, dtype=torch.float64)
    head = {"bias": bias, "process_group": group, "impl": impl}
    ids = torch.stack([target, torch.arange(N) % V, torch.arange(N) % V], dim=1)
    ids[::3, 2] = -1
    capped = {**head, "softcap": 3.0, "temperature": 0.8}
    smoothed = {"label_smoothing": 0.1, "z_loss": 0.02}
    differentiable = [
        *kernels.linear_logprobs(hidden, weight, target, extra_ids=ids, **capped),
        kernels.linear_cross_entropy(hidden, weight, target, **smoothed, **head),
        kernels.linear_cross_entropy(
            hidden, weight, target, reduction="none", row_weight=rows, **smoothed, **capped
        ),
        kernels.linear_ppo_loss(
            *(hidden, weight, target, rows, rows + 3),
            **{"ref_logprobs": rows, "kl_coef": 0.1, "entropy_coef": 0.2, **capped},
        ).loss,
    ]
    keys = torch.arange(N) * 2**40 - 3
    drawn = [
        kernels.linear_sample(hidden, weight, keys, keys, suppress=suppress, **capped)
        for suppress in (None, [0, 3, 21], range(7))  # the last: all of the first rank's ids
    ]
    statistics = kernels.linear_token_stats(hidden, weight, target, extra_ids=ids, **head)
    return differentiable, [*statistics, *(t for draw in drawn for t in draw)]


def _problem(offset=0.0):
    hidden, weight, bias, target = naive.make(N, 5, V, seed=13, scale=1.5)
    with torch.no_grad():
        bias += offset
        weight[20] = weight[3]  # an exact tie across the ranks
        bias[[3, 20]] = offset + 40
    return hidden, weight, bias, target


def _rank(rank, folder, sizes, impl):
    torch.set_num_threads(1)
    store, world = f"file://{folder}/store", len(sizes)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    group = dist.new_group(list(range(world)))
    mine = _slice(rank, sizes)
    hidden, weight, bias, target = _problem()
    weight, bias = (t.detach()[mine].clone().requires_grad_() for t in (weight, bias))
    outputs, statistics = _calls(hidden, weight, bias, target, group, impl)
    gradients = naive.grads(outputs, (hidden, weight, bias))
    ignored = torch.full_like(target, -100)
    nothing = kernels.linear_cross_entropy(hidden, weight, ignored, process_group=group)
    bad = target.clone()
    bad[5] = V
    with pytest.raises(ValueError, match=rf"target\[5\] is {V}.*\[0, {V}\)"):
        kernels.linear_logprobs(hidden, weight, bad, process_group=group)
    torch.save(
        {
            "outputs": [o.detach() for o in outputs],
            "statistics": statistics,
            "gradients": gradients,
            "nothing": nothing.detach(),
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("world", SPLITS)
def test_ranks_equal_one(world, impl, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    sizes = SPLITS[world]
    mp.spawn(_rank, args=(str(tmp_path), sizes, impl), nprocs=world)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(world)]
    hidden, weight, bias, target = _problem()
    outputs, statistics = _calls(hidden, weight, bias, target, None, "reference")
    d_hidden, d_weight, d_bias = naive.grads(outputs, (hidden, weight, bias))
    assert 3 in statistics[3] and 20 not in statistics[3]  # the tie went to the lower id
    for r, rank in enumerate(ranks):
        mine = _slice(r, sizes)
        torch.testing.assert_close(rank["outputs"], [o.detach() for o in outputs])
        torch.testing.assert_close(rank["statistics"], statistics)
        torch.testing.assert_close(rank["gradients"], [d_hidden, d_weight[mine], d_bias[mine]])
        assert rank["nothing"] == 0
        assert torch.equal(rank["gradients"][0], ranks[0]["gradients"][0])


def _disagreements(hidden, weight, target):
    """What rank 1 does differently -> (its call, what the message names)."""
    rows = torch.zeros(N, dtype=torch.float64)
    ppo = functools.partial(kernels.linear_ppo_loss, hidden, weight, target, rows, rows)
    call = functools.partial(kernels.linear_cross_entropy, hidden, weight, target)
    frozen = functools.partial(kernels.linear_cross_entropy, hidden, weight.detach(), target)
    short = functools.partial(kernels.linear_cross_entropy, hidden[1:], weight, target[1:])
    other = functools.partial(kernels.linear_cross_entropy, hidden, weight, target.flip(0))
    return {
        "another operation": (ppo, "operation"),
        "temperature": (functools.partial(call, temperature=2.0), "temperature"),
        "smoothing": (functools.partial(call, label_smoothing=0.1), "label_smoothing"),
        "reduction": (functools.partial(call, reduction="sum"), "reduction"),
        "frozen": (frozen, "which inputs need gradients"),
        "rows": (short, "hidden's shape"),
        "targets": (other, "target"),
    }


def _disagreeing_rank(rank):
    torch.set_num_threads(1)
    hidden, weight, _, target = _problem()
    common = functools.partial(kernels.linear_cross_entropy, hidden, weight, target)
    for call, named in _disagreements(hidden, weight, target).values():
        with pytest.raises(ValueError, match=rf"must agree on {named}.* ranks \[1\] differ"):
            (call if rank else common)(process_group=dist.group.WORLD)
    loss = common(process_group=dist.group.WORLD)
    torch.autograd.grad(loss, [weight] if rank else [hidden, weight])  # no rank waits for another


def _start_disagreeing(rank, folder):
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    _disagreeing_rank(rank)
    dist.destroy_process_group()


def test_ranks_that_disagree_are_told_so_instead_of_waiting(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_start_disagreeing, args=(str(tmp_path),), nprocs=2)
