"""Values of every token: shapes, initialisation, what is trained, saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model

from s2srm.errors import UserError
from s2srm.models.attention import SDPA
from s2srm.models.value import SCORE_FILE, PackedValueModel
from s2srm.packing import Segment, pack

BATCH = pack([Segment([3, 4, 5, 6], 2), Segment([7, 8], 1)])


def test_value_of_a_token_depends_on_its_prefix_only() -> None:
    model = PackedValueModel(tiny_model("gemma3-tied"), "normal")
    values = model(BATCH)
    assert values.shape == (6,) and values.dtype == torch.float32
    alone = model(pack([Segment([3, 4, 5], 1)]))
    torch.testing.assert_close(values[:3], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(values[3], model(pack([Segment([3, 4, 9, 6], 1)]))[3])


def test_fresh_critic_is_zero_and_fresh_reward_model_is_not() -> None:
    assert torch.equal(PackedValueModel(tiny_model("llama"), "zero")(BATCH), torch.zeros(6))
    weight = PackedValueModel(tiny_model("llama", hidden_size=512), "normal").score.weight
    assert abs(float(weight.std()) * 513**0.5 - 1) < 0.15
    again = PackedValueModel(tiny_model("llama", hidden_size=512), "normal").score.weight
    assert torch.equal(weight, again)
    other = PackedValueModel(tiny_model("llama", hidden_size=512), "normal", seed=1).score.weight
    assert not torch.equal(weight, other)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_every_trained_parameter_gets_a_gradient(name: str) -> None:
    model = PackedValueModel(tiny_model(name), "normal")
    model(BATCH).sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert model.lm.get_input_embeddings().weight.requires_grad
    assert model.lm.get_output_embeddings().weight.requires_grad == name.endswith("tied")


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("width", [16, 32])
def test_scores_are_of_the_states_that_the_lm_head_reads(width: int, packs: bool) -> None:
    """OPT-350m's are narrower (word_embed_proj_dim) than its layers."""
    lm = tiny_model("opt", word_embed_proj_dim=width)
    if packs:
        lm.set_attn_implementation(SDPA)
    model = PackedValueModel(lm, "normal")
    assert model.score.weight.shape == (1, width)
    values = model(BATCH)
    own = tiny_model("opt", word_embed_proj_dim=width)
    hidden: list[torch.Tensor] = []
    own.lm_head.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0][0]))
    for tokens in BATCH.tokens.split([4, 2]):
        own(input_ids=tokens[None])
    wanted = torch.cat(hidden) @ model.score.weight.detach().T
    torch.testing.assert_close(values, wanted[:, 0], rtol=1e-4, atol=1e-5)
    assert model.score.bias.item() == 0.0


def test_bfloat16_scores_are_computed_in_float32() -> None:
    """From float32 products and sums of bfloat16 weights, which is all that ZeRO-3 takes."""
    model = PackedValueModel(tiny_model("llama", dtype=torch.bfloat16), "normal")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores = model.score(hidden)
    wanted = hidden.double() @ model.score.weight.double().T + model.score.bias.double()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-6, atol=1e-7)
    assert model(BATCH).dtype == torch.float32


def test_a_float32_score_head_loads_into_a_bfloat16_model(tmp_path: Path) -> None:
    """Earlier versions saved float32 heads beside bfloat16 weights."""
    generator = torch.Generator().manual_seed(0)
    saved = {"weight": torch.randn(1, 32, generator=generator), "bias": torch.tensor([0.3])}
    save_file(saved, tmp_path / SCORE_FILE)
    model = PackedValueModel(tiny_model("llama", dtype=torch.bfloat16))
    assert model.load_score(tmp_path)
    for name, tensor in model.score.named_parameters():
        assert torch.equal(tensor, saved[name].bfloat16())


def test_float64_stays_float64() -> None:
    model = PackedValueModel(tiny_model("llama", dtype=torch.float64), "normal")
    assert model(BATCH).dtype == torch.float64


def test_score_head_round_trip(tmp_path: Path) -> None:
    model = PackedValueModel(tiny_model("llama"), "normal", seed=5)
    for name, tensors in model.extra_files().items():
        save_file({k: v.detach() for k, v in tensors.items()}, tmp_path / name)
    fresh = PackedValueModel(tiny_model("llama"))
    assert fresh.load_score(tmp_path)
    assert torch.equal(fresh(BATCH), model(BATCH))
    assert not fresh.load_score(tmp_path / "nowhere")


def test_score_head_of_another_width_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, tmp_path / SCORE_FILE)
    with pytest.raises(UserError, match=r"weight must have shape \(1, 32\), found \(1, 8\)"):
        PackedValueModel(tiny_model("llama")).load_score(tmp_path)
