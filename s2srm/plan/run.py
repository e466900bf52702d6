"""From a stage's settings and a place to its plan."""

from __future__ import annotations

from dataclasses import replace

from s2srm.config import StageConfig
from s2srm.plan.baseline import library_bytes
from s2srm.plan.devices import DEVICES, Efficiency, this_cpu
from s2srm.plan.estimate import Estimate
from s2srm.plan.fit import Fitting
from s2srm.plan.lengths import find_lengths, of_limits
from s2srm.plan.models import Place, is_deepspeed
from s2srm.plan.report import Plan
from s2srm.plan.timing import Clock


def make_plan(
    stage: str,
    module: str,
    cfg: StageConfig,
    device: str,
    ranks: int,
    memory: float | None = None,
    lengths: tuple[int, int] | None = None,
) -> Plan:
    """The plan of one stage.

    module: the stage's, which a process imports. device: a name of DEVICES, or cpu. memory: bytes
    of a rank, the device's own if None. lengths: (prompt, response) tokens of every row, instead of
    the data's or the limits. UserError for a model whose architecture cannot be known.
    """
    found = of_limits(cfg, *lengths) if lengths else find_lengths(cfg)
    where = this_cpu(ranks) if device == "cpu" else DEVICES[device]
    place = Place(where, ranks)
    estimate = Estimate(cfg, place, found)
    if where.is_cpu:
        kind = next(iter(estimate.models.values())).source.config.model_type
        libraries = library_bytes(module, kind, is_deepspeed(cfg.engine, ranks))
        place = replace(place, library_bytes=float(libraries))
        estimate = Estimate(cfg, place, found)
    limit = where.memory if memory is None else memory
    fitting = Fitting(cfg, place, found, limit)
    peak = fitting.peak()
    efficiency = Efficiency()
    return Plan(
        stage=stage,
        device=where,
        ranks=ranks,
        memory=limit,
        models={
            name: (model.source.origin, model.counts.held(model.value))
            for name, model in estimate.models.items()
        },
        lengths=found.origin,
        moments=fitting.moments(),
        peak=peak,
        host=estimate.host,
        times=Clock(estimate, efficiency).phases(),
        efficiency=efficiency,
        microbatch=fitting.largest_microbatch(),
        generation=fitting.largest_generation(),
        remedies=fitting.remedies() if peak > limit else [],
    )
