"""What every miniature world has: splits, rows of data, a word tokenizer, files on disk.

A world implements six things: its words, a prompt generator, a perfect writer, a noisy writer, a
biased annotator and a judge. Everything else is here. All text is words separated by single spaces,
so that tokenising prompt, response and separator apart and concatenating the ids equals tokenising
them together.

Splits are disjoint by construction, whatever the sizes and seeds: a seen-family prompt belongs to
train, dev or test by a hash of its text, and the out-of-distribution family generates texts that
the seen family cannot.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from s2srm.config import TemplateConfig
from s2srm.errors import UserError
from s2srm.jsonl import write_jsonl
from s2srm.worlds.tokenizer import EOS, PAD, SEPARATOR, word_tokenizer

Split = Literal["train", "dev", "test", "ood"]
SPLITS: tuple[Split, ...] = get_args(Split)

_HASH_BUCKETS = 20  # one twentieth of the seen family is dev, one tenth is test
_MAX_TRIES = 2000  # draws in vain before a split is called exhausted


@dataclass(frozen=True)
class Judgement:
    """One response judged.

    score: a world's gold score in [0, 1], else an RM's mean token reward, None without either.
    refused: the response declines to help. harmful_prompt and safe: None where nothing is known of
    harm. length and needed_length: words of the response, and of the shortest response with score
    1 (None where none is known). agreement: fraction of the tokens that the RM would have written
    too; None without an RM.
    """

    score: float | None
    refused: bool
    harmful_prompt: bool | None
    safe: bool | None
    length: int
    needed_length: int | None
    agreement: float | None = None


@dataclass(frozen=True)
class Gold(Judgement):
    """A world's own judgement, which always has a score."""

    score: float


@dataclass(frozen=True)
class WorldSizes:
    """Rows of every file that `World.write` makes."""

    demonstrations: int = 20000
    preferences: int = 12000
    preferences_dev: int = 256
    prompts_train: int = 4000
    prompts_test: int = 256
    prompts_ood: int = 256


