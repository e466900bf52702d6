"""Loading models and tokenizers in Hugging Face layout, with one clear line when it cannot be done.

Checks that need no weights come first and by themselves (`load_config`, `load_tokenizer`), so that
stages can check everything else too before any weight is read.

Left out: quantised models (this is a trainer), encoders, multi-modal models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from s2srm import distributed
from s2srm.config import ModelConfig
from s2srm.errors import UserError
from s2srm.models.causal import PackedCausalLM
from s2srm.models.choice import choose_attention, demand
from s2srm.models.files import check_folder, check_tokenizer, check_weights
from s2srm.models.value import PackedValueModel

_OTHER_INPUTS = ("vision_config", "audio_config", "patcher_config")
_ENCODERS = frozenset(
    [
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
        *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
    ]
)
_OTHER_HEAD = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMaskedLM")
_RANDOM = re.compile(r"dropout|pdrop$|layerdrop|jitter")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}


def load_config(cfg: ModelConfig, key: str = "model.path") -> PretrainedConfig:
    """The model's configuration, checked: there, a causal LM, not quantised.

    key is the setting that UserErrors name.
    """
    check_folder(cfg.path, key)
    with _one_line(f"{key} {cfg.path}: config.json"):
        config = AutoConfig.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
    fault = unsupported(config, cfg.trust_remote_code)
    if fault is not None:
        raise UserError(f"{key} {cfg.path}: {fault}")
    check_weights(cfg.path, key)
    return config


def load_tokenizer(cfg: ModelConfig, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer beside the model; UserError if the model lacks one of its tokens.

    Special tokens apart, which are markup and never made from text.
    """
    config = load_config(cfg, key)
    check_tokenizer(cfg.path, key)
    with _one_line(f"{key} {cfg.path}: tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
    if not tokenizer.get_vocab():
        raise UserError(f"{key} {cfg.path}: the tokenizer is empty")
    largest = _largest_used(tokenizer)
    if largest >= config.vocab_size:
        raise UserError(
            f"{key} {cfg.path}: the tokenizer's largest id is {largest}, but the model has only "
            f"{config.vocab_size} rows in its vocabulary; enlarge it once with "
            f"resize_token_embeddings({largest + 1}) and save_pretrained"
        )
    return tokenizer


def _largest_used(tokenizer: PreTrainedTokenizerBase) -> int:
    """Largest id that text, the end of sequence or the chat template can become.

    Gemma 3's tokenizer has an image token beyond the text models' vocabulary. Text never becomes a
    special token here, so such a one does no harm.
    """
    template = str(tokenizer.chat_template or "")
    used = (tokenizer.bos_token, tokenizer.eos_token)
    special = {
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in used and token.content not in template
    }
    return max(set(tokenizer.get_vocab().values()) - special, default=0)


def load_lm(
    cfg: ModelConfig, *, zero_config: dict[str, Any] | None = None, train: bool
) -> PreTrainedModel:
    """The Hugging Face model itself, its weights in cfg.precision, dropout off.

    zero_config: DeepSpeed configuration with ZeRO stage 3; the parameters are then partitioned as
    they are created. train: whether gradients are wanted.
    """
    config = load_config(cfg)
    dtype = DTYPES[cfg.precision]
    disable_dropout(config)
    where = f"{cfg.path} ({config.model_type})"
    attention = None
    with _one_line(where):
        if takes_attention_functions(config, cfg.path):
            attention = choose_attention(cfg.attention, distributed.device(), dtype, config)
    with _one_line(where), _zero_init(zero_config, dtype):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            cfg.path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=cfg.trust_remote_code,
            output_loading_info=True,
            # Reported by _check_loaded, with the names.
            ignore_mismatched_sizes=True,
            # Nothing that a folder holds is unpickled.
            use_safetensors=True,
        )
    lm, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    _check_loaded(info, where)
    check_finite(lm, cfg.path)
    demand(lm, cfg.attention)
    lm.requires_grad_(train)
    if train and cfg.gradient_checkpointing:
        with _one_line(f"{where}: gradient_checkpointing"):
            _checkpoint_activations(lm)
    return lm


