"""Weights that are DTensors, on one and on two ranks of gloo."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import s2srm_kernels as kernels
from tests.kernels import naive

V = 13


def _loss(hidden, weight, bias, target):
    """Sums, so that the whole is the sum over the ranks; gradients in forward and in backward."""
    logprobs = kernels.linear_logprobs(hidden, weight, target, bias=bias).logprobs
    return kernels.linear_cross_entropy(
        hidden, weight, target, bias=bias, reduction="sum"
    ) - torch.dot(logprobs, torch.arange(len(target), dtype=torch.float64))


def _rank(rank, folder, world):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    hidden, weight, _, target = naive.make(8, 5, V, seed=rank)
    plain = [t.detach() for t in naive.make(8, 5, V)[1:3]]
    for placement in (Shard(0), Replicate()):
        w, b = (distribute_tensor(t, mesh, [placement]).requires_grad_() for t in plain)
        gradients = torch.autograd.grad(_loss(hidden, w, b, target), (hidden, w, b))
        assert [tuple(g.placements) for g in gradients[1:]] == [(placement,)] * 2
        expected = [torch.zeros_like(t) for t in plain]
        for other in range(world):  # what every rank's rows add
            h, *_, t = naive.make(8, 5, V, seed=other)
            whole = [p.clone().requires_grad_() for p in plain]
            d_hidden, *parts = torch.autograd.grad(_loss(h, *whole, t), (h, *whole))
            expected = [a + b for a, b in zip(expected, parts, strict=True)]
            if other == rank:
                torch.testing.assert_close(gradients[0], d_hidden)
        torch.testing.assert_close([g.full_tensor() for g in gradients[1:]], expected)
    group = mesh.get_group()
    with pytest.raises(ValueError, match=r"weight is a DTensor: with vocab_group.*to_local\(\)"):
        kernels.linear_logprobs(hidden, w, target, vocab_group=group)
    with pytest.raises(ValueError, match="main_grad must be None where weight is a DTensor"):
        kernels.linear_logprobs(hidden, w, target, main_grad=torch.zeros(V, 5))
    partial = torch.distributed.tensor.DTensor.from_local(weight.detach(), mesh, [Partial()])
    with pytest.raises(ValueError, match="weight is a DTensor with a Partial placement"):
        kernels.linear_logprobs(hidden, partial, target)
    with pytest.raises(ValueError, match=r"hidden is a DTensor: pass hidden\.full_tensor"):
        kernels.linear_logprobs(distribute_tensor(hidden.detach(), mesh), weight, target)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_a_weight_that_is_sharded_or_replicated(world, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_rank, args=(str(tmp_path), world), nprocs=world)


def _fsdp_rank(rank, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(5, V, bias=False).double()
    whole = lm_head.weight.detach().clone().requires_grad_()
    fully_shard(lm_head, mesh=mesh)
    hidden, _, _, target = naive.make(8, 5, V, seed=rank)
    kernels.linear_cross_entropy(hidden, lm_head.weight, target, reduction="sum").backward()
    for other in range(2):
        h, _, _, t = naive.make(8, 5, V, seed=other)
        kernels.linear_cross_entropy(h, whole, t, reduction="sum").backward()
    torch.testing.assert_close(lm_head.weight.grad.full_tensor(), whole.grad)
    torch.optim.SGD(lm_head.parameters(), lr=1.0).step()
    torch.testing.assert_close(lm_head.weight.full_tensor(), (whole - whole.grad).detach())
    dist.destroy_process_group()


def test_the_head_of_a_model_under_fsdp2(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_fsdp_rank, args=(str(tmp_path),), nprocs=2)
