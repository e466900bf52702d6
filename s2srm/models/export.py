"""Saving a model as streamed, sharded safetensors in Hugging Face layout.

Files go to a hidden folder inside the target, are flushed to disk, and are renamed into place with
config.json last, so that a folder that loads is complete. Rank 0 writes; the other ranks only take
part in gathering.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, cast

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from s2srm import distributed

MAX_SHARD_BYTES = 4 * 2**30
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SavedTemplate(Protocol):
    """What `save_model` needs of a template."""

    @property
    def eos_id(self) -> int: ...

    def save(self, folder: Path) -> object: ...


def exported_tensors(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what a checkpoint holds: parameters, tied ones once, and buffers."""
    yield from lm.named_parameters()
    for prefix, module in lm.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def save_model(
    named_tensors: Iterable[tuple[str, Tensor]],
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: SavedTemplate,
    out_dir: Path,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights, config.json, generation_config.json, tokenizer and s2srm_template.json.

    named_tensors: whole tensors, each valid until the next is asked for; every rank runs through
    it. lm gives the configuration only. extra: further safetensors files, name -> tensors, which
    are read on rank 0 only. Other files in out_dir stay; weights of an earlier save are replaced.
    """
    if not distributed.is_main():
        for _ in named_tensors:
            pass
        distributed.barrier()
        return
    folder = out_dir / ".saving"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_shards(named_tensors, folder, max_shard_bytes)
    for name, tensors in (extra or {}).items():
        _write({k: _owned(v) for k, v in tensors.items()}, folder / name)
    tokenizer.save_pretrained(folder)
    template.save(folder)
    _generation_config(lm, template.eos_id).save_pretrained(folder)
    _configuration(lm).save_pretrained(folder)
    _move_into_place(folder, out_dir)
    distributed.barrier()


def _write_shards(
    named_tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int
) -> None:
    shard: dict[str, Tensor] = {}
    sizes: list[int] = []
    files: list[list[str]] = []

    def flush() -> None:
        files.append(list(shard))
        _write(shard, folder / f"{len(files)}.part")
        shard.clear()
        sizes.clear()

    total = 0
    for name, tensor in named_tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and sum(sizes) + size > max_shard_bytes:
            flush()
        shard[name] = _owned(tensor)
        sizes.append(size)
        total += size
    flush()
    if len(files) == 1:
        (folder / "1.part").rename(folder / WEIGHTS)
        return
    index: dict[str, str] = {}
    for i, names in enumerate(files, start=1):
        target = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / target)
        index.update(dict.fromkeys(names, target))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / INDEX).write_text(text + "\n")


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _configuration(lm: PreTrainedModel) -> PretrainedConfig:
    config = cast(PretrainedConfig, type(lm.config).from_dict(lm.config.to_dict()))
    config.architectures = [type(lm).__name__]
    config.dtype = next(lm.parameters()).dtype
    return config


def _generation_config(lm: PreTrainedModel, eos_id: int) -> GenerationConfig:
    """Plain sampling that stops where the template's responses stop."""
    old = lm.generation_config
    return GenerationConfig(
        bos_token_id=getattr(old, "bos_token_id", None),
        eos_token_id=eos_id,
        pad_token_id=getattr(old, "pad_token_id", None),
    )


def _move_into_place(folder: Path, out_dir: Path) -> None:
    written = sorted(p.name for p in folder.iterdir())
    for name in written:
        _fsync(folder / name)
    for stale in (*out_dir.glob("model*.safetensors"), out_dir / INDEX):
        if stale.name not in written:
            stale.unlink(missing_ok=True)
    for name in sorted(written, key=lambda n: n == "config.json"):
        os.replace(folder / name, out_dir / name)
    folder.rmdir()
    _fsync(out_dir)


def _fsync(path: Path) -> None:
    if path.is_file():
        path.chmod(0o644)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
