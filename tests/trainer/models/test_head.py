"""The fused head gives the Hugging Face model's own logits, whatever a family does to them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, tiny_config, tiny_model
from torch import nn

from s2srm.errors import UserError
from s2srm.models.causal import PackedCausalLM
from s2srm.models.head import FusedHead, fuse_head
from s2srm.packing import Segment, pack

FAMILIES = ["llama", "gemma2-tied", "gemma3-tied", "qwen2", "qwen3-tied", "granite", "cohere-tied"]


@pytest.mark.parametrize("name", [*FAMILIES, "phi"])
def test_head_on_trunk_equals_the_model(name: str) -> None:
    reference = tiny_model(name, dtype=torch.float64)
    reference.set_attn_implementation("eager")
    ids = [3, 17, 4, 44, 9, 60, 31]
    logits = reference(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    targets = torch.tensor(ids[1:])
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)

    model = PackedCausalLM(tiny_model(name, dtype=torch.float64))
    batch = pack([Segment(ids, 1)])
    found = model(batch, "logprobs")
    torch.testing.assert_close(
        found.logprobs.double(), logprobs.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    stats = model(batch, "token_stats")
    assert torch.equal(stats.argmax, logits.argmax(-1))
    torch.testing.assert_close(
        stats.max_logit.double(), logits.max(-1).values, rtol=1e-5, atol=1e-5
    )


def test_the_hugging_face_forward_still_works() -> None:
    reference, model = tiny_model("gemma2-tied"), PackedCausalLM(tiny_model("gemma2-tied"))
    reference.set_attn_implementation("eager")
    model.lm.set_attn_implementation("eager")
    ids = torch.tensor([[3, 17, 4]])
    assert torch.equal(model.lm(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_ties_stay(tied: bool) -> None:
    lm = tiny_model("llama-tied" if tied else "llama")
    before = list(lm.state_dict())
    weight = lm.get_output_embeddings().weight
    model = PackedCausalLM(lm)
    assert list(model.lm.state_dict()) == before
    assert model.head.weight is weight
    assert (model.head.weight is lm.get_input_embeddings().weight) == tied


def test_heads_that_are_no_single_matrix_are_refused() -> None:
    lm = tiny_model("llama")
    lm.set_output_embeddings(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, VOCAB)))
    with pytest.raises(UserError, match=r"here: .* the LM head is a Sequential"):
        fuse_head(lm, lm.config, "here")


def test_heads_that_do_more_than_their_product_are_refused() -> None:
    """As nGPT-like models', which scale what a linear layer gives."""

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)

    lm = tiny_model("llama")
    lm.set_output_embeddings(Scaled(32, VOCAB))
    with pytest.raises(UserError, match=r"here: llama models are not supported: .* is a Scaled"):
        fuse_head(lm, lm.config, "here")


def test_scale_with_bias_is_refused() -> None:
    lm = tiny_model("phi")
    config = tiny_config("granite")
    with pytest.raises(UserError, match="scaled logits together with a head bias"):
        fuse_head(lm, config, "here")


def test_no_gradient_reaches_a_frozen_head() -> None:
    head = FusedHead(nn.Linear(4, 5, bias=False).requires_grad_(False), softcap=None, scale=1.0)
    hidden = torch.randn(3, 4, requires_grad=True)
    head(hidden, torch.tensor([0, 4, 2]), op="cross_entropy").backward()
    assert hidden.grad is not None and head.weight.grad is None
