"""Loading models and tokenizers in Hugging Face layout, with one clear line when it cannot be done.

Checks that need no weights come first and by themselves (`load_config`, `load_tokenizer`), so that
stages can check everything else too before any weight is read.

Left out: quantised models (this is a trainer), encoders, multi-modal models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from s2srm import distributed
from s2srm.config import ModelConfig
from s2srm.errors import UserError
from s2srm.models.attention import choose_attention
from s2srm.models.causal import PackedCausalLM
from s2srm.models.value import PackedValueModel

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}


def load_config(cfg: ModelConfig, key: str = "model.path") -> PretrainedConfig:
    """The model's configuration, checked: there, a causal LM, not quantised.

    key is the setting that UserErrors name.
    """
    _check_path(cfg.path, key)
    with _one_line(cfg.path):
        config = AutoConfig.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not cfg.trust_remote_code:
        raise UserError(
            f"{key} {cfg.path}: a {config.model_type} model is not a causal language model"
        )
    if config.get_text_config() is not config:
        raise UserError(
            f"{key} {cfg.path}: {config.model_type} is multi-modal; give its text model"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{key} {cfg.path}: the model is quantised (quantization_config in config.json); "
            "training needs floating-point weights"
        )
    _check_weight_files(cfg.path)
    return config


def load_tokenizer(cfg: ModelConfig, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer beside the model; UserError if the model lacks one of its tokens.

    Special tokens apart, which are markup and never made from text.
    """
    _check_path(cfg.path, key)
    with _one_line(f"{cfg.path}: tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise UserError(f"{key} {cfg.path}: the tokenizer is empty")
    vocab_size = load_config(cfg, key).vocab_size
    # Gemma 3's tokenizer has an image token beyond the text models' vocabulary. Text never becomes
    # a special token here, so such a one does no harm.
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    largest = max(set(vocabulary.values()) - special, default=0)
    if largest >= vocab_size:
        raise UserError(
            f"{key} {cfg.path}: the tokenizer's largest id is {largest}, but the model has only "
            f"{vocab_size} rows in its vocabulary"
        )
    return tokenizer


def load_lm(
    cfg: ModelConfig, *, zero_config: dict[str, Any] | None = None, train: bool
) -> PreTrainedModel:
    """The Hugging Face model itself, its weights in cfg.precision, dropout off.

    zero_config: DeepSpeed configuration with ZeRO stage 3; the parameters are then partitioned as
    they are created. train: whether gradients are wanted.
    """
    config = load_config(cfg)
    dtype = DTYPES[cfg.precision]
    _disable_dropout(config)
    attention = choose_attention(cfg.attention, distributed.device(), dtype)
    with _one_line(cfg.path), _zero_init(zero_config, dtype):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            cfg.path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=cfg.trust_remote_code,
            output_loading_info=True,
            # Reported by _check_loaded, with the names.
            ignore_mismatched_sizes=True,
        )
    lm, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    _check_loaded(info, cfg.path)
    lm.requires_grad_(train)
    if train and cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def load_causal_lm(
    cfg: ModelConfig, *, zero_config: dict[str, Any] | None = None, train: bool
) -> PackedCausalLM:
    """`load_lm` in the packed form."""
    return PackedCausalLM(load_lm(cfg, zero_config=zero_config, train=train), cfg.path)


def load_value_model(
    cfg: ModelConfig,
    *,
    zero_config: dict[str, Any] | None = None,
    train: bool,
    init: Literal["zero", "normal", "saved"] = "zero",
    seed: int = 0,
) -> PackedValueModel:
    """`load_lm` with a scalar head: the one saved in the folder, else a fresh one of kind `init`.

    UserError if init is "saved" and the folder has no score head.
    """
    lm = load_lm(cfg, zero_config=zero_config, train=train)
    model = PackedValueModel(lm, "normal" if init == "normal" else "zero", seed)
    if not model.load_score(cfg.path) and init == "saved":
        raise UserError(f"{cfg.path}: no score_head.safetensors: not a scalar reward model")
    if not train:
        model.requires_grad_(False)
    return model


def _check_path(path: str, key: str) -> None:
    if not path:
        raise UserError(f"{key} is empty: give a model folder or a hub name")
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{key} {path}: no config.json in this folder")
        return
    if folder.exists():
        raise UserError(f"{key} {path}: is a file; a model is a folder with config.json")
    parent_is_here = "/" in path and folder.parent.is_dir()
    if parent_is_here or not HUB_NAME.fullmatch(path):
        raise UserError(f"{key} {path}: no such folder")


def _check_weight_files(path: str) -> None:
    """Open every safetensors file's header, which names a truncated or broken one."""
    for file in sorted(Path(path).expanduser().glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: broken weights file: {error}") from error


def _check_loaded(info: dict[str, Any], path: str) -> None:
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(kind, ()))
        if names:
            raise UserError(
                f"{path}: the weights do not fit the architecture: {kind.replace('_', ' ')} "
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            )


def _disable_dropout(config: PretrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """What transformers and the hub raise about bad input, as one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        line = next((text for text in str(error).splitlines() if text.strip()), repr(error))
        raise UserError(f"{where}: cannot be loaded: {line.strip()}") from error


@contextmanager
def _zero_init(zero_config: dict[str, Any] | None, dtype: torch.dtype) -> Iterator[None]:
    """transformers creates partitioned parameters while a DeepSpeed configuration is set."""
    if zero_config is None:
        yield
        return
    # transformers holds only a weak reference.
    alive = _ZeroConfig({**zero_config, "bf16": {"enabled": dtype == torch.bfloat16}})
    set_hf_deepspeed_config(alive)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


class _ZeroConfig:
    """What transformers reads of its HfDeepSpeedConfig, which would need the accelerate package."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True
