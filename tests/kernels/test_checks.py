import pytest
import torch

from s2srm_kernels import (
    gae,
    linear_cross_entropy,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
    token_rewards,
)

N, D, V = 6, 4, 9


def call(op, **change):
    inputs = {
        "hidden": torch.ones(N, D),
        "weight": torch.ones(V, D),
        "target": torch.zeros(N, dtype=torch.int64),
    }
    if op is linear_ppo_loss:
        inputs |= {"old_logprobs": torch.zeros(N), "advantages": torch.zeros(N)}
    return op(**{**inputs, **change})


EVERY = (linear_cross_entropy, linear_logprobs, linear_token_stats, linear_ppo_loss)
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("op", EVERY, ids=lambda op: op.__name__)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(N)}, r"hidden.*\(N, D\).*\(6,\)"),
        ({"hidden": torch.ones(2, 3, D)}, r"hidden.*\(2, 3, 4\): pass hidden\.flatten\(0, -2\)"),
        ({"hidden": None}, "hidden must be a torch.Tensor, got NoneType"),
        ({"hidden": torch.ones(N, D, dtype=torch.int64)}, "hidden.*int64"),
        ({"weight": torch.ones(V, D + 1)}, r"weight.*\(V, 4\).*\(9, 5\)"),
        ({"weight": torch.ones(D, V)}, r"weight.*\(4, 9\): pass weight\.t\(\)"),
        ({"weight": torch.nn.Linear(D, V)}, "weight must be a torch.Tensor, got Linear"),
        ({"weight": torch.ones(0, D)}, r"weight.*\(0, 4\)"),
        ({"weight": torch.ones(V, D).double()}, "weight.*float32.*float64"),
        ({"weight": torch.ones(V, D, device="meta")}, "weight.*cpu.*meta"),
        ({"target": torch.zeros(N - 1, dtype=torch.int64)}, r"target.*\(6,\).*\(5,\)"),
        ({"target": [0] * N}, "target must be a torch.Tensor, got list"),
        ({"target": torch.zeros(N)}, "target.*int64.*float32"),
        ({"bias": False}, "bias must be a torch.Tensor, got bool"),
        ({"bias": torch.ones(V + 1)}, r"bias.*\(9,\).*\(10,\)"),
        ({"bias": torch.ones(V).half()}, "bias.*float32.*float16"),
        ({"softcap": 0.0}, r"softcap.*0\.0"),
        ({"softcap": INF}, "softcap.*inf"),
        ({"temperature": 0.0}, r"temperature.*0\.0"),
        ({"temperature": -1.0}, r"temperature.*-1\.0"),
        ({"temperature": 10**400}, "temperature.*inf"),
        ({"temperature": None}, "temperature.*None"),
        ({"temperature": NAN}, "temperature.*nan"),
        ({"ignore_index": None}, "ignore_index must be a whole number, got None"),
        ({"ignore_index": -100.0}, r"ignore_index.*-100\.0"),
        ({"process_group": "world"}, "process_group must be a ProcessGroup or None, got 'world'"),
        ({"impl": "magic"}, "impl.*'magic'"),
        ({"impl": "triton"}, "impl='triton' is not available for linear_"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input_of_every_vocabulary_op(op, change, message):
    with pytest.raises(ValueError, match=message):
        call(op, **change)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (linear_cross_entropy, {"reduction": "avg"}, "reduction.*'avg'"),
        (linear_cross_entropy, {"label_smoothing": 1.1}, r"label_smoothing.*1\.1"),
        (linear_cross_entropy, {"workspace_bytes": 1.5}, r"workspace_bytes.*1\.5"),
        (linear_cross_entropy, {"z_loss": -1.0}, r"z_loss.*-1\.0"),
        (linear_cross_entropy, {"row_weight": torch.ones(N + 1)}, r"row_weight.*\(7,\)"),
        (linear_cross_entropy, {"row_weight": torch.ones(N).long()}, "row_weight.*int64"),
        (linear_ppo_loss, {"clip_low": -0.1}, r"clip_low.*-0\.1"),
        (linear_ppo_loss, {"clip_high": NAN}, "clip_high.*nan"),
        (linear_ppo_loss, {"kl_coef": INF}, "kl_coef.*inf"),
        (linear_ppo_loss, {"entropy_coef": INF}, "entropy_coef.*inf"),
        (linear_ppo_loss, {"old_logprobs": torch.zeros(N, 1)}, r"old_logprobs.*\(6, 1\)"),
        (linear_ppo_loss, {"old_logprobs": None}, "old_logprobs must be a torch.Tensor"),
        (linear_ppo_loss, {"advantages": torch.zeros(2)}, r"advantages.*\(2,\)"),
        (linear_ppo_loss, {"ref_logprobs": torch.zeros(N).long()}, "ref_logprobs.*int64"),
    ],
)
def test_bad_input_of_one_op(op, change, message):
    with pytest.raises(ValueError, match=message):
        call(op, **change)


def test_bad_input_of_sequence_ops():
    rows, ids, cu = torch.zeros(N), torch.zeros(N, dtype=torch.int64), torch.tensor([0, N])
    with pytest.raises(ValueError, match=r"^rewards must be a .*Tensor, got list"):
        gae(rows.tolist(), rows, cu)
    with pytest.raises(ValueError, match=r"^cu_seqlens must be a .*Tensor, got list"):
        gae(rows, rows, [0, N])
    with pytest.raises(ValueError, match=r"^signal must be a .*Tensor, got NoneType"):
        token_rewards(ids, None, cu)
    with pytest.raises(ValueError, match=r"top_k must be a whole number, got 1\.5"):
        token_rewards(ids, ids, cu, divergence="rank", top_k=1.5)


@pytest.mark.parametrize("op", EVERY, ids=lambda op: op.__name__)
def test_reference_can_be_named(op):
    named, chosen = call(op, impl="reference"), call(op)
    first = (lambda out: out) if op is linear_cross_entropy else (lambda out: out[0])
    assert torch.equal(first(named), first(chosen))
