"""The ppo stage as a whole: what it writes, what it refuses, that it is reproducible and learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from ppo_tiny import (
    EOS,
    SEPARATOR,
    WORDS,
    causal_engine,
    lm,
    ppo_config,
    prompts_file,
    save_folder,
    tokenizer,
    value_engine,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from s2srm.checkpoint.start import Start
from s2srm.config import (
    CriticConfig,
    EngineConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    TemplateConfig,
    TokenRewardConfig,
)
from s2srm.engine import Engine, build
from s2srm.errors import UserError
from s2srm.ppo import train as ppo
from s2srm.ppo.kl import KLController
from s2srm.ppo.sampler import Sampler
from s2srm.ppo.setup import Inputs, Models
from s2srm.rewards.base import RewardBatch, cumulative_lengths, sequence_sums

ALWAYS = {
    "reward/sum_mean",
    "reward/per_token_mean",
    "reward/raw_sum_mean",
    "reward/length_correlation",
    "reward/scale",
    "kl/k1",
    "kl/k3",
    "kl/per_response",
    "kl/coef",
    "balance/idle_fraction",
    "balance/tokens_max_over_mean",
    "ppo/bounded_fraction",
    "ppo/clip_fraction",
    "ppo/entropy",
    "ppo/ratio_max",
    "ppo/ratio_mean",
    "ppo/update_kl",
    "ppo/first_ratio_error",
    "ppo/policy_loss",
    "ppo/value_loss",
    "ppo/explained_variance",
    "response/length_mean",
    "response/truncated_fraction",
    "grad_norm/policy",
    "grad_norm/critic",
    "lr/policy",
    "lr/critic",
    "time/rollout_s",
    "time/reward_s",
    "time/update_s",
    "time/tokens_per_s",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ppo_stage")
    save_folder(lm("llama", seed=0, scale=4.0), root / "policy")
    save_folder(lm("llama", seed=1), root / "rm")
    save_folder(lm("llama", seed=2), root / "scored", score_seed=3)
    prompts_file(root / "prompts.jsonl")
    return root


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["seq2seq", "aligned", "scalar"])
def test_a_run_writes_metrics_samples_policy_and_critic(folders, tmp_path, kind):
    model = ModelConfig(str(folders / ("scored" if kind == "scalar" else "rm")))
    reward = RewardConfig(
        kind="scalar" if kind == "scalar" else "seq2seq",
        model=model,
        calibration_prompts=8,
        token=TokenRewardConfig(mode="aligned" if kind == "aligned" else "teacher_forced"),
    )
    output = tmp_path / "run"
    result = ppo.run(
        ppo_config(
            folders,
            output=str(output),
            reward=reward,
            total_steps=3,
            samples_every=2,
            kl=KLConfig(controller="adaptive", target=1.0, horizon=20),
        )
    )
    metrics = rows(output / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        missing = ALWAYS - row.keys()
        assert not missing
        assert all(isinstance(row[k], float | int) and math.isfinite(row[k]) for k in ALWAYS)
        assert row["ppo/first_ratio_error"] <= 1e-5 and row["kl/k3"] >= 0
        assert ("reward/divergence_fraction" in row) == (kind != "scalar")
        assert ("reward/rm_agreement" in row) == (kind == "seq2seq")
    assert metrics[0]["kl/k1"] == pytest.approx(0.0, abs=1e-6), "policy = reference at first"
    assert len({row["kl/coef"] for row in metrics}) == 3
    assert result.output == output
    assert result.metrics["reward/sum_mean"] == metrics[-1]["reward/sum_mean"]

    samples = rows(output / "samples.jsonl")
    assert [s["step"] for s in samples] == [1] * 8 + [3] * 8
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["rewards"])
        assert sum(sample["rewards"]) == pytest.approx(sample["sum"], rel=1e-4, abs=1e-4)
        assert (sample["correction"] is None) == (kind == "scalar")
        assert (sample["rm_tokens"] is None) == (kind != "seq2seq")
        assert sample["finished"] == (sample["tokens"][-1] == "</s>")
        assert sample["prompt"].split()[0] in WORDS

    for folder in (output, output / "critic"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config.vocab_size == len(WORDS)
    moved = AutoModelForCausalLM.from_pretrained(output).state_dict()
    initial = lm("llama", seed=0, scale=4.0).state_dict()
    assert any(not torch.allclose(moved[k], initial[k], atol=1e-4) for k in initial)
    assert (output / "critic" / "score_head.safetensors").is_file()


def test_two_runs_with_one_seed_are_the_same_and_another_seed_is_not(folders, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = ppo_config(folders, output=str(tmp_path / name), seed=seed)
        result = ppo.run(cfg)
        found.append({k: v for k, v in result.metrics.items() if not k.startswith("time/")})
    assert found[0] == found[1] != found[2]


def test_calibration_gives_unit_standard_deviation_and_none_leaves_rewards_alone(folders, tmp_path):
    reward = RewardConfig(model=ModelConfig(str(folders / "rm")), scale="none")
    result = ppo.run(
        ppo_config(folders, output=str(tmp_path / "raw"), reward=reward, total_steps=1)
    )
    assert result.metrics["reward/scale"] == 1.0
    assert result.metrics["reward/raw_sum_mean"] == result.metrics["reward/sum_mean"]


def test_a_reward_without_spread_is_explained_before_training(folders, tmp_path):
    save_folder(lm("llama", seed=2, scale=0.0), tmp_path / "flat", score_seed=3)
    reward = RewardConfig("scalar", ModelConfig(str(tmp_path / "flat")), calibration_prompts=8)
    with pytest.raises(UserError, match=r"unit_std.*does not tell them apart"):
        ppo.run(ppo_config(folders, output=str(tmp_path / "run"), reward=reward))


def refused(cfg: PPOConfig, match: str, monkeypatch) -> None:
    """The run stops before any weight is read."""
    monkeypatch.setattr(ppo, "load_models", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=match) as caught:
        ppo.run(cfg)
    assert "\n" not in str(caught.value)


def other_tokenizer(key: str) -> str:
    """The line names the model that differs first, and then the policy."""
    return rf"^{key} \S*other does not have the tokenizer of policy.path .*'[ab]'"


def test_an_rm_with_another_tokenizer_is_refused(folders, tmp_path, monkeypatch):
    save_folder(lm("llama"), tmp_path / "other")
    other = tokenizer()
    swapped = json.loads(other.backend_tokenizer.to_str())
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(swapped))
    cfg = ppo_config(folders, output=str(tmp_path / "run"))
    cfg = replace(cfg, reward=RewardConfig(model=ModelConfig(str(tmp_path / "other"))))
    refused(cfg, other_tokenizer("reward.model.path"), monkeypatch)
    cfg = ppo_config(folders, output=str(tmp_path / "run"), reference=str(tmp_path / "other"))
    refused(cfg, other_tokenizer("reference"), monkeypatch)


def test_an_rm_of_another_template_is_refused(folders, tmp_path, monkeypatch):
    cfg = ppo_config(
        folders, output=str(tmp_path / "run"), template=TemplateConfig("plain", " q r")
    )
    refused(cfg, r"another template.*separator", monkeypatch)
    assert not (tmp_path / "run").exists(), "a refused run leaves no folder behind"


def test_a_model_that_is_no_rm_of_ours_is_refused(folders, tmp_path, monkeypatch):
    lm("llama").save_pretrained(tmp_path / "bare")
    tokenizer().save_pretrained(tmp_path / "bare")
    cfg = ppo_config(folders, output=str(tmp_path / "run"))
    cfg = replace(cfg, reward=RewardConfig(model=ModelConfig(str(tmp_path / "bare"))))
    refused(cfg, "s2srm_template.json", monkeypatch)


@pytest.mark.parametrize(("kind", "folder"), [("scalar", "rm"), ("seq2seq", "scored")])
def test_the_kind_of_reward_must_fit_the_model(folders, tmp_path, monkeypatch, kind, folder):
    reward = RewardConfig(kind, ModelConfig(str(folders / folder)))
    cfg = ppo_config(folders, output=str(tmp_path / "run"), reward=reward)
    refused(cfg, "score_head.safetensors", monkeypatch)


def test_prompts_that_leave_no_room_are_named(folders, tmp_path, monkeypatch):
    # 128 positions: a seq2seq RM needs prompt + 2 * 62 + 2 of them, so three words are too many.
    cfg = ppo_config(folders, output=str(tmp_path / "run"), sampling=SamplingConfig(62, 1.0))
    refused(cfg, r"prompts.jsonl:3.*128", monkeypatch)
    skip = replace(cfg.data, on_long_row="skip")
    inputs = ppo.prepare(replace(cfg, data=skip))
    assert {len(p) for p in inputs.prompts} == {1, 2}
    scalar = RewardConfig("scalar", ModelConfig(str(folders / "scored")))
    kept = ppo.prepare(replace(cfg, reward=scalar, overwrite=True))
    assert len(kept.prompts) == 10


def test_prompts_over_the_configured_limit_are_named(folders, tmp_path, monkeypatch):
    cfg = ppo_config(folders, output=str(tmp_path / "run"))
    refused(replace(cfg, data=replace(cfg.data, max_prompt_tokens=3)), ":4", monkeypatch)


def test_greedy_sampling_is_refused(folders, tmp_path, monkeypatch):
    cfg = ppo_config(folders, output=str(tmp_path / "run"), sampling=SamplingConfig(8, 0.0))
    refused(cfg, "temperature", monkeypatch)


class PayWord:
    """A reward that is easy to raise: +1 for word 7, -0.1 for any other."""

    engine = None

    def calibrate(self, scale: float) -> None:
        raise AssertionError("not calibrated here")

    def num_tokens(self, prompt, response) -> int:
        return len(response.tokens)

    def __call__(self, prompts, responses) -> RewardBatch:
        flat = [1.0 if t == 7 else -0.1 for r in responses for t in r.tokens]
        rewards, cu_rows = torch.tensor(flat), cumulative_lengths(responses)
        sums = sequence_sums(rewards, cu_rows)
        return RewardBatch(rewards, cu_rows, sums, sums)


def learned(kl_coef: float, tmp_path, phases: int = 16) -> list[dict[str, float]]:
    optim = OptimConfig(lr=1e-2)
    cfg = PPOConfig(
        sampling=SamplingConfig(6, 1.0, 64),
        rollout_size=48,
        minibatch_size=24,
        total_steps=phases,
        kl=KLConfig(coef=kl_coef),
        optim=optim,
        critic=CriticConfig(optim=optim),
        template=TemplateConfig("plain", SEPARATOR),
    )
    policy = causal_engine(lm("llama", scale=2.0), optim)
    models = Models(
        policy, causal_engine(lm("llama", scale=2.0)), value_engine(lm("llama"), optim), PayWord()
    )
    prompts = [[5], [6, 8], [9, 10, 11]]
    sampler = Sampler(policy, prompts, EOS, cfg)
    inputs = Inputs(Start(tmp_path), tokenizer(), None, prompts)
    controller = KLController(cfg.kl)
    return [
        ppo.run_phase(phase, models, sampler, controller, inputs, cfg) for phase in range(phases)
    ]


def test_ppo_raises_the_reward_and_a_strong_kl_penalty_holds_it_back(tmp_path):
    free, held = learned(0.0, tmp_path), learned(20.0, tmp_path)
    assert free[0]["reward/sum_mean"] < 0.5
    assert free[-1]["reward/sum_mean"] > 3.0, "six tokens at most: the best is 6"
    assert free[-1]["kl/per_response"] > 1.0
    assert held[-1]["kl/per_response"] < 0.5 * free[-1]["kl/per_response"]
    assert held[-1]["reward/sum_mean"] < free[-1]["reward/sum_mean"]
    assert free[-1]["ppo/value_mean"] > 1.0, "the critic has followed the rewards"


def test_idle_models_in_host_memory_change_nothing(tmp_path, monkeypatch):
    """As beside a GPU: what a phase does not use is emptied, and filled again to be used."""
    save_folder(lm("llama", seed=0, scale=4.0), tmp_path / "policy")
    save_folder(lm("llama", seed=1), tmp_path / "rm")
    prompts_file(tmp_path / "prompts.jsonl")
    monkeypatch.setattr(build, "relieves", lambda device: True)
    adamw = OptimConfig(lr=1e-2)
    asleep: list[bool] = []
    sample = Sampler.phase

    def looking(self, phase):
        asleep.extend(e._training.is_asleep for e in engines if e.optimizer is not None)
        asleep.extend(e._weights.is_asleep for e in engines if e.module is not self.policy.module)
        return sample(self, phase)

    monkeypatch.setattr(Sampler, "phase", looking)
    engines: list[Engine] = []
    load = ppo.load_models

    def loading(*args):
        models = load(*args)
        engines[:] = [models.policy, models.reference, models.critic, models.reward.engine]
        return models

    monkeypatch.setattr(ppo, "load_models", loading)
    results = {}
    for offload in ("none", "idle"):
        asleep.clear()
        # bfloat16: these weights are no view of a file, and have masters.
        cfg = ppo_config(
            tmp_path,
            output=str(tmp_path / offload),
            policy=ModelConfig(str(tmp_path / "policy"), precision="bfloat16"),
            reward=RewardConfig(
                model=ModelConfig(str(tmp_path / "rm"), precision="bfloat16"),
                calibration_prompts=10,
            ),
            engine=EngineConfig(offload=offload),
            optim=adamw,
            critic=CriticConfig(optim=adamw),
        )
        ppo.run(cfg)
        assert set(asleep) == {offload == "idle"}
        rows = (tmp_path / offload / "metrics.jsonl").read_text().splitlines()
        results[offload] = [
            {k: v for k, v in json.loads(row).items() if not k.startswith("time")} for row in rows
        ]
        results[offload + "-model"] = load_file(tmp_path / offload / "model.safetensors")
    assert results["none"] == results["idle"]
    for name, tensor in results["none-model"].items():
        assert torch.equal(tensor, results["idle-model"][name])
