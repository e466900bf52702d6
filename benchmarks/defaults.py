"""The measurements behind two defaults (docs/settings.md): critic.clip and optim.eps.

    python -m benchmarks.defaults critic-clip
    python -m benchmarks.defaults adam-eps --model FOLDER --data ROWS.jsonl

critic-clip  a critic that starts at 0 learns returns of mean -8.88 and standard deviation 1, with
             the trainer's value loss: its mean value after each phase, for several clip ranges
adam-eps     one gradient of a model (SFT, mean over tokens), and which share of the learning rate
             AdamW's first step moves a weight by: mean over weights of |g| / (|g| + eps)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from s2srm.config import ModelConfig
from s2srm.models.load import load_causal_lm, load_tokenizer
from s2srm.packing import Segment, pack
from s2srm.ppo.values import value_loss

MEAN, PHASES, EPOCHS, MINIBATCHES, ROWS = -8.88, 5, 4, 4, 512


def critic_means(clip: float, *, of_std: bool = False, lr: float = 1e-3) -> list[float]:
    """Mean value after each phase. of_std: the range is clip times the returns' deviation."""
    torch.manual_seed(0)
    head = nn.Linear(256, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    critic = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), head)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0)
    means: list[float] = []
    for _ in range(PHASES):
        states = torch.randn(MINIBATCHES, ROWS, 64)
        returns = MEAN + states[..., 0]
        with torch.no_grad():
            old = critic(states)[..., 0]
        width = clip * float(returns.std()) if of_std else clip
        for _ in range(EPOCHS):
            for x, target, before in zip(states, returns, old, strict=True):
                loss = 0.1 * value_loss(critic(x)[..., 0], before, target, width, float(ROWS))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
                optimizer.step()
        with torch.no_grad():
            means.append(float(critic(states).mean()))
    return means


def gradient(folder: str, data: Path, num_rows: int = 8) -> torch.Tensor:
    """The whole gradient, flattened."""
    cfg = ModelConfig(folder)
    tokenizer, model = load_tokenizer(cfg), load_causal_lm(cfg, train=True)
    segments: list[Segment] = []
    for line in data.read_text(encoding="utf-8").splitlines()[:num_rows]:
        row = json.loads(line)
        prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "chosen"))
        segments.append(Segment([*prompt, *answer][:256], start=len(prompt)))
    model(pack(segments), reduction="mean").backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description="The measurements behind two defaults.")
    parser.add_argument("which", choices=("critic-clip", "adam-eps"))
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    if args.which == "critic-clip":
        for lr in (1e-3, 3e-3):
            for clip, of_std in ((0.2, False), (0.2, True), (1.0, True), (0.0, False)):
                means = " ".join(
                    f"{mean:6.2f}" for mean in critic_means(clip, of_std=of_std, lr=lr)
                )
                print(f"lr {lr:g}  clip {clip:g}{' std' if of_std else ''}: {means}")
        return
    found = gradient(args.model, args.data).abs()
    norm, rms = float(found.norm()), float(found.square().mean().sqrt())
    print(
        f"{found.numel()} weights, norm {norm:.3g}, rms {rms:.3g}, clipped to 1: {rms / norm:.3g}"
    )
    for size in (1.0, 0.1):
        at = found * (size / norm)
        for eps in (1e-5, 1e-8):
            share = float((at / (at + eps)).mean())
            print(f"norm {size:g}, eps {eps:g}: moves by {share:.3f} of the learning rate")


if __name__ == "__main__":
    main()
