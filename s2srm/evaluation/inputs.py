"""What evaluation knows before any weights are loaded: who reads and writes, and which prompts fit.

Every prompt is encoded by every policy's own tokenizer and template. One that is left out for one
policy is left out for all, so that all answer the same prompts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from s2srm.config import DataConfig, ModelConfig, TemplateConfig
from s2srm.data.compat import check_same_tokenizer
from s2srm.data.examples import tokenise_prompts
from s2srm.data.loading import load_prompts
from s2srm.data.schema import Prompt
from s2srm.data.templates import FILE_NAME, WITHOUT_SEPARATOR, Template
from s2srm.errors import UserError
from s2srm.evaluation.config import EvalConfig
from s2srm.models.load import load_config, load_tokenizer
from s2srm.models.positions import position_limit
from s2srm.models.value import SCORE_FILE
from s2srm.models.vocabulary import check_vocabularies
from s2srm.worlds import get_world

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reader:
    """A model without its weights. key: the setting that names it."""

    key: str
    cfg: ModelConfig
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    template: Template

    @property
    def positions(self) -> int | None:
        """The longest sequence that it takes; None for no limit."""
        return position_limit(self.config)

    @property
    def where(self) -> str:
        """`policies.sft runs/sft`."""
        return f"{self.key} {self.cfg.path}"


def read_policy(key: str, cfg: ModelConfig, template: TemplateConfig) -> Reader:
    """A policy with its saved template; one that no stage of ours saved gets a new one."""
    config, tokenizer = load_config(cfg, key), load_tokenizer(cfg, key)
    is_ours = (Path(cfg.path) / FILE_NAME).is_file()
    found = Template.load(cfg.path) if is_ours else Template.build(tokenizer, template)
    return Reader(key, cfg, config, tokenizer, found)


def read_reward_model(key: str, cfg: ModelConfig) -> Reader:
    """A seq2seq RM. UserError if the folder holds none of ours, or a scalar one."""
    config, tokenizer = load_config(cfg, key), load_tokenizer(cfg, key)
    if (Path(cfg.path) / SCORE_FILE).is_file():
        raise UserError(
            f"{key} {cfg.path}: it is a scalar reward model ({SCORE_FILE}), which writes no "
            "corrections; give a seq2seq one, made by s2srm rm"
        )
    return Reader(key, cfg, config, tokenizer, Template.load(cfg.path))


@dataclass(frozen=True)
class Split:
    """The prompts of one family that every policy can take, with each policy's ids of them."""

    name: str
    rows: list[Prompt]
    ids: dict[str, list[list[int]]]


def read_splits(
    cfg: EvalConfig, policies: Mapping[str, Reader], reward_model: Reader | None
) -> list[Split]:
    """Test prompts and, where there are some, out-of-distribution ones. UserError for a bad row."""
    if cfg.world is not None:
        world = get_world(cfg.world)
        # Generated prompts are evaluated as they are: only what a model can hold limits them.
        data = DataConfig(path=cfg.world, max_prompt_tokens=sys.maxsize)
        sources = [
            (
                name,
                data,
                [
                    Prompt(text, f"{cfg.world}, {name} prompt {i}")
                    for i, text in enumerate(world.prompts(cfg.num_prompts, cfg.seed, name), 1)
                ],
            )
            for name in ("test", "ood")
        ]
    else:
        given = {"test": cfg.data, "ood": cfg.ood_data}
        sources = [
            (name, data, _different(data, cfg.num_prompts))
            for name, data in given.items()
            if data is not None
        ]
    splits: list[Split] = []
    for name, data, rows in sources:
        ids = {
            policy: _encode(rows, reader, data, cfg.sampling.max_new_tokens, reward_model)
            for policy, reader in policies.items()
        }
        splits.append(_shared(name, data, rows, ids, cfg))
    return splits


def _different(cfg: DataConfig, num_prompts: int) -> list[Prompt]:
    """The first different prompts; all of them where some may be left out later."""
    rows, report = load_prompts(cfg)
    if report.num_bad:
        logger.warning(
            "%s: %d bad rows skipped (first: %s)", cfg.path, report.num_bad, report.first_bad_reason
        )
    first: dict[object, Prompt] = {}
    for row in rows:
        first.setdefault(row.prompt, row)
    stops = cfg.on_bad_row == cfg.on_long_row == "error"
    return list(first.values())[: num_prompts if stops else None]


