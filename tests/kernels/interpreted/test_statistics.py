"""Statistics of the Triton engine."""

import math

import pytest
import torch

from s2srm_kernels import dispatch, linear_cross_entropy, linear_logprobs, linear_token_stats
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.triton import configs, problem
from tests.kernels import naive
from tests.kernels.interpreted.helpers import (
    HEADS,
    OURS,
    REFERENCE,
    assert_close,
    head_of,
)


@pytest.fixture
def triton_by_default(monkeypatch):
    """impl="auto" is triton."""
    assert dispatch.load("triton") is None
    monkeypatch.setattr(dispatch, "_AUTO_ORDER_ELSEWHERE", ("triton", "reference"))
    monkeypatch.setattr(dispatch, "_AUTO_CHOICES", {})


@pytest.fixture
def descriptors(monkeypatch):
    """The path of tensor descriptors, for 16-bit inputs."""
    monkeypatch.setattr(configs, "DESCRIPTOR_FAMILIES", {configs.INTERPRETER})


SHAPES = [
    (1, 1, 1), (3, 5, 2), (65, 17, 127), (64, 64, 128), (70, 31, 129), (2, 1, 257), (130, 5, 300),
    (9, 33, 1280),
]  # fmt: skip


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_tiles(shape, options):
    head = head_of(*shape, **options)
    targets = REFERENCE.target_logits(head)
    assert_close(OURS.target_logits(head), targets)
    # A threshold that is nobody's logit, or the counts would hang on the last bit.
    ours, tiles = OURS.statistics(head, targets - 0.01, True)
    theirs, their_tiles = REFERENCE.statistics(head, targets - 0.01, True)
    assert_close(tiles, their_tiles, 1e-9)
    # The target's logit is taken from the thresholds.
    assert_close(ours[:, 4] + 0.01, theirs[:, 4], 1e-9)
    columns = [0, 1, 2, 3, 5, 6]
    assert_close(ours[:, columns], theirs[:, columns], 1e-9)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize(
    ("rows", "strides"), [((70, 300), (7, 1)), ((70, 300), (1, 400)), ((70, 300), (32, 2))]
)
def test_strides_that_no_descriptor_takes_go_by_pointers(rows, strides):
    n, v = rows
    g = torch.Generator().manual_seed(0)
    d = 7 if strides[1] == 1 else 16
    weight = torch.randn(20000, generator=g).half().as_strided((v, d), strides)
    hidden = torch.randn(n, d, generator=g).half()
    target = torch.arange(n)
    head = Head(hidden, weight, None, target, None, 1.0, -100, None)
    assert not problem.Problem(head).tile("statistics").descriptors
    copied = Head(hidden, weight.clone(), None, target, None, 1.0, -100, None)
    ours, theirs = (OURS.statistics(h, OURS.target_logits(h), False)[0] for h in (head, copied))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_a_row_is_the_same_bits_in_any_batch(dtype, options):
    hidden, weight, bias, target = naive.make(150, 67, 501, dtype=dtype, ignored=0.2, seed=8)

    def run(rows):
        arguments = (hidden.detach()[rows], weight.detach(), target[rows])
        options_ = {"bias": bias.detach(), "impl": "triton", **options}
        return [
            *linear_logprobs(*arguments, **options_),
            *linear_token_stats(*arguments, **options_),
        ]

    whole = run(torch.arange(150))
    for rows in (torch.arange(7, 8), torch.arange(40, 110), torch.arange(149, -1, -1)):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, run(rows), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equal_rows_of_the_weight_tie_exactly(dtype):
    """Copies of one row in several tiles and splits: lowest id, and none above the others."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(1000, 40, generator=g).to(dtype)
    copies = [3, 70, 127, 128, 300, 999]
    weight[copies] = 4 * weight[3]
    hidden = torch.randn(130, 40, generator=g).to(dtype)
    target = torch.tensor(copies).repeat(22)[:130]
    stats = linear_token_stats(hidden, weight, target, softcap=9.0, temperature=0.9, impl="triton")
    leads = stats.argmax == 3
    assert leads.sum() > 20 and not torch.isin(stats.argmax, torch.tensor(copies[1:])).any()
    assert torch.equal(stats.rank == 0, leads)
    assert torch.equal(stats.max_logit[leads], stats.target_logit[leads])
    # A row's rank does not hang on which of the copies is its target.
    shifted = linear_token_stats(
        hidden, weight, target.roll(1), softcap=9.0, temperature=0.9, impl="triton"
    )
    assert torch.equal(stats.rank, shifted.rank)
    assert torch.equal(stats.logprobs, shifted.logprobs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.usefixtures("triton_by_default")
def test_suppressed_tokens(dtype):
    """A bias of -inf on single columns, and on all of a tile."""
    hidden, weight, bias, target = naive.make(40, 9, 700, dtype=dtype, seed=5, ignored=0.0)
    with torch.no_grad():
        bias[[0, 5, 699]] = -math.inf
        bias[120:400] = -math.inf
    target = target.where(bias.detach()[target] > -math.inf, 401)
    inputs = (hidden, weight)

    def run(dtype_, logprobs, cross_entropy, **kwargs):
        h, w, b = (t.detach().to(dtype_) for t in (hidden, weight, bias))
        h.requires_grad_(), w.requires_grad_()
        outputs = [*logprobs(h, w, target, bias=b, **kwargs)]
        outputs.append(cross_entropy(h, w, target, bias=b, **kwargs))
        return [*(o.detach() for o in outputs), *naive.grads(outputs, (h, w))]

    ours = run(dtype, linear_logprobs, linear_cross_entropy)
    exact = run(torch.float64, linear_logprobs, linear_cross_entropy, impl="reference")
    tolerance = 1e-9 if dtype == torch.float64 else 4e-3
    assert len(ours) == 4 + len(inputs)
    for a, b in zip(ours, exact, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


def test_no_live_row():
    head = head_of(5, 3, 20)
    empty = Head(head.hidden, head.weight, None, torch.full((5,), -100), None, 1.0, -100, None)
    assert OURS.target_logits(empty).shape == (0,)
    packed, tiles = OURS.statistics(empty, None, True)
    assert packed.shape == (0, 7) and tiles.shape == (0, 1)


def test_no_buffer_of_all_logits(monkeypatch):
    """The largest buffer of a forward is far below N x V."""
    sizes = []
    empty = problem.Problem.empty

    def recorded(self, *shape):
        sizes.append(math.prod(shape))
        return empty(self, *shape)

    monkeypatch.setattr(problem.Problem, "empty", recorded)
    head = head_of(64, 4, 5000, dtype=torch.float32)
    OURS.statistics(head, OURS.target_logits(head), False)
    assert max(sizes) < head.num_live * 5000 / 20
