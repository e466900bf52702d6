"""Every shipped recipe on two layers of its architecture: bfloat16, ZeRO-3, two steps.

Run under torchrun: `recipes_worker.py start ROOT` runs the recipes of every model in turn, as they
feed each other, in ROOT/whole; ROOT/cut gets what each would have left had it been killed after its
first step. `recipes_worker.py resume ROOT` goes on from there. Only sizes, paths and numbers of
steps differ from the recipes. Gemma 3 is a model that no recipe is for: it takes those of Gemma 2B.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
)
from zero3 import keep_whole_up_to

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer" / "checkpoint"))
from runs_tiny import run

from s2srm import distributed
from s2srm.checkpoint.saver import Checkpoints
from s2srm.commands.parsing import parse
from s2srm.commands.stages import STAGES
from s2srm.config import PPOConfig, StageConfig
from s2srm.engine import build
from s2srm.process import run_and_exit
from s2srm.worlds.tokenizer import word_tokenizer

ORDER = ("sft", "rm", "scalar-rm", "ppo")
"""Each needs what those before it have saved."""
RECIPES_OF = {"gemma3": "gemma-2b"}
"""Model -> the model whose recipes it takes, where that is another."""
KEPT_WHOLE = {"gemma-2b": 0, "llama2-7b": 20, "smollm2-135m": 600, "tiny": 100_000, "gemma3": 0}
"""Model -> elements up to which ZeRO-3 keeps a parameter whole: none of them, norms (16 elements),
also the projections of the attention, all."""
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WORDS = [f"w{i}" for i in range(20)]
SEPARATOR_WORDS = ["Corrected", "response:"]


def architecture(model: str) -> PretrainedConfig:
    """Family, heads and ties are the model's own."""
    match model:
        case "gemma-2b":
            heads = {"num_attention_heads": 8, "num_key_value_heads": 1}
            act = "gelu_pytorch_tanh"
            return GemmaConfig(
                **SIZES, **heads, tie_word_embeddings=True, hidden_act=act, hidden_activation=act
            )
        case "llama2-7b" | "tiny":
            heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
            return LlamaConfig(**SIZES, **heads, tie_word_embeddings=False)
        case "smollm2-135m":
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
            return LlamaConfig(**{**SIZES, "hidden_size": 36}, **heads, tie_word_embeddings=True)
        case "gemma3":
            return Gemma3TextConfig(
                **{**SIZES, "vocab_size": 262_144},
                num_attention_heads=4,
                num_key_value_heads=1,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention"],
                tie_word_embeddings=True,
            )
    raise ValueError(model)


def make_inputs(root: Path) -> None:
    """ROOT/models/MODEL, and rows in the form of PKU-SafeRLHF and of the demo."""
    tokenizer = word_tokenizer([*WORDS, *SEPARATOR_WORDS])
    for model in KEPT_WHOLE:
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(architecture(model))
        with torch.no_grad():
            # Tied, a token's logit after itself is about hidden_size * std: more than 5, and a
            # response is one word again and again, which an RM cannot tell from another. Of a
            # large vocabulary half of what is sampled are words: to an RM all else is alike.
            small = 4.8 / lm.config.hidden_size
            std = 1.0 if lm.config.vocab_size > 32 else small
            rows = lm.get_output_embeddings().weight.normal_(std=std)
            rows[: len(tokenizer) - len(WORDS)] *= small / std
            rows[len(tokenizer) :] = 0.0
        folder = root / "models" / model
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def text(start: int, length: int) -> str:
        return " ".join(WORDS[(start + 3 * j) % len(WORDS)] for j in range(length))

    def rows(num: int) -> list[dict[str, Any]]:
        return [
            {
                "prompt": text(i, 2 + i % 5),
                "response_0": text(i + 1, 1 + i % 4),
                "response_1": text(i + 2, 3 + i % 3),
                "better_response_id": i % 2,
                "safer_response_id": i % 2,
            }
            for i in range(num)
        ]

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        better = row["better_response_id"]
        chosen, rejected = row[f"response_{better}"], row[f"response_{1 - better}"]
        prompt = row["prompt"]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "response": chosen}

    for name, num in (("train", 12), ("test", 4)):
        for folder, form in (("pku", dict), ("demo", plain)):
            path = root / "data" / folder / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(form(row)) + "\n" for row in rows(num)))


def recipe(model: str, stage: str, root: Path, run_folder: str) -> StageConfig:
    """The shipped recipe, small, in bfloat16, from the models that ROOT/whole holds."""
    name = RECIPES_OF.get(model, model)
    cfg: Any = parse(STAGES[stage].config, ["--config", f"{name}-{stage}"], stage, "")

    def place(path: str) -> str:
        if path.startswith("runs/") and not path.startswith("runs/demo/"):
            return str(root / "whole" / model / path.rpartition("/")[2])
        return str(root / "models" / model)

    def small_model(old: Any) -> Any:
        return dataclasses.replace(old, path=place(old.path), precision="bfloat16")

    def small_data(old: Any, split: str) -> Any:
        kind = "pku" if old.format == "pku_saferlhf" else "demo"
        path = str(root / "data" / kind / f"{split}.jsonl")
        return dataclasses.replace(old, path=path, split="train", limit=None)

    changes: dict[str, Any] = {
        "output": str(root / run_folder / model / stage),
        "save_every": 1,
        "resume": "auto",
        "microbatch_tokens": 64,
        "data": small_data(cfg.data, "train"),
    }
    if isinstance(cfg, PPOConfig):
        reward = dataclasses.replace(
            cfg.reward, model=small_model(cfg.reward.model), calibration_prompts=16
        )
        changes |= {
            "policy": small_model(cfg.policy),
            "reward": reward,
            "sampling": dataclasses.replace(cfg.sampling, max_new_tokens=6),
            "total_steps": 2,
            "rollout_size": 8,
            "minibatch_size": 4,
            "critic_warmup_steps": min(1, cfg.critic_warmup_steps),
        }
    else:
        changes |= {"model": small_model(cfg.model), "max_steps": 2, "batch_size": 6}
        if cfg.eval_data is not None:
            changes["eval_data"] = small_data(cfg.eval_data, "test")
        if stage == "rm":
            changes["probe_rows"] = 2
    return dataclasses.replace(cfg, **changes)


def keep_copy_after_first_step(root: Path) -> None:
    """ROOT/cut/MODEL/STAGE: the folder as it is after step 1, which is all that a kill leaves."""
    after_step = Checkpoints.after_step

    def and_copy(self: Checkpoints, step: int, check: Callable[[], None] | None = None) -> None:
        after_step(self, step, check)
        if step == 1 and distributed.is_main():
            shutil.copytree(self.output, root / "cut" / self.output.relative_to(root / "whole"))
        distributed.barrier()

    Checkpoints.after_step = and_copy


def main(command: str, root: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    distributed.start()
    # Beside a GPU engine.offload idle moves models away; here it empties and fills them as well.
    build.relieves = lambda device: True
    folder = "whole" if command == "start" else "cut"
    if command == "start":
        keep_copy_after_first_step(root)
    for model, num_elements in KEPT_WHOLE.items():
        keep_whole_up_to(num_elements)
        for stage in ORDER:
            run(stage, recipe(model, stage, root, folder))
    distributed.barrier()


if __name__ == "__main__":
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    run_and_exit(lambda: main(sys.argv[1], Path(sys.argv[2])))
