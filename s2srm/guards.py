"""A run stops where its numbers stop being finite, in one line, before such weights are saved.

What is looked at is a sum over all ranks, so that every rank comes to the same verdict at the same
place and none waits for another. Left out: skipping such a step and going on, which hides the
cause, and loss scaling, because nothing is trained in float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from s2srm import distributed
from s2srm.engine.base import Engine, StepInfo
from s2srm.errors import TrainingDiverged, UserError
from s2srm.evidence import Seen, save_evidence
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
    run                    the run's folder, for the batches of a rank that has bad numbers
    """

    where: str
    step: int
    remedy: str
    loss_name: str = "loss"
    norm_name: str = "grad_norm"
    run: Path | None = None


def stop(
    place: Place,
    what: str,
    value: float,
    metric: str,
    bad: Mapping[int, Seen] | None = None,
    num_microbatches: int = 0,
) -> NoReturn:
    """Save what is bad and raise TrainingDiverged. All ranks call it.

    bad: this rank's part in it, by number of micro-batch from 1; empty where it has none, None
    where nobody can tell.
    """
    facts = {"where": place.where, "cause": f"the {what} is {value}", "remedy": place.remedy}
    place_of_rank, saved = "", None
    if bad and place.run is not None:
        try:
            path = save_evidence(place.run, place.step, bad, num_microbatches, facts)
            saved = f"its batch is in {path}"
        except UserError as error:
            saved = f"its batch could not be saved: {error}"
    if bad is not None:
        place_of_rank, saved = _found(bad, num_microbatches, saved)
    batch = f"; {saved}" if saved else ""
    raise TrainingDiverged(
        f"{place.where}: the {what} is {value}{place_of_rank}; {place.remedy}{batch}; {UNSAVED}",
        place.step,
        {metric: value},
    )


def _found(
    bad: Mapping[int, Seen], num_microbatches: int, saved: str | None
) -> tuple[str, str | None]:
    """(` on rank 1, micro-batch 2 of 3`, what the first such rank has saved)."""
    number = next(iter(bad), 0) if num_microbatches > 1 and len(bad) == 1 else 0
    mine = (number, num_microbatches, saved) if bad else None
    everyone = distributed.gather_objects(mine)
    ranks = [rank for rank, found in enumerate(everyone) if found is not None]
    if not ranks:
        return "", None
    text = ""
    if len(everyone) > 1:
        text = f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    number, count, saved = everyone[ranks[0]]
    if number and len(ranks) == 1:
        text += f"{',' if text else ' in'} micro-batch {number} of {count}"
    return text, saved


def check_loss(seen: Sequence[Seen], total: float, place: Place) -> None:
    """Before the optimiser's step. total: the loss over all ranks; seen: this rank's part of it,
    with a number "loss" each."""
    if not math.isfinite(total):
        stop(place, "loss", total, place.loss_name, _bad_of("loss", seen), len(seen))


def check_step(
    seen: Sequence[Seen], numbers: Mapping[str, str], place: Place, device: torch.device
) -> None:
    """Before the optimiser's step, where no sum over the ranks is known yet: one for all numbers.

    numbers: those of `seen`, with their names in metrics.jsonl; the first that is not finite is
    named.
    """
    local = torch.zeros(len(numbers), dtype=torch.float64, device=device)
    for microbatch in seen:
        local += torch.stack([microbatch.numbers[what].detach().double() for what in numbers])
    totals = distributed.sum_over_ranks(local).tolist()
    for (what, metric), total in zip(numbers.items(), totals, strict=True):
        if not math.isfinite(total):
            stop(place, what, total, metric, _bad_of(what, seen), len(seen))


def _bad_of(what: str, seen: Sequence[Seen]) -> dict[int, Seen]:
    return {
        number: microbatch
        for number, microbatch in enumerate(seen, start=1)
        if not math.isfinite(float(microbatch.numbers[what]))
    }


def check_gradient(info: StepInfo, place: Place, seen: Sequence[Seen] = ()) -> None:
    """After the step, which is where an engine knows the norm over all ranks.

    The torch engine has left the weights alone then; DeepSpeed's have been updated, and are not
    saved. Whose gradient it is cannot be told from the norm: every rank keeps what it has `seen`.
    """
    if not math.isfinite(info.grad_norm):
        everything = dict(enumerate(seen, start=1))
        what = "norm of the gradient"
        stop(place, what, info.grad_norm, place.norm_name, everything, len(seen))


class Rows(NamedTuple):
    """This rank's numbers of one kind, perhaps none, with their name in metrics.jsonl.

    offsets  numbers of response i are values[offsets[i]:offsets[i + 1]]; None: one for each
    """

    what: str
    values: Tensor
    metric: str
    place: Place
    offsets: Tensor | None = None


def check_rows(columns: Sequence[Rows], responses: Sequence[Segment] = ()) -> None:
    """One sum over the ranks for all columns; the first that has a number that is not finite is
    named, so causes go before what follows from them, and its `responses` are kept."""
    bad = torch.stack([(~column.values.isfinite()).sum() for column in columns])
    counts = distributed.sum_over_ranks(bad).tolist()
    for count, column in zip(counts, columns, strict=True):
        if count:
            mine = column.values[~column.values.isfinite()].tolist()[:1]
            first = next(value for found in distributed.gather_objects(mine) for value in found)
            kept = _bad_responses(column, responses)
            stop(column.place, column.what, first, column.metric, kept, len(kept))


def _bad_responses(column: Rows, responses: Sequence[Segment]) -> dict[int, Seen]:
    """The responses that hold the column's bad numbers, as one micro-batch."""
    is_bad = ~column.values.isfinite()
    spans = range(len(responses) + 1) if column.offsets is None else column.offsets.tolist()
    chosen = [i for i in range(len(responses)) if is_bad[spans[i] : spans[i + 1]].any()]
    if not chosen:
        return {}
    values = [column.values[spans[i] : spans[i + 1]] for i in chosen]
    rows = {} if column.offsets is None else {"values": torch.cat(values)}
    return {1: Seen(pack([responses[i] for i in chosen]), rows=rows)}


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
