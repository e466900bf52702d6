"""Runs PPO cases and saves what they computed, for 1 rank (imported) or several (torchrun).

Usage: torchrun --nproc-per-node 2 ppo_worker.py ROOT OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer" / "ppo"))
from ppo_tiny import lm, ppo_config, prompts_file, save_folder

from s2srm import distributed
from s2srm.config import (
    DataConfig,
    KLConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    TokenRewardConfig,
)
from s2srm.engine import Engine
from s2srm.evaluation.config import EvalConfig
from s2srm.evaluation.run import evaluate
from s2srm.ppo import experience as experience_module
from s2srm.ppo import train as ppo
from s2srm.ppo.kl import KLController
from s2srm.ppo.sampler import Sampler
from s2srm.ppo.setup import load_models, prepare
from s2srm.process import run_and_exit
from s2srm.rollout.base import Response, sampling_seed

CASES = ("untied", "tied_adaptive", "gemma3_unequal", "scalar", "aligned")


def make_root(root: Path) -> None:
    """Model folders and prompts of all cases."""
    for name in ("llama", "llama-tied", "gemma3-tied"):
        save_folder(lm(name, seed=0, scale=4.0), root / name)
    save_folder(lm("llama", seed=1), root / "rm")
    save_folder(lm("llama", seed=2), root / "scalar_rm", score_seed=3)
    prompts_file(root / "prompts.jsonl")


def held_out(root: Path) -> DataConfig:
    """Fewer prompts than the responses of a phase."""
    columns = {"prompt": "prompt"}
    return DataConfig(str(root / "prompts.jsonl"), format="columns", columns=columns, limit=3)


def case_config(case: str, root: Path, out: Path) -> PPOConfig:
    """Settings of a case; odd sizes, so that ranks get unequal shares."""
    policy = {"tied_adaptive": "llama-tied", "gemma3_unequal": "gemma3-tied"}.get(case, "llama")
    reward = RewardConfig(model=ModelConfig(str(root / "rm")), calibration_prompts=7)
    changes: dict[str, Any] = {"entropy_coef": 0.01}
    if case == "scalar":
        model = ModelConfig(str(root / "scalar_rm"))
        reward = replace(reward, kind="scalar", model=model, missing_eos_penalty=0.5)
        changes["critic_warmup_steps"] = 1
    if case == "aligned":
        reward = replace(reward, token=TokenRewardConfig(mode="aligned"), clip=0.8)
    if case == "tied_adaptive":
        changes["kl"] = KLConfig(0.2, "adaptive", target=0.01, horizon=20)
    return ppo_config(
        root,
        output=str(out / case),
        policy=ModelConfig(str(root / policy)),
        reward=reward,
        rollout_size=7,
        minibatch_size=3,
        **changes,
    )


class UnequalGenerator:
    """Lets every odd response have one token at most."""

    def __init__(self, generator: Any, cfg: PPOConfig) -> None:
        self.generator = generator
        phases = range(-1, cfg.total_steps)
        self.short = {sampling_seed(cfg.seed, p, i) for p in phases for i in range(1, 50, 2)}
        self.update_weights, self.drop_weights = generator.update_weights, generator.drop_weights

    def generate(
        self, prompts: Sequence[Any], seeds: Sequence[int], sampling: Any, eos_id: int
    ) -> list[Response]:
        """Long ones first, then short ones with a limit of their own."""
        found: dict[int, Response] = {}
        for is_short in (False, True):
            chosen = [i for i, seed in enumerate(seeds) if (seed in self.short) == is_short]
            limit = replace(sampling, max_new_tokens=1 if is_short else 20)
            rows = self.generator.generate(
                [prompts[i] for i in chosen], [seeds[i] for i in chosen], limit, eos_id
            )
            found.update(zip(chosen, rows, strict=True))
        return [found[i] for i in range(len(prompts))]


def run_case(case: str, root: Path, out: Path) -> dict[str, Any]:
    """Two phases; what every rank computed, put together by number of response."""
    cfg = case_config(case, root, out)
    inputs = prepare(cfg)
    models = load_models(cfg, inputs)
    sampler = Sampler(models.policy, inputs.prompts, inputs.template.eos_id, cfg)
    if case == "gemma3_unequal":
        sampler.generator = UnequalGenerator(sampler.generator, cfg)  # type: ignore[assignment]
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    _record_gradients("policy", models.policy, gradients)
    _record_gradients("critic", models.critic, gradients)
    phases: list[dict[str, Any]] = []
    original = experience_module.collect_experience

    def recorded(*args: Any, **kwargs: Any) -> Any:
        experience = original(*args, **kwargs)
        phases.append(_by_response(experience))
        return experience

    ppo.collect_experience = recorded
    try:
        scale = ppo.calibrate(models, sampler, cfg)
        controller = KLController(cfg.kl)
        metrics = [
            ppo.run_phase(phase, models, sampler, controller, inputs, cfg)
            for phase in range(cfg.total_steps)
        ]
    finally:
        ppo.collect_experience = original
    return {
        "scale": scale,
        "coef": controller.coef,
        "metrics": metrics,
        "phases": phases,
        "gradients": gradients,
        "policy": _weights(models.policy),
        "critic": _weights(models.critic),
    }


def _by_response(experience: Any) -> dict[str, Any]:
    """Per response: tokens, rewards, advantages, ..."""
    offsets = experience.cu_rows.tolist()
    found = {}
    for number, response in enumerate(experience.rollouts.responses):
        span = slice(offsets[number], offsets[number + 1])
        found[number] = {
            "tokens": response.tokens,
            "finished": response.finished,
            "prompt": experience.rollouts.prompts[number],
            "rewards": experience.reward.rewards[span],
            "old_logprobs": experience.old_logprobs[span],
            "k1": experience.k1[span],
            "advantages": experience.advantages[span],
            "returns": experience.returns[span],
        }
    return found


def _record_gradients(name: str, engine: Engine, into: dict[str, Any]) -> None:
    """Keep the whole gradients of the first optimiser step."""
    step: Callable[[], Any] = engine.step

    def recording_step() -> Any:
        if name not in into:
            into[name] = {
                key: _whole_gradient(parameter)
                for key, parameter in engine.module.named_parameters()
                if parameter.requires_grad
            }
        return step()

    engine.step = recording_step  # type: ignore[method-assign]


def _whole_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        assert parameter.grad is not None
        return parameter.grad.clone()
    from deepspeed.utils import safe_get_full_grad

    gradient = safe_get_full_grad(parameter)
    assert gradient is not None
    return gradient.clone().float()


def _weights(engine: Engine) -> dict[str, torch.Tensor]:
    with engine.gathered():
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def compare_policies(root: Path, out: Path) -> None:
    """`s2srm eval`: more ranks than prompts in its last batch."""
    columns = {"prompt": "prompt"}
    evaluate(
        EvalConfig(
            output=str(out / "eval"),
            policies={"a": str(root / "llama"), "b": str(root / "gemma3-tied")},
            data=DataConfig(str(root / "prompts.jsonl"), format="columns", columns=columns),
            reward_model=ModelConfig(str(root / "rm")),
            sampling=SamplingConfig(max_new_tokens=6, batch_size=3),
            num_prompts=7,
            num_resamples=100,
            feedback_rows=3,
        )
    )


def gathered() -> list[torch.Tensor]:
    """What ranks with 0, 3, ... numbers get of each other."""
    rank = distributed.rank()
    kinds = (torch.float32, torch.float64, torch.int64)
    return [
        torch.cat(distributed.gather_tensors(torch.arange(3 * rank, dtype=kind))) for kind in kinds
    ]


def main(root: Path, out: Path) -> None:
    """All cases, saved by rank 0."""
    torch.set_num_threads(1)
    distributed.start()
    results = {case: run_case(case, root, out) for case in CASES}
    # The whole stage, with samples and saving; one of two ranks has nothing to do but keep step.
    cfg = case_config("untied", root, out)
    sizes = {"rollout_size": 1, "minibatch_size": 1, "total_steps": 1}
    sizes |= {"eval_data": held_out(root), "keep_best": "eval/reward/sum_mean"}
    ppo.run(replace(cfg, output=str(out / "stage"), **sizes))
    results["gathered"] = gathered()
    compare_policies(root, out)
    if distributed.is_main():
        torch.save(results, out / "results.pt")
    distributed.barrier()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
