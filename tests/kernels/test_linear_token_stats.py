import pytest
import torch

from s2srm_kernels import linear_logprobs, linear_token_stats
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("head", [{}, {"softcap": 2.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 5, 11), (130, 33, 300), (257, 64, 1003)], ids=str)
def test_every_field(shape, head):
    hidden, weight, bias, target = naive.make(*shape, seed=4)
    stats = linear_token_stats(hidden, weight, target, bias=bias, **head)
    z = naive.logits(hidden, weight, bias=bias, **head).detach()
    live = target != -100
    theirs = naive.logprobs(hidden, weight, target, bias=bias, **head)
    torch.testing.assert_close(tuple(stats[:3]), tuple(t.detach() for t in theirs))
    target_logit = z.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    assert torch.equal(stats.argmax, z.argmax(1).where(live, 0))
    assert torch.equal(stats.rank, (z > target_logit[:, None]).sum(1).where(live, 0))
    torch.testing.assert_close(stats.max_logit, z.amax(1).where(live, 0))
    torch.testing.assert_close(stats.target_logit, target_logit.where(live, 0))
    assert stats.argmax.dtype == stats.rank.dtype == torch.int64
    assert not any(field.requires_grad for field in stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_ties_go_to_the_lowest_id_and_do_not_count_in_the_rank(dtype):
    row = torch.tensor([[1.0, 2.0]], dtype=dtype)
    weight = torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 2.0], [1.0, 2.0], [5.0, 0.0]], dtype=dtype)
    for num_rows in (1, 3, 200):
        hidden = row.repeat(num_rows, 1)
        target = torch.full((num_rows,), 4)
        stats = linear_token_stats(hidden, weight, target)
        assert stats.argmax.tolist() == [1] * num_rows  # logits 0 5 5 5 5
        assert stats.rank.tolist() == [0] * num_rows
        assert torch.equal(stats.max_logit, stats.target_logit)


def test_ties_far_apart_in_a_large_vocabulary():
    weight = torch.zeros(40_000, 3)
    weight[[123, 9_999, 39_999]] = torch.tensor([1.0, 1.0, 1.0])
    stats = linear_token_stats(
        torch.ones(5, 3), weight, torch.tensor([123, 9_999, 39_999, 0, -100])
    )
    assert stats.argmax.tolist() == [123, 123, 123, 123, 0]
    assert stats.rank.tolist() == [0, 0, 0, 3, 0]


def test_same_bits_as_linear_logprobs():
    hidden, weight, bias, target = naive.make(150, 20, 70, dtype=torch.float32)
    stats = linear_token_stats(hidden, weight, target, bias=bias)
    fields = linear_logprobs(hidden, weight, target, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(stats[:3], fields, strict=True))
