"""A run stops where its numbers stop being finite, in one line, before such weights are saved.

What is looked at is a sum over all ranks, so that every rank comes to the same verdict at the same
place and none waits for another. Left out: skipping such a step and going on, which hides the
cause, and loss scaling, because nothing is trained in float16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from s2srm import distributed
from s2srm.engine.base import Engine, StepInfo
from s2srm.errors import TrainingDiverged
from s2srm.packing import Segment, pack

UNSAVED = "the model is not saved"
_LOOKED_AT = 16
"""Tokens of the look at a trained model; the first of a vocabulary may be padding, which is 0."""


@dataclass(frozen=True)
class Place:
    """Where in a run, and what its error is to say.

    where                  stage and step, as "seq2seq RM step 3" or "PPO phase 2, policy"
    step                   as in metrics.jsonl
    remedy                 what to change, as "lower optim.lr (0.1)"
    loss_name, norm_name   of the loss and of the gradient's norm in metrics.jsonl
    """

    where: str
    step: int
    remedy: str
    loss_name: str = "loss"
    norm_name: str = "grad_norm"

    def stop(self, what: str, value: float, metric: str, ranks: str = "") -> NoReturn:
        """Raise TrainingDiverged."""
        raise TrainingDiverged(
            f"{self.where}: the {what} is {value}{ranks}; {self.remedy}; {UNSAVED}",
            self.step,
            {metric: value},
        )


def check_loss(local: Tensor, total: float, place: Place) -> None:
    """Before the optimiser's step. local: this rank's loss; total: the sum over all ranks."""
    if not math.isfinite(total):
        is_bad = not math.isfinite(float(local))
        place.stop("loss", total, place.loss_name, _ranks(is_bad))


def check_local_loss(local: Tensor, place: Place) -> None:
    """`check_loss` where the sum over the ranks is not known yet."""
    check_loss(local, float(distributed.sum_over_ranks(local)), place)


def check_gradient(info: StepInfo, place: Place) -> None:
    """After the step, which is where an engine knows the norm over all ranks.

    The torch engine has left the weights alone then; DeepSpeed's have been updated.
    """
    if not math.isfinite(info.grad_norm):
        place.stop("norm of the gradient", info.grad_norm, place.norm_name)


class Rows(NamedTuple):
    """This rank's numbers of one kind, perhaps none, with their name in metrics.jsonl."""

    what: str
    values: Tensor
    metric: str
    place: Place


def check_rows(columns: Sequence[Rows]) -> None:
    """One sum over the ranks for all columns; the first that has a number that is not finite is
    named, so causes go before what follows from them."""
    bad = torch.stack([(~column.values.isfinite()).sum() for column in columns])
    counts = distributed.sum_over_ranks(bad).tolist()
    for count, column in zip(counts, columns, strict=True):
        if count:
            mine = column.values[~column.values.isfinite()].tolist()[:1]
            first = next(value for found in distributed.gather_objects(mine) for value in found)
            column.place.stop(column.what, first, column.metric, _ranks(bool(mine)))


def check_trained(engine: Engine, place: Place) -> None:
    """Before saving: every weight is finite and so is what the model makes of a few tokens.

    The loss of a step is that of the weights before it; this looks at those after the last one.
    """
    engine.wake(weights_only=True)
    # Under ZeRO-3 a rank has its own piece of a parameter.
    pieces = [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]
    bad = torch.stack([(~piece.isfinite()).any().to(engine.device) for piece in pieces]).any()
    lm = engine.module.lm
    assert isinstance(lm, PreTrainedModel)
    ids = range(min(_LOOKED_AT, lm.config.vocab_size))
    output = engine(pack([Segment(ids, start=1)]).to(engine.device))
    local = torch.stack([bad.float(), (~output.isfinite()).any().float()])
    weights, outputs = distributed.sum_over_ranks(local).tolist()
    if weights or outputs:
        what = "last update left weights that are" if weights else "output of the trained model is"
        raise TrainingDiverged(
            f"{place.where}: the {what} not finite; {place.remedy}; {UNSAVED}",
            place.step,
            {place.loss_name: math.nan},
        )


def _ranks(is_bad: bool) -> str:
    """` on rank 1` where there are several. All ranks must call it."""
    flags = distributed.gather_objects(is_bad)
    if len(flags) == 1:
        return ""
    named = [str(rank) for rank, flag in enumerate(flags) if flag]
    return f" on rank{'s' if len(named) > 1 else ''} {', '.join(named)}"
