"""Rollouts by transformers' `generate`, from whole weights that every rank holds for the phase.

Under ZeRO-3 nothing is gathered per token: the caller gathers the policy once, `update_weights`
takes over those tensors without copying them, and `drop_weights` lets go of them after the phase.
The generation model is an ordinary transformers model without DeepSpeed's hooks, so ranks whose
responses have different lengths never wait for each other.

Tokens are drawn as sampling.py says. Where many responses of a batch have ended, the rest goes on
in a smaller one with its rows of the cache. Left out: beam search, taking new prompts into a batch
that has room, a static cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from s2srm.config import SamplingConfig
from s2srm.models.trunk import own_attention
from s2srm.rollout.base import Response
from s2srm.rollout.cache import CacheSize, measure_cache, rollout_batches
from s2srm.rollout.manner import CACHE, Manner, find_manner
from s2srm.rollout.sampling import SeededSampling

KEEP = 0.75
"""Of a batch's rows: as many or fewer that still write are taken out of it. A smaller batch costs a
copy of the cache, as every step does."""


class HFRollout:
    """A rollout engine around a transformers causal LM (see `RolloutEngine`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Generate from `model` as it is: its weights are read, never written."""
        self.model = model
        self._manner: Manner | None = None
        self._cache_size: CacheSize | None = None

    @classmethod
    def without_weights(cls, model: PreTrainedModel) -> HFRollout:
        """An engine for models like `model` that holds no weights until `update_weights`.

        Only the class and the configuration of `model` are read, so its parameters may be sharded.
        """
        config = copy.deepcopy(model.config)
        config._attn_implementation = own_attention(model)
        config.use_cache = True
        with torch.device("meta"):
            skeleton = type(model)(config)
        return cls(skeleton.eval())

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over parameters and buffers by name, sharing their storage.

        Tied parameters must be named under each of their names. Raises ValueError if a tensor of
        the model is missing or has no place in it.
        """
        given = dict(named_tensors)
        for name, slot, holder in _tensor_slots(self.model):
            tensor = given.pop(name, None)
            if tensor is None:
                raise ValueError(f"named_tensors lacks {name}, which the model needs")
            if tensor.shape != holder[slot].shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, the model needs "
                    f"{tuple(holder[slot].shape)}"
                )
            is_parameter = isinstance(holder[slot], nn.Parameter)
            detached = tensor.detach()
            holder[slot] = nn.Parameter(detached, False) if is_parameter else detached
        if given:
            raise ValueError(f"named_tensors has names unknown to the model: {sorted(given)[:5]}")

    def drop_weights(self) -> None:
        """Let go of the weights; `update_weights` must come before the next `generate`."""
        for _, slot, holder in _tensor_slots(self.model):
            empty = holder[slot].detach().to("meta")
            is_parameter = isinstance(holder[slot], nn.Parameter)
            holder[slot] = nn.Parameter(empty, False) if is_parameter else empty

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        eos_id: int,
        suppress: Sequence[int] = (),
    ) -> list[Response]:
        """See `RolloutEngine.generate`. Prompts of similar length share a forward."""
        if len(seeds) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts but {len(seeds)} seeds")
        if sampling.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {sampling.temperature}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(
                    f"prompts[{i}] is empty: generation starts from at least one token"
                )
        if self._manner is None and prompts:
            with _evaluating(self.model):
                self._manner = find_manner(self.model)
        responses: dict[int, Response] = {}
        lengths = [len(prompt) for prompt in prompts]
        pads = self._manner is None or self._manner.pads
        for batch in rollout_batches(lengths, sampling, pads, self._size_of_cache(sampling)):
            with _evaluating(self.model):
                rows = self._generate_batch(
                    [prompts[i] for i in batch],
                    [seeds[i] for i in batch],
                    sampling,
                    eos_id,
                    suppress,
                )
            responses.update(zip(batch, rows, strict=True))
        return [responses[i] for i in range(len(prompts))]

    def _size_of_cache(self, sampling: SamplingConfig) -> CacheSize | None:
        """Measured once; None where nothing limits it."""
        if sampling.kv_cache_gib == 0 or self._manner is None or not self._manner.caches:
            return None
        if self._cache_size is None:
            with _evaluating(self.model):
                self._cache_size = measure_cache(self.model)
        return self._cache_size

    def _generate_batch(
        self,
        prompts: list[Sequence[int]],
        seeds: list[int],
        sampling: SamplingConfig,
        eos_id: int,
        suppress: Sequence[int],
    ) -> list[Response]:
        """Pad on the left (the only padded tensors of the trainer), generate, cut at eos_id."""
        assert self._manner is not None
        device = next(self.model.parameters()).device
        width = max(len(p) for p in prompts)
        tokens = torch.full((len(prompts), width), eos_id)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        draw = SeededSampling(
            seeds, sampling.temperature, sampling.max_new_tokens, suppress, device
        )
        responses: dict[int, Response] = {}
        live = list(range(len(prompts)))
        cache: Any = None
        while live:
            tokens, cache = self._continue(tokens, mask, cache, width, sampling, eos_id, draw)
            found = [_cut(row, eos_id) for row in tokens[:, width:].tolist()]
            at_limit = tokens.shape[1] - width == sampling.max_new_tokens
            ended = [response.finished or at_limit for response in found]
            responses |= {i: r for i, r, end in zip(live, found, ended, strict=True) if end}
            kept = [row for row, end in enumerate(ended) if not end]
            live = [live[row] for row in kept]
            if live:
                rows = torch.tensor(kept, device=device)
                cache.batch_select_indices(rows)
                draw.keep(rows)
                tokens = tokens[rows]
                mask = F.pad(mask[rows], (0, tokens.shape[1] - mask.shape[1]), value=1)
        return [responses[i] for i in range(len(prompts))]

    def _continue(
        self,
        tokens: Tensor,
        mask: Tensor,
        cache: Any,
        width: int,
        sampling: SamplingConfig,
        eos_id: int,
        draw: SeededSampling,
    ) -> tuple[Tensor, Any]:
        """(tokens so far, cache) when all rows have ended, or few are left where rows can be
        dropped. cache: of all tokens but the last; None at the start."""
        assert self._manner is not None
        config = GenerationConfig(
            max_new_tokens=width + sampling.max_new_tokens - tokens.shape[1],
            do_sample=False,
            num_beams=1,
            use_cache=self._manner.caches,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
            return_dict_in_generate=True,
        )
        may_drop = self._manner.drops and len(tokens) > 1
        out = cast(Any, self.model).generate(
            tokens,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([FewLeft(eos_id)] if may_drop else []),
            synced_gpus=False,
            **{CACHE: cache},
        )
        return out.sequences, out.get(CACHE)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode and its own generation_config is hidden.

    generate() fills every setting that a call leaves open from it (repetition penalty, ...).
    """
    own_config, model.generation_config = model.generation_config, GenerationConfig()
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own_config
        model.train(was_training)


class FewLeft(StoppingCriteria):
    """True for all rows once KEEP of them or less still write: those go on in a smaller batch."""

    def __init__(self, eos_id: int) -> None:
        self.eos_id = eos_id
        self._ended: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ends = input_ids[:, -1] == self.eos_id
        ended = ends if self._ended is None else self._ended | ends
        self._ended = ended
        few = (~ended).sum() <= KEEP * len(ends)
        return few.expand(len(ends))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under each of its names, for `update_weights`.

    Under ZeRO-3 call it where the parameters are gathered.
    """
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tensor_slots(model: nn.Module) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """(full name, name in its module, the module's dict) of every parameter and buffer."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers):
            for slot, tensor in list(holder.items()):
                if tensor is not None:
                    yield f"{prefix}.{slot}" if prefix else slot, slot, holder  # type: ignore[misc]


def _cut(row: list[int], eos_id: int) -> Response:
    """The generated ids up to and with the first end of sequence."""
    if eos_id in row:
        return Response(row[: row.index(eos_id) + 1], finished=True)
    return Response(row, finished=False)
