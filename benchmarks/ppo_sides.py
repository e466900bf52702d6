"""The two trainers of `bench_ppo_step`, each taking one PPO step on the same problem.

`OurSide` calls `s2srm.ppo.train.run_phase` with engines of torch. `TrlSide` calls
`trl.experimental.ppo.PPOTrainer.train` for one update. Neither trainer's code is changed: phases
are told apart by clocks around functions that the trainers call themselves, TRL's shuffle of a
minibatch is replaced by the other side's, and `generate` ends responses where the problem says.
"""

from __future__ import annotations

import importlib
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ppo_problem import PAD, Problem, force_lengths, minibatches

PHASES = ("rollout", "scoring", "update", "total")
LR, KL_COEF, VF_COEF = 3e-6, 0.05, 0.1


class Seconds(NamedTuple):
    """Wall-clock, and user and system time of all threads."""

    wall: float
    cpu: float


class Work(NamedTuple):
    """What a step did: response tokens, and tokens of prompts and responses by minibatch."""

    response_tokens: int
    minibatch_tokens: list[int]
    is_finite: bool


class Step(NamedTuple):
    """One PPO step of a trainer."""

    seconds: dict[str, Seconds]
    work: Work


class Marks:
    """When a step began and when each of its phases was over."""

    def __init__(self) -> None:
        self.times = [self._now()]

    def mark(self) -> None:
        """A phase is over."""
        self.times.append(self._now())

    def seconds(self) -> dict[str, Seconds]:
        """By the names of PHASES."""
        assert len(self.times) == len(PHASES), f"{len(self.times) - 1} phases were seen"
        spans = [*zip(self.times, self.times[1:], strict=False), (self.times[0], self.times[-1])]
        return {
            name: Seconds(end[0] - start[0], end[1] - start[1])
            for name, (start, end) in zip(PHASES, spans, strict=True)
        }

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


class OurSide:
    """s2srm: scalar reward, policy and critic with an AdamW each."""

    def __init__(self, problem: Problem) -> None:
        from s2srm.config import (
            CriticConfig,
            EngineConfig,
            KLConfig,
            ModelConfig,
            OptimConfig,
            PPOConfig,
            RewardConfig,
            SamplingConfig,
        )
        from s2srm.engine import build_engine
        from s2srm.models.load import load_causal_lm, load_value_model
        from s2srm.ppo import train
        from s2srm.ppo.kl import KLController
        from s2srm.ppo.sampler import Sampler
        from s2srm.ppo.setup import Models
        from s2srm.rewards.scalar import ScalarReward
        from s2srm.rollout.hf import HFRollout

        model = ModelConfig(path=problem.model)
        optim = OptimConfig(lr=LR, schedule="constant")
        self.problem = problem
        self.cfg = cfg = PPOConfig(
            policy=model,
            reward=RewardConfig(kind="scalar", model=model, scale="none"),
            critic=CriticConfig(optim=optim),
            optim=optim,
            engine=EngineConfig(kind="torch"),
            sampling=SamplingConfig(problem.longest_response, batch_size=problem.rollout_size),
            kl=KLConfig(coef=KL_COEF),
            rollout_size=problem.rollout_size,
            minibatch_size=problem.minibatch_size,
            ppo_epochs=problem.num_epochs,
            vf_coef=VF_COEF,
            seed=problem.seed,
        )

        def engine(load: Callable[..., Any], trained: bool, **kwargs: Any) -> Any:
            return build_engine(
                lambda zero: load(model, zero_config=zero, train=trained, **kwargs),
                cfg.engine,
                optim if trained else None,
            )

        reward = engine(load_value_model, False, init="normal")
        self.models = Models(
            policy=engine(load_causal_lm, True),
            reference=engine(load_causal_lm, False),
            critic=engine(load_value_model, True, init="zero"),
            reward=ScalarReward(reward, cfg.reward, microbatch_tokens=cfg.microbatch_tokens),
        )
        self.sampler = Sampler(self.models.policy, problem.prompts, problem.eos_id, cfg)
        generator = self.sampler.generator
        assert isinstance(generator, HFRollout)
        force_lengths(generator.model, problem)
        self.controller = KLController(cfg.kl)
        self.train = train

    def step(self, number: int) -> Step:
        """Step `number` = 0, 1, ... of a run."""
        marks = Marks()
        rollouts: list[Any] = []
        sample, learn = self.sampler.phase, self.train.learn

        def timed_sample(phase: int) -> Any:
            rollouts.append(sample(phase))
            marks.mark()
            return rollouts[0]

        def timed_learn(*args: Any) -> Any:
            marks.mark()
            return learn(*args)

        self.sampler.phase, self.train.learn = timed_sample, timed_learn  # type: ignore[method-assign]
        try:
            found = self.train.run_phase(
                *(number, self.models, self.sampler, self.controller, _no_inputs(), self.cfg)
            )
            marks.mark()
        finally:
            self.sampler.phase, self.train.learn = sample, learn  # type: ignore[method-assign]
        sampled = [len(response.tokens) for response in rollouts[0].responses]
        lengths = [len(p) + n for p, n in zip(rollouts[0].prompts, sampled, strict=True)]
        plans = [
            self.train.epoch_plan(rollouts[0], number, epoch, self.cfg)
            for epoch in range(self.problem.num_epochs)
        ]
        tokens = [
            sum(lengths[i] for group in minibatch.microbatches for i in group)
            for plan in plans
            for minibatch in plan
        ]
        finite = all(math.isfinite(value) for value in found.values())
        return Step(marks.seconds(), Work(sum(sampled), tokens, finite))


