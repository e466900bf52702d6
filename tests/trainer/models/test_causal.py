"""Packed forwards against Hugging Face's own, one sequence at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from s2srm.models.attention import SDPA
from s2srm.models.causal import PackedCausalLM
from s2srm.packing import Segment, pack

LENGTHS = (13, 2, 9, 5)
STARTS = (6, 1, 1, 4)


def segments() -> list[Segment]:
    generator = torch.Generator().manual_seed(3)
    return [
        Segment(torch.randint(VOCAB, (length,), generator=generator).tolist(), start, 0.5 + start)
        for length, start in zip(LENGTHS, STARTS, strict=True)
    ]


def unpacked_logprobs(lm: PreTrainedModel) -> Tensor:
    parts = []
    for segment in segments():
        ids = torch.tensor([segment.tokens])
        logprobs = lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        targets = ids[0, segment.start :]
        parts.append(logprobs[segment.start - 1 : -1].gather(1, targets[:, None])[:, 0])
    return torch.cat(parts)


def packed_copy(lm: PreTrainedModel) -> PackedCausalLM:
    twin = copy.deepcopy(lm)
    twin.set_attn_implementation(SDPA)
    return PackedCausalLM(twin)


CASES = [
    (name, dtype, tolerance)
    for name in ("llama", "llama-tied", "gemma3", "gemma3-tied")
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5))
]


# Gemma 2 has eager attention only, whose softmax is float32 whatever the model is.
@pytest.mark.parametrize("name, dtype, tolerance", [*CASES, ("gemma2-tied", torch.float32, 1e-5)])
def test_packed_equals_unpacked(name: str, dtype: torch.dtype, tolerance: float) -> None:
    reference = tiny_model(name, dtype=dtype)
    reference.set_attn_implementation("eager" if name.startswith("gemma2") else "sdpa")
    packed, alone = packed_copy(reference), packed_copy(reference)
    batch = pack(segments())
    found = packed(batch, "logprobs").logprobs.to(dtype)
    torch.testing.assert_close(found, unpacked_logprobs(reference), rtol=tolerance, atol=tolerance)

    packed(batch, "cross_entropy", reduction="sum", row_weight=batch.weights).backward()
    for one in (pack([segment]) for segment in segments()):
        alone(one, "cross_entropy", reduction="sum", row_weight=one.weights).backward()
    assert_same_gradients(packed, alone.lm, tolerance)


@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [
        ("llama", torch.float64, 1e-10),
        ("llama-tied", torch.float64, 1e-10),
        # Hugging Face sums the gradients of Gemma's norms in float32 (see models/float64.py).
        ("gemma3", torch.float64, 1e-5),
        ("gemma3-tied", torch.float32, 1e-5),
        ("gemma2-tied", torch.float32, 1e-5),
    ],
)
def test_gradients_are_those_of_hugging_face(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    reference = tiny_model(name, dtype=dtype)
    reference.set_attn_implementation("eager" if name.startswith("gemma2") else "sdpa")
    packed = packed_copy(reference)
    batch = pack(segments())
    (-(unpacked_logprobs(reference) * batch.weights.to(dtype)).sum()).backward()
    packed(batch, "cross_entropy", reduction="sum", row_weight=batch.weights).backward()
    assert_same_gradients(packed, reference, tolerance)


def assert_same_gradients(
    packed: PackedCausalLM, reference: PreTrainedModel, tolerance: float
) -> None:
    theirs = dict(reference.named_parameters())
    for name, parameter in packed.lm.named_parameters():
        grad = theirs[name].grad
        assert grad is not None and parameter.grad is not None
        scale = float(grad.abs().max())
        torch.testing.assert_close(parameter.grad, grad, rtol=tolerance, atol=tolerance * scale)


def test_sliding_window_matters() -> None:
    """The window is shorter than the sequences, so that ignoring it would show."""
    model = packed_copy(tiny_model("gemma3", dtype=torch.float64))
    wide = packed_copy(tiny_model("gemma3", dtype=torch.float64))
    for module in wide.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 100
    batch = pack(segments())
    difference = model(batch, "logprobs").logprobs - wide(batch, "logprobs").logprobs
    assert difference[: LENGTHS[0] - STARTS[0]].abs().max() > 1e-3
    assert torch.equal(difference[7:8], torch.zeros(1))  # two tokens are within the window


def test_no_leak_between_sequences() -> None:
    model = packed_copy(tiny_model("llama", dtype=torch.float64))
    first, *rest = segments()
    other = [Segment([7, 8, 9], 1), *rest]
    a = model(pack([first, *rest]), "logprobs").logprobs[first.num_predicted :]
    b = model(pack(other), "logprobs").logprobs[2:]
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain = packed_copy(tiny_model("gemma3-tied"))
    saving = packed_copy(tiny_model("gemma3-tied"))
    saving.lm.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        model.train()
        model(pack(segments()), reduction="sum").backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


def test_generate_works_through_the_packed_attention() -> None:
    reference = tiny_model("gemma3-tied")
    model = packed_copy(reference)
    ids = torch.tensor([[5, 9, 3, 7, 11, 2, 8], [0, 0, 4, 6, 1, 9, 9]])
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    kwargs = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    reference.generation_config.eos_token_id = model.lm.generation_config.eos_token_id = None
    assert torch.equal(model.lm.generate(ids, **kwargs), reference.generate(ids, **kwargs))
