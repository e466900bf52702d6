"""Rollouts by transformers' `generate`, from whole weights that every rank holds for the phase.

Under ZeRO-3 nothing is gathered per token: the caller gathers the policy once, `update_weights`
takes over those tensors without copying them, and `drop_weights` lets go of them after the phase.
The generation model is an ordinary transformers model without DeepSpeed's hooks, so ranks whose
responses have different lengths never wait for each other.

Sampling is greedy decoding of logits / temperature + Gumbel noise, the noise of each sequence
from a generator of its own. That draws from softmax(logits / temperature), and a response does not
change with the batch that it is in. Left out: top-p, top-k and every other warper (the logprobs
of PPO would then not be those sampled from), beam search, continuous batching, a static cache.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from s2srm.config import SamplingConfig
from s2srm.models.trunk import own_attention
from s2srm.rollout.base import Response
from s2srm.rollout.manner import Manner, find_manner
from s2srm.watchdog import pulse


class HFRollout:
    """A rollout engine around a transformers causal LM (see `RolloutEngine`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Generate from `model` as it is: its weights are read, never written."""
        self.model = model
        self._manner: Manner | None = None

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
        for batch in _batches(lengths, sampling.batch_size, pads):
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

    def _generate_batch(
        self,
        prompts: list[Sequence[int]],
        seeds: list[int],
        sampling: SamplingConfig,
        eos_id: int,
        suppress: Sequence[int],
    ) -> list[Response]:
        """Pad on the left (the only padded tensors of the trainer), generate, cut at eos_id."""
        device = next(self.model.parameters()).device
        width = max(len(p) for p in prompts)
        tokens = torch.full((len(prompts), width), eos_id)
        attention_mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = torch.as_tensor(prompt)
            attention_mask[i, width - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=self._manner is None or self._manner.caches,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        )
        processor = GumbelNoise(seeds, sampling.temperature, eos_id, suppress, device)
        output = cast(Any, self.model).generate(
            tokens.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([processor]),
            synced_gpus=False,
        )
        assert isinstance(output, Tensor)
        return [_cut(row, eos_id) for row in output[:, width:].tolist()]


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


def _batches(lengths: Sequence[int], size: int, pads: bool) -> Iterator[list[int]]:
    """Prompts by length, at most `size` at a time; without padding, of one length at a time."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups = [order]
    if not pads:
        groups = [list(group) for _, group in itertools.groupby(order, lambda i: lengths[i])]
    for group in groups:
        for first in range(0, len(group), size):
            yield group[first : first + size]


class GumbelNoise(LogitsProcessor):
    """logits / temperature - log(E), E ~ Exponential(1); the argmax follows softmax(logits / T).

    Every sequence has a generator of its own, seeded by its seed; one that has ended draws no more.
    At temperature 0 the logits stay as they are. Suppressed ids get -inf.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        temperature: float,
        eos_id: int,
        suppress: Sequence[int],
        device: torch.device,
    ) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.eos_id = eos_id
        self.suppress = list(suppress)
        self.live: list[bool] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits of the next token -> (B, V) float32 perturbed logits."""
        pulse.beat()
        scores = scores.float()
        if self.suppress:
            scores = scores.clone()
            scores[:, self.suppress] = -torch.inf
        if self.temperature == 0:
            return scores
        if self.live is None:
            self.live = [True] * len(self.generators)
        else:
            last = input_ids[:, -1].tolist()
            self.live = [
                live and token != self.eos_id for live, token in zip(self.live, last, strict=True)
            ]
        scores = scores / self.temperature
        for i, generator in enumerate(self.generators):
            if self.live[i]:
                # float64: in float32 the smallest draws of a large vocabulary are too coarse.
                noise = torch.empty(scores.shape[1], dtype=torch.float64, device=scores.device)
                scores[i] -= noise.exponential_(generator=generator).log_()
        return scores


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
