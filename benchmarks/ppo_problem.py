"""What both trainers of `bench_ppo_step` are given: prompts, lengths of responses, minibatches.

Prompts are random ids, every one at least SHORTEST long and told from the others by its first
SHORTEST ids. How long a response becomes is part of the problem: `force_lengths` wraps a model's
`generate`, for both trainers alike, so that the end of sequence comes at the prompt's own length
and never before.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

SHORTEST = 8
PAD = 0


@dataclass(frozen=True)
class Problem:
    """The work of a step, and the process's surroundings.

    prompts           token ids; none is PAD or eos_id
    response_lengths  tokens of the response to each prompt, end of sequence included
    rollout_size      responses per step: all prompts, each once
    """

    model: str
    prompts: list[list[int]]
    response_lengths: list[int]
    num_minibatches: int
    num_epochs: int
    eos_id: int
    seed: int

    @property
    def rollout_size(self) -> int:
        return len(self.prompts)

    @property
    def minibatch_size(self) -> int:
        return self.rollout_size // self.num_minibatches

    @property
    def longest_response(self) -> int:
        return max(self.response_lengths)

    def number_of(self, sequence: Sequence[int]) -> int | None:
        """Which prompt a sequence begins with, padding on the left skipped; None: another one."""
        first = self.num_pads(sequence)
        return self._numbers.get(tuple(sequence[first : first + SHORTEST]))

    def num_pads(self, sequence: Sequence[int]) -> int:
        """Padding on the left, which is PAD or eos_id."""
        pads = itertools.takewhile(lambda token: token in (PAD, self.eos_id), sequence)
        return sum(1 for _ in pads)

    @cached_property
    def _numbers(self) -> dict[tuple[int, ...], int]:
        return {tuple(prompt[:SHORTEST]): i for i, prompt in enumerate(self.prompts)}


def make_problem(
    model: str,
    kind: Literal["mixed", "equal"],
    longest: int,
    rollout_size: int,
    num_minibatches: int,
    num_epochs: int,
    seed: int,
) -> Problem:
    """mixed: prompts and responses of SHORTEST to `longest` tokens, log-uniform and independent.
    equal: all of them of as many tokens as the mixed ones have in the mean."""
    config: Any = AutoConfig.from_pretrained(model)
    eos_id = config.eos_token_id if isinstance(config.eos_token_id, int) else 2
    draw = random.Random(seed)
    mean = round((longest - SHORTEST) / math.log(longest / SHORTEST))

    def lengths() -> list[int]:
        if kind == "equal":
            return [mean] * rollout_size
        span = math.log(longest / SHORTEST)
        return [round(SHORTEST * math.exp(draw.random() * span)) for _ in range(rollout_size)]

    ids = [i for i in range(3, config.vocab_size) if i != eos_id]
    prompts = [draw.choices(ids, k=n) for n in lengths()]
    made = Problem(model, prompts, lengths(), num_minibatches, num_epochs, eos_id, seed)
    assert len(made._numbers) == rollout_size, "two prompts begin alike; take another seed"
    return made


def minibatches(problem: Problem, step: int, epoch: int) -> list[list[int]]:
    """Numbers of the prompts in each minibatch of one pass, as s2srm draws them."""
    from s2srm.ppo.minibatches import permutation, prompt_schedule

    chosen = prompt_schedule(len(problem.prompts), problem.rollout_size, problem.seed, step)
    order = permutation(problem.rollout_size, problem.seed, step, epoch)
    numbers = [chosen[i] for i in order]
    size = problem.minibatch_size
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def force_lengths(model: PreTrainedModel, problem: Problem) -> None:
    """Let `model.generate` end every response at its problem's length, and sample no PAD."""
    generate: Any = model.generate

    def generate_at_length(*args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        processors = LogitsProcessorList([ForcedLengths(problem), *(logits_processor or ())])
        return generate(*args, logits_processor=processors, **kwargs)

    model.generate = generate_at_length  # type: ignore[method-assign]


class ForcedLengths(LogitsProcessor):
    """Only the end of sequence at a response's last place, and anywhere else no end of sequence.

    A row is known by its first ids, so that a trainer may order, drop and pad rows as it likes.
    Rows that are none of the problem's (s2srm tries a model on two prompts of its own) stay as they
    are.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.ends: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.ends is None:
            self.ends = torch.tensor([self._end(row) for row in input_ids.tolist()])
        known, last = self.ends > 0, self.ends == input_ids.shape[1] + 1
        eos_scores = scores[last, self.problem.eos_id]
        scores[last] = -torch.inf
        scores[known, PAD] = -torch.inf
        scores[known, self.problem.eos_id] = -torch.inf
        scores[last, self.problem.eos_id] = eos_scores
        return scores

    def _end(self, row: list[int]) -> int:
        """Columns of padding, prompt and response; 0 for a row that is not the problem's."""
        number = self.problem.number_of(row)
        if number is None:
            return 0
        length = len(self.problem.prompts[number]) + self.problem.response_lengths[number]
        return self.problem.num_pads(row) + length
