"""`s2srm demo`: preference triples to aligned policy on a generated world, by the real stages.

Data, SFT, both reward models on the same triples, PPO with each, evaluation by the world's gold
judge, report. Every stage is the one behind its own command. A reward model and the PPO with it
have nothing to do with the other two, so these pairs run side by side.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from s2srm.bounds import Bounds, NonNegativeInt, check_bounds
from s2srm.commands.demo_settings import SETTINGS, DemoSettings
from s2srm.commands.parsing import parse
from s2srm.commands.side_by_side import ChainedStage, run_and_print, run_chains
from s2srm.commands.stages import STAGES
from s2srm.config import (
    CriticConfig,
    DataConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RMConfig,
    SamplingConfig,
    ScalarRMConfig,
    SFTConfig,
)
from s2srm.errors import UserError
from s2srm.evaluation.config import EvalConfig, WorldName
from s2srm.validation import expand_paths, output_folder

Result = TypeVar("Result")

SUMMARY = "The whole pipeline on a generated miniature world, on a CPU, in minutes."
_MICROBATCH_TOKENS = 8192
_MAX_TOKENS = 128


@dataclass(frozen=True)
class DemoConfig:
    """Which world, where to, how much."""

    world: WorldName = "summarization"
    """The miniature world."""
    all: bool = False
    """All three worlds, one after the other."""
    output: str = "runs/demo"
    """Folder; every world gets a folder in it, and an earlier demo there is replaced."""
    seed: NonNegativeInt = 0
    """Seed of data, weights and sampling."""
    scale: Annotated[float, Bounds(above=0, high=1)] = 1.0
    """Fraction of the data and steps; results at a small one mean nothing."""


def run(argv: Sequence[str]) -> None:
    """Run the demo for one world or all."""
    cfg = expand_paths(parse(DemoConfig, argv, "demo", SUMMARY))
    check_bounds(cfg)
    output_folder(cfg.output, "the folder for the demo")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("demo runs in one process; start it without torchrun")
    # Read when torch is loaded. Threads that spin while they wait for each other make a step on
    # matrices this small ten times slower as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    worlds: list[WorldName] = list(SETTINGS) if cfg.all else [cfg.world]
    for world in worlds:
        run_world(world, Path(cfg.output) / world, cfg.seed, SETTINGS[world].scaled(cfg.scale))


def run_world(world: WorldName, folder: Path, seed: int, settings: DemoSettings) -> None:
    """Every stage for one world, then the table and the path of the report."""
    from s2srm.commands.libraries import quiet_libraries
    from s2srm.evaluation.run import evaluate
    from s2srm.report.page import write_report
    from s2srm.report.terminal import print_evaluation, wide_console
    from s2srm.worlds import WorldSizes, get_world

    quiet_libraries()
    configs = DemoConfigs(world, folder, seed, settings)
    clock = StageClock(world)
    sizes = WorldSizes(
        demonstrations=settings.demonstrations,
        preferences=settings.preferences,
        preferences_dev=settings.dev_rows,
        prompts_train=settings.prompts,
    )
    clock.time("data", lambda: get_world(world).write(folder / "data", sizes, seed))
    run_and_print(world, ChainedStage("sft", STAGES["sft"], configs.sft()))
    run_chains(
        world,
        [
            [
                ChainedStage("rm", STAGES["rm"], configs.rm()),
                ChainedStage("ppo-seq2seq", STAGES["ppo"], configs.ppo("seq2seq")),
            ],
            [
                ChainedStage("scalar-rm", STAGES["scalar-rm"], configs.scalar_rm()),
                ChainedStage("ppo-scalar", STAGES["ppo"], configs.ppo("scalar")),
            ],
        ],
    )
    result = clock.time("eval", lambda: evaluate(configs.evaluation()))
    page = write_report([folder], folder / "report.html")
    print_evaluation(result.output / "eval.json", wide_console())
    clock.total()
    print(f"report: {page.resolve()}")


class StageClock:
    """Runs stages and prints what each took and found."""

    def __init__(self, world: str) -> None:
        self.world = world
        self.started = time.monotonic()

    def time(self, name: str, work: Callable[[], Result]) -> Result:
        """Run it and print its wall-clock time."""
        started = time.monotonic()
        result = work()
        print(f"{self.world}: {name} took {time.monotonic() - started:.0f} s", flush=True)
        return result

    def total(self) -> None:
        """Print the time of everything so far."""
        print(f"{self.world}: everything took {time.monotonic() - self.started:.0f} s", flush=True)


@dataclass(frozen=True)
class DemoConfigs:
    """The config of every stage of one world's demo."""

    world: WorldName
    folder: Path
    seed: int
    settings: DemoSettings

    def sft(self) -> SFTConfig:
        """From random weights, on the noisy writer's demonstrations."""
        s = self.settings
        return SFTConfig(
            **self._supervised("sft", "data/model", "sft.jsonl", s.sft_lr, s.sft_steps),
            response_column="response",
        )

    def rm(self) -> RMConfig:
        """From the SFT model, on the triples."""
        s = self.settings
        return RMConfig(
            **self._supervised("rm", "sft", "preferences.jsonl", s.rm_lr, s.rm_steps),
            eval_data=self._data("preferences_dev.jsonl"),
            identity_weight=s.identity_weight,
            probe_rows=s.dev_rows,
        )

    def scalar_rm(self) -> ScalarRMConfig:
        """From the SFT model, on the same triples."""
        s = self.settings
        common = self._supervised(
            "scalar-rm", "sft", "preferences.jsonl", s.scalar_rm_lr, s.scalar_rm_steps
        )
        return ScalarRMConfig(**common, eval_data=self._data("preferences_dev.jsonl"))

    def ppo(self, kind: Literal["seq2seq", "scalar"]) -> PPOConfig:
        """From the SFT model; but for the reward, both kinds get the same values."""
        s = self.settings
        rm = "rm" if kind == "seq2seq" else "scalar-rm"
        return PPOConfig(
            **self._stage(f"ppo-{kind}"),
            policy=ModelConfig(path=self._path("sft")),
            reward=RewardConfig(kind=kind, model=ModelConfig(path=self._path(rm))),
            critic=CriticConfig(
                optim=OptimConfig(lr=s.critic_lr, eps=s.adam_eps), clip=s.critic_clip
            ),
            data=self._data("prompts_train.jsonl"),
            sampling=SamplingConfig(max_new_tokens=s.max_new_tokens, batch_size=s.rollout_size),
            optim=OptimConfig(lr=s.ppo_lr, eps=s.adam_eps),
            kl=KLConfig(coef=s.kl_coef),
            total_steps=s.ppo_phases,
            rollout_size=s.rollout_size,
            minibatch_size=s.minibatch_size,
            ppo_epochs=s.ppo_epochs,
            microbatch_tokens=_MICROBATCH_TOKENS,
        )

    def evaluation(self) -> EvalConfig:
        """The three policies, greedy and at temperature 1, on test and ood prompts."""
        names = ("sft", "ppo-scalar", "ppo-seq2seq")
        return EvalConfig(
            output=self._path("eval"),
            overwrite=True,
            seed=self.seed,
            policies={name: self._path(name) for name in names},
            against=["sft", "ppo-scalar"],
            world=self.world,
            reward_model=ModelConfig(path=self._path("rm")),
            sampling=SamplingConfig(max_new_tokens=self.settings.max_new_tokens, batch_size=128),
            num_prompts=self.settings.eval_prompts,
            num_samples=self.settings.eval_samples,
        )

    def _stage(self, name: str) -> dict[str, Any]:
        from s2srm.worlds import get_world

        template = get_world(self.world).template
        return {
            "output": self._path(name),
            "seed": self.seed,
            "overwrite": True,
            "template": template,
        }

    def _supervised(
        self, name: str, model: str, data: str, lr: float, steps: int
    ) -> dict[str, Any]:
        return self._stage(name) | {
            "model": ModelConfig(path=self._path(model)),
            "data": self._data(data),
            "optim": OptimConfig(
                lr=lr,
                eps=self.settings.adam_eps,
                warmup_steps=min(20, steps // 10),
                weight_decay=0.01,
            ),
            "max_steps": steps,
            "batch_size": self.settings.batch_size,
            "microbatch_tokens": _MICROBATCH_TOKENS,
        }

    def _data(self, name: str) -> DataConfig:
        return DataConfig(
            path=self._path(f"data/{name}"),
            max_prompt_tokens=_MAX_TOKENS,
            max_response_tokens=_MAX_TOKENS,
        )

    def _path(self, name: str) -> str:
        return str(self.folder / name)
