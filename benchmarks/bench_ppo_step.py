"""A PPO step beside TRL's, phase by phase: time in turns in one process, memory in fresh ones.

    python -m benchmarks.bench_ppo_step --model DIR --lengths mixed

Timed is one whole step of each trainer, on one process, in float32, from its own code:
`s2srm.ppo.train.run_phase` with the torch engine and a scalar reward, and one update of
`trl.experimental.ppo.PPOTrainer.train` (1.12.0, the last release with PPO). Both get four models
(policy, reference, critic, reward) from the same folder, the same prompts in the same minibatches
with one optimiser step each, as many passes, AdamW at a constant rate, and temperature 1. Every
response ends where the problem says (ppo_problem.py), so both sample and learn from the same number
of tokens, though not from the same ones.

    rollout   TRL: `batch_generation`.  s2srm: `Sampler.phase`.
    scoring   all between rollout and update: logprobs, values, rewards, KL, advantages. In s2srm
              also metrics of the phase and the old policy's logprobs (TRL takes the sampler's).
    update    all minibatches, to the end of the step. In TRL also the step's metrics.

Before a time is reported, both must have sampled the problem's number of tokens, have had as many
tokens in every minibatch, and report finite numbers only. `ratio` is the median over rounds of
TRL's time over ours in the same round; `cpu` is user and system time of all threads, which another
program on the machine disturbs less. Memory is the most that a fresh process with one of the two
trainers had resident, from its start to the end of its last step.

Both run the same threads: --threads. Left out: TRL's log lines and our metrics files, saving,
several processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata, util

import torch

from benchmarks.ppo_problem import Problem, make_problem
from benchmarks.ppo_sides import PHASES, SIDES, Step, model_name
from benchmarks.rows import device_name
from benchmarks.timing import status_bytes

TRL = "1.12.0"
HOW_TO_INSTALL = (
    f"bench_ppo_step: TRL {TRL} is not installed, so there is nothing to compare with: "
    "pip install -e '.[bench]'"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tables of time and memory; 1 where the two did not do the same work."""
    options = _options(arguments)
    if util.find_spec("trl") is None or metadata.version("trl") != TRL:
        print(HOW_TO_INSTALL, file=sys.stderr)
        return 2
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(options.threads)
    problem = make_problem(
        *(options.model, options.lengths, options.longest, options.rollout_size),
        *(options.minibatches, options.epochs, options.seed),
    )
    if options.only is not None:
        side = SIDES[options.only](problem)
        for number in range(options.rounds):
            side.step(number)
        print(json.dumps({"peak_mib": status_bytes("VmHWM") / 2**20}))
        return 0
    print(_title(problem, options))
    if options.rounds > 0:
        rounds = _rounds(problem, options.rounds)
        problems = [text for pair in rounds for text in differences(problem, pair)]
        if problems:
            print("\n".join(problems), file=sys.stderr)
            return 1
        print(time_table(rounds))
    if not options.no_memory:
        print(memory_table({name: _memory(name, arguments) for name in SIDES}))
    return 0


def differences(problem: Problem, pair: dict[str, Step]) -> list[str]:
    """What the two did not do alike in a round, or not as the problem says."""
    found: list[str] = []
    wanted = sum(problem.response_lengths)
    for name, step in pair.items():
        if step.work.response_tokens != wanted:
            found.append(f"{name} sampled {step.work.response_tokens} tokens, not {wanted}")
        if not step.work.is_finite:
            found.append(f"{name} reports numbers that are not finite")
    ours, theirs = (pair[name].work.minibatch_tokens for name in ("s2srm", "trl"))
    if ours != theirs:
        found.append(f"minibatches of {ours} tokens in s2srm, {theirs} in TRL")
    return found


def time_table(rounds: list[dict[str, Step]]) -> str:
    """Medians over the rounds and of the ratios in each."""
    lines = [
        "| phase | s2srm s | TRL s | ratio | s2srm cpu s | TRL cpu s | ratio cpu |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for phase in PHASES:
        cells = [phase]
        for clock in ("wall", "cpu"):
            ours, theirs = (
                [getattr(pair[name].seconds[phase], clock) for pair in rounds]
                for name in ("s2srm", "trl")
            )
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            cells += [f"{statistics.median(times):.2f}" for times in (ours, theirs)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(peaks: dict[str, float]) -> str:
    """MiB, and ours over TRL's."""
    ours, theirs = peaks["s2srm"], peaks["trl"]
    return (
        "| peak memory | s2srm MiB | TRL MiB | s2srm / TRL |\n| --- | --- | --- | --- |\n"
        f"| fresh process | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |"
    )


def _rounds(problem: Problem, count: int) -> list[dict[str, Step]]:
    """Steps of both in turns, whoever was second going first next; a first round warms up."""
    sides = {name: make(problem) for name, make in SIDES.items()}
    found: list[dict[str, Step]] = []
    for number in range(count + 1):
        order = list(sides) if number % 2 else list(sides)[::-1]
        steps = {name: sides[name].step(number) for name in order}
        found.append({name: steps[name] for name in sides})
    return found[1:]


def _memory(name: str, arguments: Sequence[str] | None) -> float:
    """MiB that a fresh process with one of the two had at most."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = [sys.executable, "-m", "benchmarks.bench_ppo_step", *given, "--only", name]
    done = subprocess.run([*command, "--rounds", "2"], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"bench_ppo_step: the process with {name} ended with {done.returncode}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def _title(problem: Problem, options: argparse.Namespace) -> str:
    tokens = sum(len(prompt) for prompt in problem.prompts), sum(problem.response_lengths)
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "trl")]
    return (
        f"{model_name(problem.model)}, {options.lengths} lengths (longest {options.longest}): "
        f"{problem.rollout_size} prompts of {tokens[0]} tokens, responses of {tokens[1]}, "
        f"{problem.num_minibatches} minibatches, {problem.num_epochs} passes, float32, seed "
        f"{problem.seed}, {options.threads} threads, {options.rounds} rounds; "
        f"{device_name(torch.device('cpu'))}, Python {platform.python_version()}, "
        f"{', '.join(versions)}, {datetime.now(UTC):%Y-%m-%d}"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_ppo_step",
        description=(__doc__ or "").partition("\n")[0],
    )
    add = made.add_argument
    add("--model", required=True, help="folder of a Hugging Face causal LM with its tokenizer")
    add("--lengths", choices=["mixed", "equal"], default="mixed")
    add("--longest", type=int, default=256, help="longest prompt and response of the mixed ones")
    add("--rollout-size", type=int, default=32)
    add("--minibatches", type=int, default=2)
    add("--epochs", type=int, default=2)
    add("--rounds", type=int, default=5, help="timed ones, after one that warms up")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--no-memory", action="store_true", help="time only")
    add("--only", choices=list(SIDES), help="steps of one of the two, then its peak memory")
    options = made.parse_args(arguments)
    if options.rollout_size % options.minibatches:
        made.error("--rollout-size must be a multiple of --minibatches")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
