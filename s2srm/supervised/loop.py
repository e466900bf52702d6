"""The supervised loop that sft, rm and scalar-rm share: global batches, packed micro-batches.

A stage is a `Task`: what a row becomes, its loss, its metrics. Everything that is averaged is
averaged over all ranks and all micro-batches of a step, so that the number of ranks and the token
budget change nothing but speed.

Left out: early stopping.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from s2srm import distributed
from s2srm.balance import deal_forwards, max_over_mean
from s2srm.checkpoint.best import BestModel
from s2srm.checkpoint.saver import Checkpoints
from s2srm.checkpoint.start import Start, start_run
from s2srm.config import DataConfig, SupervisedConfig
from s2srm.data.order import global_batches, num_steps
from s2srm.data.templates import Template
from s2srm.engine import Engine, build_engine, map_microbatches, run_microbatches
from s2srm.engine.build import engine_kind
from s2srm.evidence import Seen
from s2srm.guards import Place, check_gradient, check_loss, check_trained, stop
from s2srm.metrics import RunLogger
from s2srm.models.load import load_config, load_tokenizer
from s2srm.models.positions import position_limit
from s2srm.outputs import writing
from s2srm.packing import Packed, Segment, pack
from s2srm.runs import RunResult, finish_run
from s2srm.watchdog import pulse

Row = TypeVar("Row")
Stats = Mapping[str, Tensor | float]
"""Sums and counts that may be added over micro-batches and ranks."""


@dataclass(frozen=True)
class Unit:
    """Segments that must be in one micro-batch, and which kind of example they are."""

    segments: tuple[Segment, ...]
    kind: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(len(s.tokens) for s in self.segments)


@dataclass(frozen=True)
class Microbatch:
    """Packed units. row_kinds (N,) int64: the kind that each row of the batch belongs to."""

    batch: Packed
    row_kinds: Tensor


@dataclass(frozen=True)
class Prepared(Generic[Row]):
    """What is known before any weight is loaded."""

    start: Start
    tokenizer: PreTrainedTokenizerBase
    template: Template
    train: list[Row]
    dev: list[Row]


class Task(ABC, Generic[Row]):
    """What distinguishes one supervised stage from another."""

    title: str
    """Shown beside the progress bar."""

    @abstractmethod
    def model(self, zero_config: dict[str, Any] | None) -> nn.Module:
        """Load the model that is trained."""

    @abstractmethod
    def units(self, row: Row) -> list[Unit]:
        """The examples of a row that are trained on."""

    def dev_units(self, row: Row) -> list[Unit]:
        """The examples of a held-out row."""
        return self.units(row)

    @abstractmethod
    def weight(self, units: Iterable[Unit]) -> float:
        """What the summed loss of these units is divided by, once added up over all ranks."""

    @abstractmethod
    def loss(
        self, forward: Callable[..., Any], microbatch: Microbatch, weight: float
    ) -> tuple[Tensor, Stats]:
        """Scalar loss divided by the global weight, and statistics. Calls forward once."""

    @abstractmethod
    def score(self, forward: Callable[..., Any], microbatch: Microbatch) -> Stats:
        """Statistics of held-out examples. Calls forward once."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means from the added-up statistics of `loss` or `score`."""

    def probe(self, engine: Engine, rows: Sequence[Row]) -> dict[str, float]:
        """Further metrics of this rank's held-out rows, global over ranks. All ranks call it."""
        return {}


def prepare(
    cfg: SupervisedConfig,
    load_rows: Callable[[DataConfig, PreTrainedTokenizerBase, Template, int | None], list[Row]],
) -> Prepared[Row]:
    """Check and read everything but the weights, so that bad input is found at once."""
    pulse.phase("reading settings and data")
    distributed.start()
    engine_kind(cfg.engine)
    config = load_config(cfg.model)
    tokenizer = load_tokenizer(cfg.model)
    template = Template.build(tokenizer, cfg.template)
    start = start_run(cfg)
    longest = position_limit(config)
    train = load_rows(cfg.data, tokenizer, template, longest)
    dev: list[Row] = []
    if cfg.eval_data is not None:
        dev = load_rows(cfg.eval_data, tokenizer, template, longest)
    return Prepared(start, tokenizer, template, train, dev)


def train(cfg: SupervisedConfig, task: Task[Row], data: Prepared[Row]) -> RunResult:
    """Train, evaluate, save; returns the run's folder and its last metrics."""
    if data.start.finished is not None:
        return data.start.finished
    output = data.start.output
    total = num_steps(len(data.train), cfg.batch_size, cfg.epochs, cfg.max_steps)
    batches = global_batches(len(data.train), cfg.batch_size, cfg.seed, cfg.epochs, cfg.max_steps)
    torch.manual_seed(cfg.seed)
    pulse.phase("loading the model")
    engine = build_engine(task.model, cfg.engine, cfg.optim, total)
    with (
        RunLogger(output, cfg.log, total, task.title) as log,
        Checkpoints(cfg, output, {"model": engine}, {"log": log}, total, data.train) as saved,
    ):
        done = saved.resume(data.start)
        best = BestModel(
            cfg.keep_best,
            output,
            partial(engine.save, tokenizer=data.tokenizer, template=data.template),
        )
        if data.dev and done == 0:
            place = _place(cfg, task, 0, num_updates=0)
            row = evaluate(engine, task, data.dev, cfg.microbatch_tokens, place)
            log.row(0, row)
            best.after_evaluation(0, row)
        for step, indices in itertools.islice(enumerate(batches, start=1), done, None):
            rows = [data.train[i] for i in indices]
            place = _place(cfg, task, step, num_updates=step - 1)
            pulse.phase(place.where)
            row = train_step(engine, task, rows, cfg.microbatch_tokens, place)
            tokens = int(row.pop("tokens"))
            is_due = step == total or (cfg.eval_every > 0 and step % cfg.eval_every == 0)
            if data.dev and is_due:
                place = _place(cfg, task, step, num_updates=step)
                row |= evaluate(engine, task, data.dev, cfg.microbatch_tokens, place)
            log.row(step, row)
            best.after_evaluation(step, row)
            log.advance(tokens=tokens, loss=row["loss"])
            pulse.settle()
            place = _place(cfg, task, step, num_updates=step)
            saved.after_step(step, partial(check_trained, engine, place))
        check_trained(engine, _place(cfg, task, total, num_updates=total))
        pulse.phase("saving the model")
        with writing(output):
            engine.save(output, data.tokenizer, data.template)
            return finish_run(output, cfg, dict(log.last))


