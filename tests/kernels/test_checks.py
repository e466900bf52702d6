import pytest
import torch

from s2srm_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
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
        ({"hidden": torch.ones(N, D, dtype=torch.int64)}, "hidden.*int64"),
        ({"weight": torch.ones(V, D + 1)}, r"weight.*\(V, 4\).*\(9, 5\)"),
        ({"weight": torch.ones(0, D)}, r"weight.*\(0, 4\)"),
        ({"weight": torch.ones(V, D).double()}, "weight.*float32.*float64"),
        ({"weight": torch.ones(V, D, device="meta")}, "weight.*cpu.*meta"),
        ({"target": torch.zeros(N - 1, dtype=torch.int64)}, r"target.*\(6,\).*\(5,\)"),
        ({"target": torch.zeros(N)}, "target.*int64.*float32"),
        ({"bias": torch.ones(V + 1)}, r"bias.*\(9,\).*\(10,\)"),
        ({"bias": torch.ones(V).half()}, "bias.*float32.*float16"),
        ({"softcap": 0.0}, r"softcap.*0\.0"),
        ({"softcap": INF}, "softcap.*inf"),
        ({"temperature": 0.0}, r"temperature.*0\.0"),
        ({"temperature": -1.0}, r"temperature.*-1\.0"),
        ({"temperature": NAN}, "temperature.*nan"),
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
        (linear_cross_entropy, {"z_loss": -1.0}, r"z_loss.*-1\.0"),
        (linear_cross_entropy, {"row_weight": torch.ones(N + 1)}, r"row_weight.*\(7,\)"),
        (linear_cross_entropy, {"row_weight": torch.ones(N).long()}, "row_weight.*int64"),
        (linear_ppo_loss, {"clip_low": -0.1}, r"clip_low.*-0\.1"),
        (linear_ppo_loss, {"clip_high": NAN}, "clip_high.*nan"),
        (linear_ppo_loss, {"kl_coef": INF}, "kl_coef.*inf"),
        (linear_ppo_loss, {"entropy_coef": INF}, "entropy_coef.*inf"),
        (linear_ppo_loss, {"old_logprobs": torch.zeros(N, 1)}, r"old_logprobs.*\(6, 1\)"),
        (linear_ppo_loss, {"advantages": torch.zeros(2)}, r"advantages.*\(2,\)"),
        (linear_ppo_loss, {"ref_logprobs": torch.zeros(N).long()}, "ref_logprobs.*int64"),
    ],
)
def test_bad_input_of_one_op(op, change, message):
    with pytest.raises(ValueError, match=message):
        call(op, **change)


@pytest.mark.parametrize("op", EVERY, ids=lambda op: op.__name__)
def test_reference_can_be_named(op):
    named, chosen = call(op, impl="reference"), call(op)
    first = (lambda out: out) if op is linear_cross_entropy else (lambda out: out[0])
    assert torch.equal(first(named), first(chosen))
