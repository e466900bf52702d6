import pytest
import torch

from s2srm_kernels import token_rewards
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")

CU = torch.tensor([0, 0, 4, 5, 5, 12, 20, 20], dtype=torch.int32)


def random_ids(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (2, 20), generator=g)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("divergence", ["argmax", "rank", "margin"])
def test_equals_the_definition(divergence, seed):
    response, signal = random_ids(seed)
    options = {"positive": 0.5, "negative": 2.0, "match": 0.25}
    if divergence == "margin":
        signal = signal.float() * 0.3
        agree = signal <= 0.3
        extra = {"max_margin": 0.3}
    elif divergence == "rank":
        agree, extra = signal < 2, {"top_k": 2}
    else:
        agree, extra = signal == response, {}
    ours = token_rewards(response, signal, CU, divergence=divergence, **options, **extra)
    rewards, index = naive.token_rewards(response, agree, CU, **options)
    assert ours.rewards.dtype == torch.float32 and ours.divergence_index.dtype == torch.int64
    assert ours.rewards.tolist() == rewards.tolist()
    assert ours.divergence_index.tolist() == index.tolist()
    assert ours.divergence_index[[0, 3, 6]].tolist() == [0, 0, 0]  # empty sequences


def test_full_agreement_has_the_length_as_its_index_and_defaults_are_the_papers():
    response = torch.tensor([4, 5, 6, 7])
    out = token_rewards(response, response.clone(), torch.tensor([0, 1, 4]))
    assert out.rewards.tolist() == [1, 1, 1, 1] and out.divergence_index.tolist() == [1, 3]
    out = token_rewards(response, torch.tensor([4, 9, 6, 8]), torch.tensor([0, 4]))
    assert out.rewards.tolist() == [1, -1, 0, -1] and out.divergence_index.tolist() == [1]


def test_a_nan_margin_diverges_and_float64_stays():
    margin = torch.tensor([0.0, float("nan"), 0.0], dtype=torch.float64)
    out = token_rewards(
        torch.zeros(3, dtype=torch.int64), margin, torch.tensor([0, 3]), divergence="margin"
    )
    assert out.rewards.tolist() == [1, -1, 0] and out.rewards.dtype == torch.float64


@pytest.mark.parametrize("cu", [[0], [0, 0, 0]])
def test_no_rows(cu):
    empty = torch.empty(0, dtype=torch.int64)
    out = token_rewards(empty, empty, torch.tensor(cu))
    assert out.rewards.shape == (0,) and out.divergence_index.tolist() == [0] * (len(cu) - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "cosine"}, "divergence.*'cosine'"),
        ({"top_k": 0}, "top_k.*0"),
        ({"max_margin": -0.5}, r"max_margin.*-0\.5"),
        ({"positive": float("inf")}, "positive.*inf"),
        ({"negative": -1.0}, r"negative.*-1\.0"),
        ({"match": float("nan")}, "match.*nan"),
        ({"divergence": "margin"}, "signal.*int64"),
        ({"signal": torch.zeros(20)}, "signal.*float32"),
        ({"signal": torch.zeros(19, dtype=torch.int64)}, r"signal.*\(20,\).*\(19,\)"),
        ({"response": torch.zeros(20)}, "response.*float32"),
        ({"cu_seqlens": torch.tensor([0, 19])}, "cu_seqlens.* 20.* 19"),
        ({"cu_seqlens": torch.tensor([1, 20])}, r"cu_seqlens\[0\] = 1"),
        ({"cu_seqlens": torch.tensor([0, 9, 7, 20])}, r"cu_seqlens\[1\] = 9 > cu_seqlens\[2\] = 7"),
        ({"cu_seqlens": torch.tensor([0.0, 20.0])}, "cu_seqlens.*float32"),
        ({"cu_seqlens": torch.empty(0, dtype=torch.int32)}, r"cu_seqlens.*\(0,\)"),
        ({"impl": "triton"}, "triton.*token_rewards"),
    ],
)
def test_bad_input(change, message):
    response, signal = random_ids(0)
    inputs = {"response": response, "signal": signal, "cu_seqlens": CU, **change}
    with pytest.raises(ValueError, match=message):
        token_rewards(**inputs)


def test_top_k_beyond_the_dtype_of_the_rank():
    ids = torch.arange(20)
    rewards = token_rewards(ids, ids.int(), CU, divergence="rank", top_k=2**31).rewards
    assert rewards.eq(1).all()
