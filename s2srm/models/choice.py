"""Which attention function a model takes: `attention: auto | flash | sdpa`, decided and logged.

auto takes the fastest that does all that the model needs, on this device, in its precision; flash
is refused with the reasons where that would not be a FlashAttention kernel.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from s2srm import distributed
from s2srm.errors import UserError
from s2srm.models import flash
from s2srm.models.attention import HALVES, MEANINGS, SDPA
from s2srm.models.flash import Kernel, Needs

logger = logging.getLogger(__name__)

_DEMANDED = "s2srm_attention_demanded"


class Choice(NamedTuple):
    """An attention function and what there is to say about it."""

    name: str
    reasons: tuple[str, ...] = ()
    """Why it is not FlashAttention, or not the kernel that would be faster."""
    note: str = ""
    """What is lost with it."""

    @property
    def words(self) -> str:
        """For the log and `s2srm doctor`."""
        said = "; ".join([*self.reasons, *([self.note] if self.note else [])])
        return f"{MEANINGS[self.name]}{f' ({said})' if said else ''}"


def choose_attention(
    wanted: Literal["auto", "flash", "sdpa"],
    device: torch.device,
    dtype: torch.dtype,
    config: PretrainedConfig | None = None,
) -> str:
    """Name of the attention function for transformers' `attn_implementation`; logged once.

    config: of the model, whose head dimension, softcap and windows the kernel must do. UserError if
    `flash` is wanted where none can.
    """
    needs = Needs() if config is None else flash.needs_of(config)
    choice = Choice(SDPA) if wanted == "sdpa" else find_attention(device, dtype, needs)
    if wanted == "flash" and choice.name == SDPA:
        reasons = "; ".join(choice.reasons)
        raise UserError(f"attention: flash is not possible here: {reasons}; take auto or sdpa")
    _log_choice(wanted, choice.words)
    return choice.name


def find_attention(device: torch.device, dtype: torch.dtype, needs: Needs) -> Choice:
    """The fastest attention function that does all that is needed, and why no faster one does."""
    if device.type != "cuda":
        return Choice(SDPA, (f"FlashAttention needs a CUDA device, this one is {device.type}",))
    if dtype not in HALVES:
        return Choice(SDPA, (f"FlashAttention needs bfloat16 weights, these are {dtype}",))
    capability = flash.capability_of(device)
    reasons: dict[Kernel, str] = {}
    for kernel in flash.preferred(capability):
        reason = flash.why_not(kernel, capability, needs)
        if not reason:
            lost = flash.why_not_deterministic(kernel, capability, needs)
            note = f"its gradients are not deterministic: {lost}" if lost else ""
            said = [f"{k.package}: {r}" for k, r in reasons.items() if k.version is not None]
            return Choice(kernel.name, tuple(said), note)
        reasons[kernel] = reason
    return Choice(SDPA, tuple(f"{kernel.package}: {why}" for kernel, why in reasons.items()))


@cache
def _log_choice(wanted: str, words: str) -> None:
    if distributed.is_main():
        logger.info("attention %s: %s", wanted, words)


def demand(lm: PreTrainedModel, wanted: str) -> None:
    """Note that the model may run with nothing but FlashAttention, where that was asked for."""
    setattr(lm, _DEMANDED, wanted == "flash" and lm.config._attn_implementation in MEANINGS)


def is_demanded(lm: PreTrainedModel) -> bool:
    """Whether another attention than the one at load must not be taken instead."""
    return getattr(lm, _DEMANDED, False)
