"""A phase's prompts, answered by the current policy: every rank samples a share of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from s2srm import distributed
from s2srm.balance import deal_equal_counts
from s2srm.config import PPOConfig, SamplingConfig
from s2srm.engine import Engine
from s2srm.ppo.minibatches import Rollouts, permutation, prompt_schedule
from s2srm.rollout.base import sampling_seed
from s2srm.rollout.build import build_rollout
from s2srm.rollout.gather import gather_responses
from s2srm.rollout.hf import named_tensors

CALIBRATION_PHASE = -1
"""Calibration's own number in the seeds; training phases count from 0."""
_CALIBRATION_SHUFFLE = -2
_HELD_OUT_PHASE = -3


class Sampler:
    """Rollouts whose prompts, seeds and responses do not depend on the number of ranks."""

    def __init__(
        self, policy: Engine, prompts: Sequence[Sequence[int]], eos_id: int, cfg: PPOConfig
    ) -> None:
        """
        policy: around a PackedCausalLM; its weights are gathered once for each call.
        prompts: token ids of all prompts of the data, on every rank.
        """
        self.policy = policy
        self.prompts = [list(prompt) for prompt in prompts]
        self.eos_id = eos_id
        self.cfg = cfg
        self.generator = build_rollout(self._lm())

    def phase(self, phase: int) -> Rollouts:
        """Responses to the phase's next rollout_size prompts; all ranks must call it."""
        chosen = prompt_schedule(len(self.prompts), self.cfg.rollout_size, self.cfg.seed, phase)
        return self._sample([self.prompts[i] for i in chosen], phase)

    def held_out(self, prompts: Sequence[list[int]]) -> Rollouts:
        """A response to each of these prompts, with the same seeds whenever it is asked for."""
        temperature = self.cfg.eval_temperature
        if temperature is None:
            temperature = self.cfg.sampling.temperature
        sampling = replace(self.cfg.sampling, temperature=temperature)
        return self._sample(list(prompts), _HELD_OUT_PHASE, sampling)

    def calibration(self) -> Rollouts:
        """calibration_prompts responses, each to another prompt; if there are fewer prompts, they
        are asked again and again, with other seeds."""
        order = permutation(len(self.prompts), self.cfg.seed, _CALIBRATION_SHUFFLE, 0)
        count = self.cfg.reward.calibration_prompts
        chosen = list(itertools.islice(itertools.cycle(order), count))
        return self._sample([self.prompts[i] for i in chosen], CALIBRATION_PHASE)

    def _sample(
        self, prompts: list[list[int]], phase: int, sampling: SamplingConfig | None = None
    ) -> Rollouts:
        shares = deal_equal_counts([len(prompt) for prompt in prompts], distributed.world_size())
        mine = shares[distributed.rank()]
        seeds = [sampling_seed(self.cfg.seed, phase, i) for i in mine]
        with self.policy.gathered():
            self.generator.update_weights(named_tensors(self._lm()))
            responses = self.generator.generate(
                [prompts[i] for i in mine], seeds, sampling or self.cfg.sampling, self.eos_id
            )
            self.generator.drop_weights()
        return Rollouts(prompts, gather_responses(shares, responses))

    def _lm(self) -> PreTrainedModel:
        lm = self.policy.module.lm
        assert isinstance(lm, PreTrainedModel)
        return lm
