"""PPO stops where a number is not finite, and names the model whose number it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from ppo_tiny import lm, ppo_config, prompts_file, save_folder

from s2srm.config import CriticConfig, ModelConfig, OptimConfig, RewardConfig, SamplingConfig
from s2srm.errors import TrainingDiverged, UserError
from s2srm.models.value import PackedValueModel
from s2srm.ppo import train as ppo
from s2srm.ppo.sampler import Sampler
from s2srm.rewards.seq2seq import Seq2SeqReward

HUGE = OptimConfig(lr=1e30)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarding")
    save_folder(lm("llama"), folder / "policy")
    save_folder(lm("llama", seed=1), folder / "rm")
    prompts_file(folder / "prompts.jsonl")
    return folder


def stopped(root, tmp_path, match: str, **changes) -> dict[str, float | None]:
    """The run ends with such a line and saves no model; returns the last row of metrics.jsonl.

    A batch, where there is one to blame, is kept and named.
    """
    cfg = ppo_config(root, output=str(tmp_path / "run"), **changes)
    with pytest.raises(TrainingDiverged, match=match) as caught:
        ppo.run(cfg)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("model*.safetensors"))
    kept = [str(path) for path in (tmp_path / "run").glob("diverged/*.safetensors")]
    assert kept or "after phase" in str(caught.value)
    assert all(f"its batch is in {path};" in str(caught.value) for path in kept)
    return json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_policys_optimiser(root, tmp_path, epochs):
    match = r"PPO phase 1, epoch 1, minibatch 2, policy: .*lower optim\.lr \(1e\+30\)"
    row = stopped(root, tmp_path, match, optim=HUGE, ppo_epochs=epochs)
    assert row["step"] == 1 and None in row.values()


def test_the_policys_optimiser_in_the_last_minibatch_of_a_phase(root, tmp_path):
    match = r"PPO phase 2, policy: the logprob .*updates of phase 1 did it: lower optim\.lr"
    row = stopped(root, tmp_path, match, optim=HUGE, minibatch_size=8, ppo_epochs=1)
    assert row == {"step": 2, "time": row["time"], "kl/k1": None}


def test_the_critics_optimiser(root, tmp_path):
    match = r"PPO phase \d.*critic: .*lower critic\.optim\.lr \(1e\+30\)"
    row = stopped(root, tmp_path, match, critic=CriticConfig(optim=HUGE))
    assert None in row.values()


def test_the_last_update_of_all(root, tmp_path):
    changes = {"minibatch_size": 8, "ppo_epochs": 1, "total_steps": 1}
    match = r"PPO, after phase 1, policy: the .*not finite; lower optim\.lr"
    stopped(root, tmp_path, match, optim=HUGE, **changes)


@pytest.mark.parametrize("scale", ["none", "unit_std"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_reward_model(root, tmp_path, monkeypatch, value, scale):
    score = Seq2SeqReward.__call__

    def broken(self, prompts, responses):
        batch = score(self, prompts, responses)
        batch.raw_sum[-1] = value
        return batch

    monkeypatch.setattr(Seq2SeqReward, "__call__", broken)
    reward = RewardConfig(model=ModelConfig(str(root / "rm")), scale=scale)
    where = "calibration" if scale == "unit_std" else "phase 1"
    match = rf"PPO {where}: the reward of a response is {value}; .*reward\.model\.path"
    stopped(root, tmp_path, match, reward=reward)


def test_the_critics_values(root, tmp_path, monkeypatch):
    forward = PackedValueModel.forward

    def broken(self, batch, op="values"):
        found = forward(self, batch, op)
        return found if op == "check" else found * math.nan

    monkeypatch.setattr(PackedValueModel, "forward", broken)
    row = stopped(root, tmp_path, "PPO phase 1, critic: the value of a token is nan; no update")
    assert row["ppo/value_mean"] is None


def sampled(root, num_prompts: int, count: int) -> Sampler:
    cfg = ppo_config(root)
    cfg = replace(cfg, reward=replace(cfg.reward, calibration_prompts=count))
    models = ppo.load_models(cfg, ppo.prepare(replace(cfg, output=str(root / "sampled"))))
    return Sampler(models.policy, [[5 + i] for i in range(num_prompts)], 2, cfg)


def test_few_prompts_are_asked_again_with_other_seeds(root):
    rollouts = sampled(root, 1, 6).calibration()
    assert rollouts.prompts == [[5]] * 6
    assert len({tuple(r.tokens) for r in rollouts.responses}) > 1
    assert len(sampled(root, 4, 6).calibration().prompts) == 6
    many = sampled(root, 9, 6).calibration()
    assert len({tuple(p) for p in many.prompts}) == 6, "enough prompts: each once"


def test_a_policy_that_always_writes_the_same_is_the_reason(root, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a"}\n')
    cfg = ppo_config(root, output=str(tmp_path / "run"), sampling=SamplingConfig(8, 1e-6))
    cfg = replace(cfg, data=replace(cfg.data, path=str(tmp_path / "one.jsonl")))
    with pytest.raises(UserError, match=r"always writes the same response \(to 1 prompt\)"):
        ppo.run(cfg)
