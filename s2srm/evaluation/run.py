"""`s2srm eval`: every policy answers the same prompts, the answers are judged and compared.

One process. Left out: judging by a language model over the network.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from s2srm import distributed
from s2srm.config import DataConfig, ModelConfig, TemplateConfig
from s2srm.data.loading import load_prompts
from s2srm.data.schema import PromptText
from s2srm.data.templates import Template
from s2srm.errors import UserError
from s2srm.evaluation.config import EvalConfig
from s2srm.evaluation.feedback import FeedbackModel, plain_text
from s2srm.evaluation.judging import Judge, heuristic_judge, world_judge
from s2srm.evaluation.summary import Record, summarise
from s2srm.models.load import load_config, load_lm, load_tokenizer
from s2srm.models.vocabulary import check_vocabularies
from s2srm.progress import ProgressBar
from s2srm.rollout.base import Response, sampling_seed
from s2srm.rollout.hf import HFRollout, named_tensors
from s2srm.runs import RunResult, prepare_output
from s2srm.worlds import get_world

logger = logging.getLogger(__name__)

GOLD = "the world's programmatic judge, which trained no method"
RM_OPINION = "mean token reward by the reward model: its own opinion, not a judgement of quality"
NO_SCORE = "none: refusals (by a list of phrases) and length only"


@dataclass(frozen=True)
class Answer:
    """One response of one policy, as ids."""

    record: Record
    prompt_ids: list[int]
    response: Response


@dataclass(frozen=True)
class Task:
    """One pass over the prompts of one split at one temperature."""

    split: str
    prompts: list[PromptText]
    temperature: float
    sample: int


def evaluate(cfg: EvalConfig) -> RunResult:
    """Write eval.json, responses.jsonl and, with an RM, feedback.jsonl into the output folder.

    eval.json: {"world", "judge", "against", "groups": see `summary.summarise`}. The result's
    metrics are `<split>/<temperature>/<policy>/score` and `.../length`.
    """
    if distributed.world_size() > 1:
        raise UserError("eval runs in one process; start it without torchrun")
    feedback_model = _feedback_model(cfg)
    tasks = _tasks(cfg)
    judge = world_judge(get_world(cfg.world)) if cfg.world else heuristic_judge
    output = prepare_output(cfg)
    answers: list[Answer] = []
    total = len(cfg.policies) * sum(len(task.prompts) for task in tasks)
    with ProgressBar(total, "evaluation", unit="response") as bar:
        for name, path in cfg.policies.items():
            answers += _answer(name, path, cfg, tasks, judge, bar, feedback_model)
    if feedback_model is not None and cfg.world is None:
        answers = _score_by_reward(answers, feedback_model)
    against = cfg.against or [next(iter(cfg.policies))]
    records = [answer.record for answer in answers]
    result: dict[str, Any] = {
        "world": cfg.world,
        "judge": GOLD if cfg.world else RM_OPINION if feedback_model else NO_SCORE,
        "against": against,
        "groups": summarise(records, against, cfg.num_resamples),
    }
    (output / "eval.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _write_jsonl(output / "responses.jsonl", [record.row() for record in records])
    if feedback_model is not None:
        rows = _feedback(_chosen_for_reading(answers, cfg), feedback_model, judge, cfg)
        _write_jsonl(output / "feedback.jsonl", rows)
    return RunResult(output, _flat_metrics(result))


def _feedback_model(cfg: EvalConfig) -> FeedbackModel | None:
    if cfg.reward_model is None:
        return None
    return FeedbackModel(
        cfg.reward_model,
        cfg.token,
        max_correction_tokens=2 * cfg.sampling.max_new_tokens,
        key="reward_model",
    )


def _tasks(cfg: EvalConfig) -> list[Task]:
    """Every (split, temperature, sample) with its prompts; greedy once, whatever num_samples."""
    splits: dict[str, list[PromptText]] = {}
    if cfg.world is not None:
        world = get_world(cfg.world)
        splits["test"] = list(world.prompts(cfg.num_prompts, cfg.seed, "test"))
        splits["ood"] = list(world.prompts(cfg.num_prompts, cfg.seed, "ood"))
    else:
        assert cfg.data is not None
        splits["test"] = _load(cfg.data, cfg.num_prompts)
        if cfg.ood_data is not None:
            splits["ood"] = _load(cfg.ood_data, cfg.num_prompts)
    return [
        Task(split, prompts, temperature, sample)
        for split, prompts in splits.items()
        for temperature in cfg.temperatures
        for sample in range(cfg.num_samples if temperature > 0 else 1)
    ]


def _load(cfg: DataConfig, num_prompts: int) -> list[PromptText]:
    """The first different prompts of a data set."""
    rows, _ = load_prompts(cfg)
    prompts = list(dict.fromkeys(row.prompt for row in rows))[:num_prompts]
    if len(prompts) < num_prompts:
        logger.warning("%s has %d different prompts, not %d", cfg.path, len(prompts), num_prompts)
    return prompts


def _answer(
    name: str,
    path: str,
    cfg: EvalConfig,
    tasks: list[Task],
    judge: Judge,
    bar: ProgressBar,
    feedback_model: FeedbackModel | None,
) -> Iterator[Answer]:
    """Every response of one policy, judged."""
    model_cfg = ModelConfig(path=path, precision=cfg.precision)
    tokenizer = load_tokenizer(model_cfg, f"policies.{name}")
    if feedback_model is not None:
        feedback_model.check_same_tokenizer(tokenizer, f"policies.{name} {path}")
        assert cfg.reward_model is not None
        readers = {f"reward_model.path {cfg.reward_model.path}": load_config(cfg.reward_model)}
        policy = load_config(model_cfg, f"policies.{name}")
        check_vocabularies(tokenizer, f"policies.{name} {path}", policy, readers)
    template = load_template(path, tokenizer, cfg.template)
    lm = load_lm(model_cfg, train=False)
    rollout = HFRollout.without_weights(lm)
    device = distributed.device()
    rollout.update_weights((n, tensor.to(device)) for n, tensor in named_tensors(lm))
    for task in tasks:
        prompt_ids = [template.encode_prompt(tokenizer, prompt) for prompt in task.prompts]
        seeds = [sampling_seed(cfg.seed, task.sample, i) for i in range(len(prompt_ids))]
        sampling = dataclasses.replace(cfg.sampling, temperature=task.temperature)
        step = cfg.sampling.batch_size
        for first in range(0, len(prompt_ids), step):
            part = slice(first, first + step)
            responses = rollout.generate(prompt_ids[part], seeds[part], sampling, template.eos_id)
            tokens = sum(len(response.tokens) for response in responses)
            bar.advance(len(responses), tokens, policy=name)
            for prompt, ids, response in zip(
                task.prompts[part], prompt_ids[part], responses, strict=True
            ):
                shown, text = prompt_text(prompt), plain_text(tokenizer, response)
                record = Record(
                    policy=name,
                    split=task.split,
                    temperature=task.temperature,
                    sample=task.sample,
                    prompt=shown,
                    response=text,
                    finished=response.finished,
                    judgement=judge(shown, text),
                )
                yield Answer(record, ids, response)


def load_template(path: str, tokenizer: PreTrainedTokenizerBase, cfg: TemplateConfig) -> Template:
    """The template saved with a model, or, for a model that no stage of ours saved, a new one."""
    if (Path(path).expanduser() / "s2srm_template.json").is_file():
        return Template.load(path)
    return Template.build(tokenizer, cfg)


def prompt_text(prompt: PromptText) -> str:
    """A prompt for people to read: text as it is, turns with their role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def _score_by_reward(answers: list[Answer], model: FeedbackModel) -> list[Answer]:
    """Without a world: score = the RM's mean token reward, and how often it agrees."""
    rewards, rm_tokens, _ = model.token_rewards(
        [answer.prompt_ids for answer in answers], [answer.response for answer in answers]
    )
    scored: list[Answer] = []
    for i, answer in enumerate(answers):
        agreement = None
        if rm_tokens is not None:
            pairs = list(zip(rm_tokens[i], answer.response.tokens, strict=True))
            agreement = sum(a == b for a, b in pairs) / len(pairs)
        judgement = dataclasses.replace(
            answer.record.judgement,
            score=sum(rewards[i]) / len(rewards[i]),
            agreement=agreement,
        )
        record = dataclasses.replace(answer.record, judgement=judgement)
        scored.append(dataclasses.replace(answer, record=record))
    return scored