def _encode(
    rows: Sequence[Prompt],
    policy: Reader,
    cfg: DataConfig,
    max_new_tokens: int,
    reward_model: Reader | None,
) -> Mapping[str, list[int]]:
    """where -> ids, of the rows that the policy and the RM that reads its responses can take."""
    prompts, _ = tokenise_prompts(rows, policy.tokenizer, policy.template, cfg, None)
    fitting: Mapping[str, list[int]] = {prompt.where: prompt.prompt for prompt in prompts}
    needs = [Need(policy, 1, 0)]
    if reward_model is not None:
        # It reads prompt | response | separator | response.
        needs.append(Need(reward_model, 2, len(reward_model.template.separator_ids)))
    for need in needs:
        fitting = _fitting(fitting, need, max_new_tokens, cfg)
    return fitting


class Need(NamedTuple):
    """A model reads so many responses and further tokens after a prompt."""

    reader: Reader
    num_responses: int
    num_tokens: int


def _fitting(
    prompts: Mapping[str, list[int]], need: Need, max_new_tokens: int, cfg: DataConfig
) -> Mapping[str, list[int]]:
    """The prompts after which the model has enough positions left. UserError unless skipping."""
    positions = need.reader.positions
    if positions is None:
        return prompts
    reserve = need.num_responses * max_new_tokens + need.num_tokens
    kept = {where: ids for where, ids in prompts.items() if len(ids) + reserve <= positions}
    is_error = cfg.on_long_row == "error"
    if len(kept) == len(prompts) or (kept and not is_error):
        return kept
    lengths = {where: len(ids) for where, ids in prompts.items()}
    shortest = min(lengths, key=lengths.__getitem__)
    where = next(where for where in lengths if where not in kept) if is_error else shortest
    decisive = max(lengths.values()) if is_error else lengths[shortest]
    room = (positions - decisive - need.num_tokens) // need.num_responses
    advice = f"at most {room} fits" if room >= 1 else "no value of it fits such a prompt"
    skip = "; data.on_long_row skip leaves out such rows" if is_error else ""
    raise UserError(
        f"{where}: the prompt has {lengths[where]} tokens and with sampling.max_new_tokens "
        f"{max_new_tokens} another {reserve} follow, over the {positions} positions of "
        f"{need.reader.where}: {advice}{skip}"
    )


def _shared(
    name: str,
    data: DataConfig,
    rows: Sequence[Prompt],
    ids: Mapping[str, Mapping[str, list[int]]],
    cfg: EvalConfig,
) -> Split:
    """What all policies can take, at most num_prompts, and a line on what was left out."""
    kept = [row for row in rows if all(row.where in found for found in ids.values())]
    if not kept:
        raise UserError(f"{data.path}: no prompt of {len(rows)} fits all of {', '.join(ids)}")
    if len(kept) < len(rows):
        logger.warning("%s: %d of %d prompts left out", data.path, len(rows) - len(kept), len(rows))
    kept = kept[: cfg.num_prompts]
    if len(kept) < cfg.num_prompts:
        logger.warning("%s: %d different prompts, not %d", data.path, len(kept), cfg.num_prompts)
    encoded = {policy: [found[row.where] for row in kept] for policy, found in ids.items()}
    return Split(name, kept, encoded)


def check_readers(policies: Mapping[str, Reader], reward_model: Reader | None) -> None:
    """UserError where a policy's token ids would mean other text to the RM, or nothing."""
    if reward_model is None:
        return
    for reader in policies.values():
        check_same_tokenizer(
            reward_model.tokenizer,
            reader.tokenizer,
            other_name=reader.where,
            policy_name=reward_model.where,
        )
        reader.template.check_same(reward_model.template, reward_model.where, WITHOUT_SEPARATOR)
        readers = {reward_model.where: reward_model.config}
        check_vocabularies(reader.tokenizer, reader.where, reader.config, readers)
