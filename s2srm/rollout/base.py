"""What a rollout engine is: prompts as token ids in, responses as token ids out.

Nothing is decoded and encoded again: the ids that were sampled are the ids that are scored and
trained on. Logprobs are not part of the interface, because those of a serving engine differ from
the training forward's; PPO computes them itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from s2srm.config import SamplingConfig


@dataclass(frozen=True)
class Response:
    """What a model wrote after a prompt.

    tokens    the sampled ids, at least one; the last is the end of sequence exactly if finished
    finished  False: the length limit was reached first (truncated)
    """

    tokens: list[int]
    finished: bool


class RolloutEngine(Protocol):
    """Generates responses with weights that it is given."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        eos_id: int,
        suppress: Sequence[int] = (),
    ) -> list[Response]:
        """One response for each prompt, in the order of the prompts.

        Every token is drawn from softmax(logits / temperature), or is the argmax at temperature 0.
        A response depends on its prompt, its seed, the sampling settings and the weights, and not
        on which other prompts are in the call. Only eos_id ends a response.

        Args:
            prompts: token ids, at least one in each.
            seeds: one integer in [0, 2^63) for each prompt (see `sampling_seed`).
            sampling: length limit, temperature, prompts per forward.
            eos_id: the id that ends a response.
            suppress: ids that are never generated.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the weights of a policy, by state-dict name."""
        ...

    def drop_weights(self) -> None:
        """Let go of weights that are the policy's own storage; a copy may stay."""
        ...


def sampling_seed(seed: int, phase: int, index: int) -> int:
    """The seed of response `index` of rollout phase `phase`: a 63-bit hash of the three.

    It does not contain the rank, so that any number of ranks samples the same responses.
    """
    digest = hashlib.blake2b(f"{seed}/{phase}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