def _chosen_for_reading(answers: list[Answer], cfg: EvalConfig) -> list[Answer]:
    """The first prompts' answers by every policy in turn, at the highest temperature."""
    hottest = max(cfg.temperatures)
    pool = [a for a in answers if a.record.temperature == hottest and a.record.sample == 0]
    by_policy = [
        [a for a in pool if a.record.policy == name and a.record.split == "test"]
        for name in cfg.policies
    ]
    interleaved = [answer for answers in zip(*by_policy, strict=True) for answer in answers]
    return interleaved[: cfg.feedback_rows]


def _feedback(
    answers: list[Answer], model: FeedbackModel, judge: Judge, cfg: EvalConfig
) -> list[dict[str, Any]]:
    """Rows as in samples.jsonl, with the policy and the gold score of the correction."""
    if not answers:
        return []
    found = model.explain(
        [a.prompt_ids for a in answers],
        [a.response for a in answers],
        [a.record.prompt for a in answers],
    )
    rows: list[dict[str, Any]] = []
    for answer, feedback in zip(answers, found, strict=True):
        gold = answer.record.judgement.score if cfg.world else None
        corrected = judge(feedback.prompt, feedback.correction).score if cfg.world else None
        policy = answer.record.policy
        rows.append(
            {"policy": policy, **feedback.row(), "gold": gold, "gold_correction": corrected}
        )
    return rows


def _flat_metrics(result: dict[str, Any]) -> dict[str, float]:
    """{split/temperature/policy/score: mean} and the same for length."""
    return {
        f"{group['split']}/{group['temperature']:g}/{name}/{key}": policy[key]["mean"]
        for group in result["groups"]
        for name, policy in group["policies"].items()
        for key in ("score", "length")
        if policy[key] is not None
    }


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
