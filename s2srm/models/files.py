"""A model folder looked at without loading anything: what is missing or broken, in one line.

Left out: hub names, whose files transformers fetches and judges itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from s2srm.errors import UserError
from s2srm.paths import looks_like_path

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_JSON_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
)
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken*", "*.py")
_LFS_POINTER = b"version https://git-lfs"


def check_folder(path: str, key: str) -> None:
    """UserError unless `path` is a folder whose JSON files can be read, or may be a hub name.

    key is the setting that the message names.
    """
    if not path:
        raise UserError(f"{key} is empty: give a model folder or a hub name")
    folder = Path(path)
    if not folder.is_dir():
        _check_other(folder, path, key)
        return
    _check_config(folder, key)
    for name in _JSON_FILES:
        if (folder / name).exists():
            _read_json(folder / name)


def check_tokenizer(path: str, key: str) -> None:
    """UserError if a folder holds no file that a tokenizer could be read from."""
    folder = Path(path)
    if folder.is_dir() and not any(f for pattern in _TOKENIZERS for f in folder.glob(pattern)):
        raise UserError(
            f"{key} {folder}: no tokenizer in this folder (tokenizer.json); save it beside the "
            "model with tokenizer.save_pretrained(folder)"
        )


def check_weights(path: str, key: str) -> None:
    """UserError unless the folder's weights are there, whole and no pickles."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / INDEX).is_file():
        names = _shards(folder)
    else:
        raise UserError(f"{key} {folder}: {_no_weights(folder)}")
    extra = [path.name for path in folder.glob("*_head.safetensors")]
    for name in [*names, *sorted(extra)]:
        _check_header(folder / name)


def _check_other(folder: Path, path: str, key: str) -> None:
    if folder.exists():
        raise UserError(f"{key} {path}: is a file; a model is a folder with config.json")
    if looks_like_path(path) or not HUB_NAME.fullmatch(path):
        raise UserError(f"{key} {path}: no such folder")


def _check_config(folder: Path, key: str) -> None:
    where = f"{key} {folder}"
    if (folder / "adapter_config.json").is_file() and not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{where}: holds a LoRA adapter only (adapter_config.json); merge it into its base "
            "model (peft: merge_and_unload, save_pretrained) and give that folder"
        )
    if not (folder / "config.json").is_file():
        if any(folder.glob("*.gguf")):
            raise UserError(
                f"{where}: holds GGUF weights; training needs a Hugging Face folder with "
                "config.json and safetensors"
            )
        raise UserError(f"{where}: no config.json in this folder")
    config = _read_json(folder / "config.json")
    if "model_type" not in config and "auto_map" not in config:
        raise UserError(
            f"{folder / 'config.json'}: no model_type, so that its architecture is not known"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "the file is empty" if _is_empty(path) else f"not valid JSON: {error}"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, found a {type(value).__name__}")
    return value


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _shards(folder: Path) -> list[str]:
    listed = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{folder / INDEX}: no weight_map, which says where each tensor is")
    names = sorted(str(name) for name in set(listed.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: {name}, which {INDEX} lists, is missing; the download or copy is "
                "not complete"
            )
    return names


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if pickles:
        return (
            f"its weights are pickled ({pickles[0]}), which can run code and is not read; convert "
            "them once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    others = sorted(p.name for kind in ("*.gguf", "*.h5", "*.msgpack") for p in folder.glob(kind))
    found = f" (found {others[0]}, which is not read)" if others else ""
    return f"no weights: neither {WEIGHTS} nor {INDEX} is there{found}"


def _check_header(path: Path) -> None:
    """Open the header, which names a truncated or broken file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise UserError(f"{path}: is a Git LFS pointer and not the weights; run git lfs pull")
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: broken weights file: {error}") from error