def _checkpoint_activations(lm: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass."""
    arguments = {"use_reentrant": False}
    # transformers 5.23 has both names and warns of the older one.
    if hasattr(lm, "activation_checkpointing_enable"):
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


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
    model = PackedValueModel(lm, "normal" if init == "normal" else "zero", seed, cfg.path)
    if not model.load_score(cfg.path) and init == "saved":
        raise UserError(f"{cfg.path}: no score_head.safetensors: not a scalar reward model")
    if not train:
        model.requires_grad_(False)
    return model


def _check_loaded(info: dict[str, Any], path: str) -> None:
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(kind, ()))
        if names:
            raise UserError(
                f"{path}: the weights do not fit the architecture: {kind.replace('_', ' ')} "
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            )


def check_finite(lm: nn.Module, where: str) -> None:
    """UserError that names the first tensor with NaN or infinity; all ranks must call it."""
    bad = ""
    for name, parameter in lm.named_parameters():
        # This rank's part of it, where ZeRO-3 has partitioned it.
        part: Tensor = getattr(parameter, "ds_tensor", parameter).detach()
        if part.numel() and not all(torch.isfinite(x) for x in part.aminmax()):
            bad = f"the weights hold {'NaN' if part.isnan().any() else 'infinity'} (tensor {name})"
            break
    bad = next((text for text in distributed.gather_objects(bad) if text), "")
    if bad:
        raise UserError(
            f"{where}: {bad}; if a run wrote them, it diverged: train again with a smaller rate"
        )


def unsupported(config: PretrainedConfig, trust_remote_code: bool) -> str | None:
    """Why no model of this configuration can be trained here, if so."""
    kind = config.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
        code = ", or set trust_remote_code if the folder brings its own code"
        hint = code if hasattr(config, "auto_map") else ""
        return f"a {kind} model is not a causal language model{hint}"
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder; give a decoder-only causal language model"
    if _is_multi_modal(config):
        return f"{kind} is multi-modal or reads bytes in patches; give a text model"
    if getattr(config, "is_decoder", True) is False and kind in _ENCODERS:
        return f"{kind} is an encoder (is_decoder is false), which sees the tokens to its right"
    head = next((a for a in config.architectures or () if _OTHER_HEAD.search(a)), None)
    if head is not None:
        return f"holds a {head}, which has no language-model head; give a causal language model"
    if getattr(config, "quantization_config", None) is not None:
        return (
            "the model is quantised (quantization_config in config.json); training needs "
            "floating-point weights"
        )
    rows, pad = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if rows is None:
        return f"{kind} has no vocab_size in its configuration"
    if isinstance(pad, int) and pad >= rows:
        return (
            f"pad_token_id is {pad} in config.json, but the vocabulary has only {rows} rows; set "
            "it to null"
        )
    return None


def _is_multi_modal(config: PretrainedConfig) -> bool:
    try:
        text = config.get_text_config()
    except ValueError:  # there are several
        return True
    return text is not config or any(hasattr(config, name) for name in _OTHER_INPUTS)


def takes_attention_functions(config: PretrainedConfig, path: str) -> bool:
    """Whether the model's class calls the attention function that its configuration names."""
    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if remote is not None:
        cls: Any = get_class_from_dynamic_module(remote, path)
    else:
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return cls._can_set_attn_implementation()


def disable_dropout(config: PretrainedConfig) -> None:
    """Everything random in training: dropout, skipped layers, noise in routers."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            disable_dropout(value)
        elif _RANDOM.search(name) and isinstance(value, float):
            setattr(config, name, 0.0)


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Whatever transformers, tokenizers and the hub raise about a model, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, OSError | ValueError) or not text:
            text = f"{type(error).__name__}: {text}"
        raise UserError(f"{where}: cannot be loaded: {text[:400]}") from error


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