def _no_inputs() -> Any:
    """run_phase reads its inputs for samples.jsonl only, which is not written here."""
    return SimpleNamespace()


class TrlSide:
    """TRL: policy and value model in one wrapper with one (fused) AdamW, padded batches."""

    def __init__(self, problem: Problem) -> None:
        import datasets
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )

        ppo: Any = importlib.import_module("trl.experimental.ppo")

        tokenizer: Any = AutoTokenizer.from_pretrained(problem.model, padding_side="left")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(problem.eos_id)
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, problem.eos_id)
        self.folder = tempfile.TemporaryDirectory()
        args = ppo.PPOConfig(
            output_dir=self.folder.name,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            learning_rate=LR,
            lr_scheduler_type="constant",
            kl_coef=KL_COEF,
            vf_coef=VF_COEF,
            temperature=1.0,
            stop_token="eos",
            response_length=problem.longest_response,
            per_device_train_batch_size=problem.rollout_size,
            gradient_accumulation_steps=1,
            num_mini_batches=problem.num_minibatches,
            num_ppo_epochs=problem.num_epochs,
            total_episodes=problem.rollout_size,
            local_rollout_forward_batch_size=problem.rollout_size,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=problem.seed,
        )

        def load(cls: Any, **kwargs: Any) -> Any:
            return cls.from_pretrained(problem.model, dtype=torch.float32, **kwargs)

        scores = {"num_labels": 1}
        rows = datasets.Dataset.from_dict({"input_ids": problem.prompts})
        policy = load(AutoModelForCausalLM)
        self.trainer = ppo.PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=policy,
            ref_model=load(AutoModelForCausalLM),
            reward_model=load(AutoModelForSequenceClassification, **scores),
            value_model=load(AutoModelForSequenceClassification, **scores),
            train_dataset=rows,
            eval_dataset=rows,
        )
        force_lengths(policy, problem)
        self.problem = problem
        self.module: Any = ppo.ppo_trainer

    def step(self, number: int) -> Step:
        """Step `number` = 0, 1, ... of a run: one update of `train`."""
        module, problem = self.module, self.problem
        marks = Marks()
        sampled: list[Tensor] = []
        tokens: list[int] = []
        epochs: list[int] = []
        generate, forward, numpy = module.batch_generation, module.forward, module.np

        def timed_generation(*args: Any) -> Any:
            found = generate(*args)
            sampled.append(found[0])
            marks.mark()
            return found

        def permutation(_: int) -> list[int]:
            """The minibatches of the other side; the first pass begins the update."""
            if not epochs:
                marks.mark()
            rows = {problem.number_of(row): i for i, row in enumerate(sampled[0].tolist())}
            epochs.append(len(epochs))
            plan = minibatches(problem, number, epochs[-1])
            return [rows[i] for minibatch in plan for i in minibatch]

        def counted_forward(model: Any, query_responses: Tensor, pad_token_id: int) -> Any:
            if torch.is_grad_enabled():
                tokens.append(int((query_responses != pad_token_id).sum()))
            return forward(model, query_responses, pad_token_id)

        module.batch_generation, module.forward = timed_generation, counted_forward
        module.np = SimpleNamespace(
            random=SimpleNamespace(permutation=lambda n: numpy.array(permutation(n)))
        )
        try:
            self.trainer.train()
            marks.mark()
        finally:
            module.batch_generation, module.forward, module.np = generate, forward, numpy
        logged = self.trainer.state.log_history[-1]
        finite = all(math.isfinite(v) for v in logged.values() if isinstance(v, float))
        prompt_tokens = sum(len(prompt) for prompt in problem.prompts)
        response_tokens = int((sampled[0] != PAD).sum()) - prompt_tokens
        return Step(marks.seconds(), Work(response_tokens, tokens, finite))


SIDES: dict[str, Callable[[Problem], OurSide | TrlSide]] = {"s2srm": OurSide, "trl": TrlSide}


def model_name(path: str) -> str:
    """The folder's last name."""
    return Path(path).name
