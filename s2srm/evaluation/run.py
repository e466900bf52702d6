"""`s2srm eval`: every policy answers the same prompts, the answers are judged and compared.

Under torchrun every rank holds a whole policy and answers a share of the prompts; all ranks get all
answers, and rank 0 writes. Left out: sharded policies, and judging by a language model over the
network.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2srm import distributed
from s2srm.balance import deal, deal_equal_counts
from s2srm.config import ModelConfig
from s2srm.data.schema import PromptText
from s2srm.evaluation.config import EvalConfig, validate_eval
from s2srm.evaluation.feedback import FeedbackModel, plain_text
from s2srm.evaluation.inputs import (
    Reader,
    Split,
    check_readers,
    read_policy,
    read_reward_model,
    read_splits,
)
from s2srm.evaluation.judging import Judge, heuristic_judge
from s2srm.evaluation.summary import Record, summarise
from s2srm.jsonl import write_jsonl
from s2srm.models.load import load_lm
from s2srm.outputs import writing
from s2srm.progress import ProgressBar
from s2srm.rollout.base import Response, sampling_seed
from s2srm.rollout.gather import gather_responses
from s2srm.rollout.hf import HFRollout, named_tensors
from s2srm.runs import RunResult, prepare_output
from s2srm.worlds import get_world

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

    split: Split
    temperature: float
    sample: int


def evaluate(cfg: EvalConfig) -> RunResult:
    """Write eval.json, responses.jsonl and, with an RM, feedback.jsonl into the output folder.

    eval.json: {"world", "judge", "against", "groups": see `summary.summarise`}. The result's
    metrics are `<split>/<temperature>/<policy>/score` and `.../length`.
    """
    cfg = validate_eval(cfg)
    distributed.start()
    policies = {
        name: read_policy(f"policies.{name}", ModelConfig(path, cfg.precision), cfg.template)
        for name, path in cfg.policies.items()
    }
    rm = None if cfg.reward_model is None else read_reward_model("reward_model", cfg.reward_model)
    check_readers(policies, rm)
    tasks = _tasks(read_splits(cfg, policies, rm), cfg)
    judge = get_world(cfg.world).judge if cfg.world else heuristic_judge
    output = prepare_output(cfg)
    feedback_model = None if rm is None else _feedback_model(rm, tasks, cfg)
    answers: list[Answer] = []
    total = len(cfg.policies) * sum(len(task.split.rows) for task in tasks)
    with ProgressBar(total, "evaluation", unit="response") as bar:
        for name, reader in policies.items():
            answers += _answer(name, reader, cfg, tasks, judge, bar)
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
    rows = [record.row() for record in records]
    if distributed.is_main():
        with writing(output):
            text = json.dumps(result, indent=2) + "\n"
            (output / "eval.json").write_text(text, encoding="utf-8")
            write_jsonl(output / "responses.jsonl", rows)
    if feedback_model is not None:
        rows = _feedback(_chosen_for_reading(answers, cfg), feedback_model, judge, cfg)
        if distributed.is_main():
            with writing(output):
                write_jsonl(output / "feedback.jsonl", rows)
    return RunResult(output, _flat_metrics(result))


def _feedback_model(reader: Reader, tasks: list[Task], cfg: EvalConfig) -> FeedbackModel:
    """The RM, with corrections of up to two responses' length where its positions allow that."""
    longest = 2 * cfg.sampling.max_new_tokens
    if reader.positions is not None:
        ids = [prompt for task in tasks for found in task.split.ids.values() for prompt in found]
        read = max(map(len, ids)) + cfg.sampling.max_new_tokens + len(reader.template.separator_ids)
        longest = min(longest, reader.positions - read)
    return FeedbackModel(reader, cfg.token, max_correction_tokens=longest)


def _tasks(splits: list[Split], cfg: EvalConfig) -> list[Task]:
    """Every (split, temperature, sample) with its prompts; greedy once, whatever num_samples."""
    return [
        Task(split, temperature, sample)
        for split in splits
        for temperature in cfg.temperatures
        for sample in range(cfg.num_samples if temperature > 0 else 1)
    ]


def _answer(
    name: str,
    policy: Reader,
    cfg: EvalConfig,
    tasks: list[Task],
    judge: Judge,
    bar: ProgressBar,
) -> Iterator[Answer]:
    """Every response of one policy, judged."""
    lm = load_lm(policy.cfg, train=False)
    rollout = HFRollout.without_weights(lm)
    device = distributed.device()
    rollout.update_weights((n, tensor.to(device)) for n, tensor in named_tensors(lm))
    for task in tasks:
        prompt_ids = task.split.ids[name]
        seeds = [sampling_seed(cfg.seed, task.sample, i) for i in range(len(prompt_ids))]
        sampling = dataclasses.replace(cfg.sampling, temperature=task.temperature)
        step = cfg.sampling.batch_size * distributed.world_size()
        for first in range(0, len(prompt_ids), step):
            part = slice(first, first + step)
            lengths = [len(ids) for ids in prompt_ids[part]]
            shares = deal_equal_counts(lengths, distributed.world_size())
            mine = [first + i for i in shares[distributed.rank()]]
            local = rollout.generate(
                [prompt_ids[i] for i in mine],
                [seeds[i] for i in mine],
                sampling,
                policy.template.eos_id,
            )
            responses = gather_responses(shares, local)
            tokens = sum(len(response.tokens) for response in responses)
            bar.advance(len(responses), tokens, policy=name)
            for row, ids, response in zip(
                task.split.rows[part], prompt_ids[part], responses, strict=True
            ):
                shown = prompt_text(row.prompt)
                text = plain_text(policy.tokenizer, response)
                record = Record(
                    policy=name,
                    split=task.split.name,
                    temperature=task.temperature,
                    sample=task.sample,
                    prompt=shown,
                    response=text,
                    finished=response.finished,
                    judgement=judge(shown, text),
                )
                yield Answer(record, ids, response)


def prompt_text(prompt: PromptText) -> str:
    """A prompt for people to read: text as it is, turns with their role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def _score_by_reward(answers: list[Answer], model: FeedbackModel) -> list[Answer]:
    """Without a world: score = the RM's mean token reward, and how often it agrees."""
    # What the RM reads of prompt | response | separator | response.
    lengths = [len(a.prompt_ids) + 2 * len(a.response.tokens) for a in answers]
    mine = deal(lengths, distributed.world_size())[distributed.rank()]
    rewards, rm_tokens, _ = model.token_rewards(
        [answers[i].prompt_ids for i in mine], [answers[i].response for i in mine]
    )
    found: dict[int, tuple[float, float | None]] = {}
    for place, i in enumerate(mine):
        agreement = None
        if rm_tokens is not None:
            pairs = list(zip(rm_tokens[place], answers[i].response.tokens, strict=True))
            agreement = sum(a == b for a, b in pairs) / len(pairs)
        found[i] = sum(rewards[place]) / len(rewards[place]), agreement
    opinions = {i: pair for part in distributed.gather_objects(found) for i, pair in part.items()}
    scored: list[Answer] = []
    for i, answer in enumerate(answers):
        score, agreement = opinions[i]
        judgement = dataclasses.replace(answer.record.judgement, score=score, agreement=agreement)
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