def _place(cfg: SupervisedConfig, task: Task[Any], step: int, num_updates: int) -> Place:
    """What the error says of a step whose numbers are not finite, after so many updates."""
    if num_updates == 0:
        remedy = f"no update has done it: look at {cfg.model.path} in {cfg.model.precision}"
    else:
        remedy = f"lower optim.lr ({cfg.optim.lr:g}) or raise optim.warmup_steps"
    return Place(f"{task.title} step {step}", step, remedy, run=Path(cfg.output))


def train_step(
    engine: Engine, task: Task[Row], rows: Sequence[Row], budget: int, place: Place
) -> dict[str, float]:
    """One optimiser step on a global batch of rows, of which every rank takes a share.

    balance/tokens_max_over_mean: tokens of the rank that has most over the mean of the ranks.
    TrainingDiverged if loss or gradient is not finite.
    """
    units = [unit for row in rows for unit in task.units(row)]
    weight = task.weight(units)
    mine, imbalance = microbatches(units, budget, engine.device)
    parts: list[Stats] = []
    seen: list[Seen] = []

    def loss_fn(microbatch: Microbatch) -> Tensor:
        loss, stats = task.loss(engine.train_forward, microbatch, weight)
        parts.append({**stats, "loss": loss.detach()})
        seen.append(Seen(microbatch.batch, {"loss": loss.detach()}))
        return loss

    run_microbatches(engine, mine, loss_fn)
    sums = add_up(parts, engine.device)
    check_loss(seen, sums["loss"], place)
    info = engine.step()
    check_gradient(info, place, seen)
    return {
        **task.metrics(sums),
        "loss": sums["loss"],
        "grad_norm": info.grad_norm,
        "lr": info.lr,
        "tokens": sum(unit.num_tokens for unit in units),
        "balance/tokens_max_over_mean": imbalance,
    }


def evaluate(
    engine: Engine, task: Task[Row], rows: Sequence[Row], budget: int, place: Place
) -> dict[str, float]:
    """Metrics of held-out rows over all ranks, under `eval/`.

    TrainingDiverged if their loss is not finite.
    """
    pulse.phase(f"{place.where}, evaluation")
    units = [unit for row in rows for unit in task.dev_units(row)]
    mine, _ = microbatches(units, budget, engine.device)
    parts = map_microbatches(engine, mine, lambda microbatch: task.score(engine, microbatch))
    found = task.metrics(add_up(parts, engine.device))
    if not math.isfinite(found["loss"]):
        bad = {
            number: Seen(microbatch.batch)
            for number, (microbatch, part) in enumerate(zip(mine, parts, strict=True), start=1)
            if not all(math.isfinite(float(value)) for value in part.values())
        }
        stop(place, "loss on eval_data", found["loss"], "eval/loss", bad, len(mine))
    found |= task.probe(engine, rows[distributed.rank() :: distributed.world_size()])
    return {f"eval/{name}": value for name, value in found.items()}


def microbatches(
    units: Sequence[Unit], budget: int, device: torch.device
) -> tuple[list[Microbatch], float]:
    """Deal all ranks' units to the ranks by tokens (`s2srm.balance`).

    Returns:
        (this rank's share, packed into micro-batches of at most `budget` tokens or a longer unit;
        tokens of the rank that has most over the mean).
    """
    lengths = [unit.num_tokens for unit in units]
    plan = deal_forwards(lengths, distributed.world_size(), budget)
    loads = [sum(lengths[i] for group in groups for i in group) for groups in plan]
    mine = [_microbatch([units[i] for i in group], device) for group in plan[distributed.rank()]]
    return mine, max_over_mean(loads)


def add_up(parts: Iterable[Stats], device: torch.device) -> dict[str, float]:
    """Add statistics over micro-batches and ranks; a rank may have names that others lack."""
    local: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            local[name] = local.get(name, 0.0) + float(value)
    names = sorted({name for found in distributed.gather_objects(set(local)) for name in found})
    values = torch.tensor([local.get(n, 0.0) for n in names], dtype=torch.float64, device=device)
    return dict(zip(names, distributed.sum_over_ranks(values).tolist(), strict=True))


def _microbatch(units: Sequence[Unit], device: torch.device) -> Microbatch:
    segments = [segment for unit in units for segment in unit.segments]
    kinds = torch.tensor([unit.kind for unit in units for _ in unit.segments])
    counts = torch.tensor([segment.num_predicted for segment in segments])
    return Microbatch(pack(segments).to(device), kinds.repeat_interleave(counts).to(device))
