"""The batch that a run stopped at, in files to look at afterwards.

    RUN/diverged/step-00000003-rank-1.safetensors   the micro-batches' tensors
    RUN/diverged/step-00000003-rank-1.json          where, what, and what the tensors are

A tensor is named for its micro-batch: `2/tokens`, `2/cu_seqlens` and the other fields of `Packed`,
and what the loss was made of (`2/advantages`). Nothing is pickled, and no more than MAX_TOKENS are
kept. Left out: weights and gradients, of which a checkpoint has those that matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from s2srm import distributed
from s2srm.outputs import writing
from s2srm.packing import Packed

FOLDER = "diverged"
MAX_TOKENS = 2**16
"""About 4 MB; a longer sequence is kept alone."""


@dataclass(frozen=True)
class Seen:
    """A micro-batch of this rank and what was made of it.

    numbers  scalars that must be finite, by what an error calls them
    rows     further (N,) tensors, one entry for each of the batch's rows
    """

    batch: Packed
    numbers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    rows: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def save_evidence(
    run: Path, step: int, seen: Mapping[int, Seen], num_microbatches: int, facts: Mapping[str, Any]
) -> Path:
    """Write what a rank has seen, by number of micro-batch; returns the safetensors file.

    facts: JSON values for the file beside it. UserError where they cannot be written.
    """
    path = run / FOLDER / f"step-{step:08d}-rank-{distributed.rank()}.safetensors"
    tensors: dict[str, Tensor] = {}
    listed: list[dict[str, Any]] = []
    room = MAX_TOKENS
    for number, microbatch in seen.items():
        count = _num_kept(microbatch.batch.cu_seqlens.tolist(), room, is_first=not tensors)
        if count > 0:
            kept = _first_sequences(microbatch, count)
            tensors |= {f"{number}/{name}": tensor for name, tensor in kept.items()}
            room -= kept["tokens"].numel()
        listed.append(
            {
                "number": number,
                "sequences": microbatch.batch.num_sequences,
                "sequences_kept": count,
                **{name: str(float(value)) for name, value in microbatch.numbers.items()},
            }
        )
    about = {
        **facts,
        "step": step,
        "rank": distributed.rank(),
        "ranks": distributed.world_size(),
        "num_microbatches": num_microbatches,
        "microbatches": listed,
    }
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        path.chmod(0o644)
        path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return path


def _num_kept(offsets: Sequence[int], room: int, *, is_first: bool) -> int:
    """How many whole sequences fit; of the first micro-batch at least one."""
    fitting = sum(end <= room for end in offsets[1:])
    return max(fitting, int(is_first))


def _first_sequences(seen: Seen, count: int) -> dict[str, Tensor]:
    batch = seen.batch
    num_tokens, num_rows = int(batch.cu_seqlens[count]), int(batch.cu_rows[count])
    lengths = {
        "tokens": num_tokens,
        "positions": num_tokens,
        "cu_seqlens": count + 1,
        "cu_rows": count + 1,
    }
    found = {f.name: getattr(batch, f.name) for f in fields(batch)} | dict(seen.rows)
    return {
        name: tensor.detach()[: lengths.get(name, num_rows)].to("cpu", copy=True)
        for name, tensor in found.items()
        if isinstance(tensor, torch.Tensor)
    }
