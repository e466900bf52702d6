"""What a pass through a model allocates beside its weights, by the real code on the meta device.

A pass is traced at two small numbers of layers and two of tokens; a decoder is a row of equal
layers, so the four give the plane on which every other size lies (see lines.py). Gradients of the
weights are freed as soon as they are made: what keeps them is the engine (states.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from s2srm.models import flash as flash_attention
from s2srm.models.attention import SDPA
from s2srm.models.causal import PackedCausalLM
from s2srm.models.load import DTYPES, disable_dropout
from s2srm.models.trunk import own_attention
from s2srm.models.value import PackedValueModel
from s2srm.packing import Packed
from s2srm.plan.lines import Plane, fit_plane
from s2srm.plan.tracing import AllocationTrace
from s2srm.rollout.manner import CACHE

Pass = Literal["cross_entropy_sum", "cross_entropy_none", "logprobs", "token_stats", "ppo", "value"]
_LAYERS, _PROMPTS = (2, 3), (2, 4)
_MOST_SEQUENCES = 64


class Passes:
    """Costs of the passes of one architecture in one precision, each traced once.

    flash: whether attention is the varlen kernel of a GPU instead of one call per sequence.
    """

    def __init__(self, config: PretrainedConfig, precision: str, flash: bool) -> None:
        self.config = copy.deepcopy(config)
        disable_dropout(self.config)
        self.dtype = DTYPES[precision]
        self.attention = flash_attention.TORCH.name if flash else SDPA
        self.packed = cache(self._packed)
        self.prefill = cache(self._prefill)
        self.decode = cache(self._decode)

    def _packed(
        self, kind: Pass, train: bool, checkpointing: bool, length: int, rows: int
    ) -> Plane:
        """Peak bytes of a forward (train: and backward) over sequences of `length` tokens, of which
        `rows` are predicted, by layers and number of sequences; gradients of the size of the
        vocabulary left out."""

        def measure(layers: int, sequences: int) -> float:
            module = self._module(layers, kind == "value", train)
            if checkpointing:
                module.lm.activation_checkpointing_enable({"use_reentrant": False})
            batch = meta_batch(sequences, length, rows)
            module.train(train)
            rows_of_head = module.lm.get_output_embeddings().weight.numel()
            sizes = {rows_of_head * self.dtype.itemsize, rows_of_head * 4}
            with AllocationTrace(module, sizes) as trace, torch.set_grad_enabled(train):
                out = _run(module, kind, batch)
                if train:
                    _scalar(out).backward()
            return trace.peak

        few = self._enough(length)
        return fit_plane(measure, _LAYERS, (few, 2 * few))

    def _enough(self, length: int) -> int:
        """Sequences with which activations outweigh the gradient of a single matrix, which in a
        trace of less would decide where the peak is."""
        text = self.config.get_text_config()
        widest = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        return min(_MOST_SEQUENCES, -(-4 * widest // length))

    def _prefill(self, width: int) -> Plane:
        """Peak bytes of reading prompts padded to `width`, its key-value cache included, by layers
        and number of prompts."""

        def measure(layers: int, prompts: int) -> float:
            lm = self._generator(layers)
            with AllocationTrace(lm) as trace, torch.no_grad():
                _read(lm, prompts, width, DynamicCache(config=lm.config))
            return trace.peak

        return fit_plane(measure, _LAYERS, _PROMPTS)

    def _decode(self, length: int) -> Plane:
        """Peak bytes of the last of the steps that grow a cache to `length` tokens, the cache
        included, by layers and number of sequences."""

        def measure(layers: int, sequences: int) -> float:
            lm = self._generator(layers)
            with AllocationTrace(lm) as trace, torch.no_grad():
                past = DynamicCache(config=lm.config)
                _read(lm, sequences, length - 1, past)
                trace.restart_peak()
                _read(lm, sequences, 1, past, length)
            return trace.peak

        return fit_plane(measure, _LAYERS, _PROMPTS)

    def _module(self, layers: int, value: bool, train: bool) -> Any:
        with torch.device("meta"):
            lm: Any = self._lm(layers, self.attention)
            module = PackedValueModel(lm) if value else PackedCausalLM(lm)
        module.requires_grad_(False)
        if train:
            for parameter in module.parameters():
                parameter.requires_grad_()
                parameter.register_post_accumulate_grad_hook(_forget)
            head = lm.get_output_embeddings()
            if value and head.weight is not lm.get_input_embeddings().weight:
                head.requires_grad_(False)
        return module

    def _generator(self, layers: int) -> PreTrainedModel:
        with torch.device("meta"):
            lm = self._lm(layers, None)
        lm.set_attn_implementation(own_attention(lm))
        return lm.eval()

    def _lm(self, layers: int, attention: str | None) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(
            with_layers(self.config, layers), dtype=self.dtype, attn_implementation=attention
        )


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture at another depth, with the first layers of its pattern."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    pattern = getattr(config, "layer_types", None)
    if pattern is not None:
        config.layer_types = pattern[:layers]
    return config


def meta_batch(sequences: int, length: int, rows: int) -> Packed:
    """A packed batch without ids; its lengths are real, because the forward reads them."""
    tokens, predicted = sequences * length, sequences * rows

    def ids(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device="meta")

    offsets = torch.arange(sequences + 1, dtype=torch.int32)
    return Packed(
        tokens=ids(tokens),
        positions=ids(tokens),
        cu_seqlens=offsets * length,
        rows=ids(predicted),
        targets=ids(predicted),
        cu_rows=offsets * rows,
        weights=torch.empty(predicted, device="meta"),
    )


def _run(module: nn.Module, kind: Pass, batch: Packed) -> Any:
    """The forward that a stage makes of this kind."""
    calls: dict[Pass, Callable[[], Any]] = {
        "cross_entropy_sum": lambda: module(batch, "cross_entropy", reduction="sum"),
        "cross_entropy_none": lambda: module(batch, "cross_entropy", reduction="none"),
        "logprobs": lambda: module(batch, "logprobs", with_entropy=False, temperature=1.0),
        "token_stats": lambda: module(batch, "token_stats"),
        "ppo": lambda: module(
            batch,
            "ppo_loss",
            old_logprobs=torch.zeros_like(batch.weights),
            advantages=torch.zeros_like(batch.weights),
            normalizer=1.0,
            max_log_ratio=20.0,
        ),
        "value": lambda: module(batch)[batch.rows],
    }
    return calls[kind]()


def _scalar(out: Any) -> Tensor:
    loss = out[0] if isinstance(out, tuple) else out
    return loss.sum()


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _read(
    lm: PreTrainedModel, sequences: int, new: int, past: DynamicCache, length: int | None = None
) -> None:
    """A forward of `new` tokens a sequence, the cache then holding `length`, as generate() does."""
    tokens = torch.empty(sequences, new, dtype=torch.int64, device="meta")
    mask = torch.ones(sequences, length or new, dtype=torch.int64, device="meta")
    logits = lm(
        input_ids=tokens,
        attention_mask=mask,
        use_cache=True,
        logits_to_keep=1,
        **{CACHE: past},
    ).logits
    # generate() takes a float32 copy of the last logits.
    logits[:, -1].to(torch.float32, copy=True)