class World(ABC):
    """A generated task with noisy demonstrations, biased preferences and an unbiased judge."""

    name: ClassVar[str]

    @abstractmethod
    def words(self) -> Sequence[str]:
        """Every word that prompts and responses can hold, in a fixed order."""

    @abstractmethod
    def make_prompt(self, rng: random.Random, ood: bool) -> str:
        """Draw one prompt of the seen family, or of the out-of-distribution family."""

    @abstractmethod
    def reference_response(self, prompt: str) -> str:
        """A response with score 1 (what a perfect writer would answer)."""

    @abstractmethod
    def write_response(self, rng: random.Random, prompt: str) -> str:
        """One response of the noisy writer, whose demonstrations the SFT policy learns."""

    @abstractmethod
    def prefers_first(self, rng: random.Random, prompt: str, first: str, second: str) -> bool:
        """The annotator's choice between two different responses, bias and errors included."""

    @abstractmethod
    def judge(self, prompt: str, response: str) -> Gold:
        """Score a response (text without special tokens). ValueError if not this world's prompt."""

    @property
    def template(self) -> TemplateConfig:
        """The plain template: prompt, response, ` <fix> `, correction."""
        return TemplateConfig(kind="plain", separator=f" {SEPARATOR} ")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word; saved and loaded as any Hugging Face tokenizer."""
        return word_tokenizer(self.words())

    def model_config(self) -> LlamaConfig:
        """A Llama of about half a million parameters that learns the world on two cores."""
        tokenizer = self.tokenizer()
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=256,
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.backend_tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.backend_tokenizer.token_to_id(PAD),
        )

    def prompts(self, n: int, seed: int, split: Split) -> list[str]:
        """n prompts of a split, distinct outside train. UserError if the split has fewer."""
        return list(self._draw(n, self._rng("prompts", split, seed), split))

    def demonstrations(self, n: int, seed: int) -> list[dict[str, str]]:
        """n rows {"prompt", "response"} by the noisy writer, on train prompts."""
        rng = self._rng("demonstrations", "train", seed)
        return [
            {"prompt": prompt, "response": self.write_response(rng, prompt)}
            for prompt in self._draw(n, rng, "train")
        ]

    def preferences(self, n: int, seed: int, split: Split = "train") -> list[dict[str, str]]:
        """n rows {"prompt", "chosen", "rejected"}: two different responses by the noisy writer,
        ordered by the annotator."""
        rng = self._rng("preferences", split, seed)
        rows: list[dict[str, str]] = []
        for prompt in self._draw(n, rng, split, self.make_preference_prompt):
            first = self.write_response(rng, prompt)
            second = self.write_response(rng, prompt)
            for _ in range(_MAX_TRIES):
                if second != first:
                    break
                second = self.write_response(rng, prompt)
            assert second != first, f"the writer of {self.name} knows one answer to {prompt!r}"
            if not self.prefers_first(rng, prompt, first, second):
                first, second = second, first
            rows.append({"prompt": prompt, "chosen": first, "rejected": second})
        return rows

    def make_preference_prompt(self, rng: random.Random, ood: bool) -> str:
        """Draw a prompt as annotators get them; the same family as `make_prompt` unless a world
        says otherwise."""
        return self.make_prompt(rng, ood)

    def write(self, folder: str | Path, sizes: WorldSizes | None = None, seed: int = 0) -> Path:
        """Write data and a fresh model to a folder, and return it.

        model/ (random weights and tokenizer, loadable by AutoModelForCausalLM and AutoTokenizer),
        sft.jsonl, preferences.jsonl, preferences_dev.jsonl (prompts of the dev split),
        prompts_train.jsonl, prompts_test.jsonl, prompts_ood.jsonl.
        """
        sizes = sizes or WorldSizes()
        folder = Path(folder)
        model_folder = folder / "model"
        model_folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(self.model_config())
        model.save_pretrained(model_folder)
        self.tokenizer().save_pretrained(model_folder)
        write_jsonl(folder / "sft.jsonl", self.demonstrations(sizes.demonstrations, seed))
        write_jsonl(folder / "preferences.jsonl", self.preferences(sizes.preferences, seed))
        dev = self.preferences(sizes.preferences_dev, seed, split="dev")
        write_jsonl(folder / "preferences_dev.jsonl", dev)
        prompt_files: list[tuple[Split, int]] = [
            ("train", sizes.prompts_train),
            ("test", sizes.prompts_test),
            ("ood", sizes.prompts_ood),
        ]
        for split, n in prompt_files:
            rows = [{"prompt": prompt} for prompt in self.prompts(n, seed, split)]
            write_jsonl(folder / f"prompts_{split}.jsonl", rows)
        # Whatever the umask; save_pretrained leaves safetensors at 600.
        for file in (*model_folder.iterdir(), *folder.glob("*.jsonl")):
            file.chmod(0o644)
        return folder

    def _rng(self, purpose: str, split: Split, seed: int) -> random.Random:
        """A generator of its own for every kind of data: more of one does not change another."""
        return random.Random(f"{self.name}/{purpose}/{split}/{seed}")

    def _draw(
        self,
        n: int,
        rng: random.Random,
        split: Split,
        make: Callable[[random.Random, bool], str] | None = None,
    ) -> Iterator[str]:
        """Draw n prompts of a split by rejection; distinct outside train."""
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
        make = make or self.make_prompt
        seen: set[str] = set()
        for i in range(n):
            for _ in range(_MAX_TRIES):
                prompt = make(rng, split == "ood")
                if (split == "ood" or _split_of(prompt) == split) and prompt not in seen:
                    break
            else:
                raise UserError(
                    f"world {self.name}: no more than {i} different {split} prompts, {n} asked for"
                )
            if split != "train":
                seen.add(prompt)
            yield prompt


def _split_of(prompt: str) -> Split:
    """The split that a seen-family prompt belongs to, by its text alone."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % _HASH_BUCKETS
    return "dev" if bucket == 0 else "test" if bucket <= 2 else "train"
