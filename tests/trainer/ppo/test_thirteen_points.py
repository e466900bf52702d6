"""What PPO implementations get wrong: one test or more for each of the thirteen points.

The numbers are those of the project's list: 1 masks, 2 token in token out, 3 packed positions,
4 temperature and sampling, 5 old logprobs and ratio, 6 fp32 log-softmax and dropout, 7 clip then
KL, 8 global means, 9 GAE's end, 10 value loss, 11 dummies, 12 seeds and shuffles, 13 AdamW and the
learning rate. Points 8 and 11 are also tested with real ranks in tests/distributed.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
from dataclasses import replace
from itertools import chain

import pytest
import torch
from ppo_tiny import (
    EOS,
    VOCAB,
    causal_engine,
    lm,
    ppo_config,
    prompts_file,
    save_folder,
    value_engine,
)

from s2srm import distributed
from s2srm.checkpoint.start import Start
from s2srm.config import CriticConfig, OptimConfig, PPOConfig, SamplingConfig
from s2srm.engine.base import dummy_batch, run_microbatches
from s2srm.engine.optim import learning_rate
from s2srm.packing import pack, split_rows
from s2srm.ppo import sampler as sampler_module
from s2srm.ppo import train as ppo
from s2srm.ppo.experience import advantages_and_returns, collect_experience
from s2srm.ppo.kl import KLController
from s2srm.ppo.metrics import TokenMeans, phase_metrics
from s2srm.ppo.minibatches import Rollouts, permutation, plan_epoch
from s2srm.ppo.sampler import Sampler
from s2srm.ppo.setup import Inputs, Models, load_models, optimiser_steps
from s2srm.ppo.update import check_first_ratio, update
from s2srm.rewards.base import RewardBatch, cumulative_lengths, sequence_sums
from s2srm.rollout.base import Response

# EOS (which is the padding token too) inside prompts and at the end of responses.
PROMPTS = [[5, EOS, 6], [7], [EOS, 8, 9, 10], [5, 6], [11, 12, 13]]
RESPONSES = [
    Response([7, 8, EOS], True),
    Response([9, 10, 11, 12, 13], False),
    Response([EOS], True),
    Response([14, 15, 16, 17, 18, 19, EOS], True),
    Response([20], False),
]
ROLLOUTS = Rollouts(PROMPTS, RESPONSES)
SGD = OptimConfig("sgd", lr=0.05, schedule="constant", max_grad_norm=0.0)


class PayTokens:
    """A reward model for tests: +1 for every token with an id over 10, else -1."""

    def __init__(self) -> None:
        self.scale = 1.0

    engine = None

    def calibrate(self, scale: float) -> None:
        self.scale = scale

    def num_tokens(self, prompt, response) -> int:
        return len(prompt) + len(response.tokens)

    def __call__(self, prompts, responses) -> RewardBatch:
        flat = [1.0 if t > 10 else -1.0 for r in responses for t in r.tokens]
        rewards = torch.tensor(flat) * self.scale
        cu_rows = cumulative_lengths(responses)
        sums = sequence_sums(rewards, cu_rows)
        return RewardBatch(rewards, cu_rows, sums, sums)


def config(**changes) -> PPOConfig:
    values = {
        "sampling": SamplingConfig(max_new_tokens=8, temperature=0.7),
        "rollout_size": 5,
        "minibatch_size": 3,
        "ppo_epochs": 2,
        "microbatch_tokens": 16,
        "optim": SGD,
        "critic": CriticConfig(optim=SGD),
    }
    return PPOConfig(**{**values, **changes})


def engines(name="llama", dtype=torch.float32, optim=SGD):
    policy = causal_engine(lm(name, seed=0, dtype=dtype), optim)
    reference = causal_engine(lm(name, seed=0, scale=8.5, dtype=dtype))
    critic = value_engine(lm(name, seed=2, dtype=dtype), optim, seed=4)
    return policy, reference, critic


def collected(cfg, policy, reference, critic, kl_coef=0.1, rollouts=ROLLOUTS):
    plan = ppo.epoch_plan(rollouts, 0, 0, cfg)
    reward = PayTokens()(rollouts.prompts, rollouts.responses)
    return collect_experience(policy, reference, critic, rollouts, reward, plan, kl_coef, cfg), plan


def unpacked_logprobs(model, prompt, response, temperature):
    ids = torch.tensor([[*prompt, *response.tokens]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    rows = (logits.double() / temperature).log_softmax(-1)
    return rows.gather(1, torch.tensor(response.tokens)[:, None])[:, 0]


# 1 ----------------------------------------------------------------------------------------------


def test_point_01_masks_come_from_lengths_not_from_the_padding_id():
    cfg = config()
    experience, plan = collected(cfg, *engines())
    lengths = [len(r.tokens) for r in RESPONSES]
    assert experience.cu_rows.diff().tolist() == lengths
    assert experience.advantages.numel() == sum(lengths)
    assert sum(m.num_tokens for m in plan) == sum(lengths)
    # The row of an end of sequence is trained like any other although EOS is the padding id.
    ends = [
        int(e) - 1 for e, r in zip(experience.cu_rows[1:], RESPONSES, strict=True) if r.finished
    ]
    assert (experience.old_logprobs[ends] < 0).all()
    assert (experience.advantages[ends] != 0).all()


# 2 ----------------------------------------------------------------------------------------------


def test_point_02_the_sampled_ids_are_the_ids_that_are_scored_and_trained_on(tmp_path):
    """Ids that do not survive decoding and encoding: special ones and unknown ones."""
    cfg = config(rollout_size=6)
    policy, reference, critic = engines()
    seen: dict[str, list[list[int]]] = {}
    for name, engine in (("policy", policy), ("reference", reference), ("critic", critic)):
        forward, seen[name] = engine.module.forward, []

        def spy(batch, *args, _forward=forward, _into=seen[name], **kwargs):
            ends = batch.cu_seqlens.tolist()
            _into.extend(batch.tokens[a:b].tolist() for a, b in itertools.pairwise(ends))
            return _forward(batch, *args, **kwargs)

        engine.module.forward = spy
    sampler = Sampler(policy, PROMPTS, EOS, cfg)
    sampled: list[Rollouts] = []
    phase_of = sampler.phase
    sampler.phase = lambda phase: sampled.append(phase_of(phase)) or sampled[-1]
    inputs = Inputs(
        Start(tmp_path), None, None, PROMPTS
    )  # no tokenizer: nothing could be re-encoded
    models = Models(policy, reference, critic, PayTokens())
    ppo.run_phase(0, models, sampler, KLController(cfg.kl), inputs, cfg)
    wanted = {
        (*prompt, *response.tokens)
        for prompt, response in zip(sampled[0].prompts, sampled[0].responses, strict=True)
    }
    assert any(set(r.tokens) & {0, 1, 3} for r in sampled[0].responses), "no odd id was sampled"
    for name, sequences in seen.items():
        assert {tuple(s) for s in sequences} == wanted, name


# 3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3-tied"])
def test_point_03_packed_sequences_do_not_see_each_other(name):
    policy, _, critic = engines(name)
    segments = ROLLOUTS.segments()
    batch = pack(segments)
    assert batch.positions[batch.cu_seqlens[:-1].long()].tolist() == [0] * 5
    # No row predicts the first token of the next sequence from the last of this one.
    assert not set(batch.rows.tolist()) & set(batch.last.tolist())
    packed = split_rows(policy(batch, "logprobs").logprobs, batch.cu_rows)
    values = critic(batch)
    for i, segment in enumerate(segments):
        alone = policy(pack([segment]), "logprobs").logprobs
        torch.testing.assert_close(packed[i], alone, rtol=1e-5, atol=1e-5)
        span = slice(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1]))
        torch.testing.assert_close(values[span], critic(pack([segment])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3-tied"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_point_03_packed_and_unpacked_give_the_same_experience(name, dtype, tolerance):
    found = []
    for budget in (1, 10_000):
        cfg = config(microbatch_tokens=budget)
        experience, _ = collected(cfg, *engines(name, dtype))
        found.append(experience)
    for field in ("old_logprobs", "k1", "k3", "values", "advantages", "returns"):
        a, b = (getattr(e, field) for e in found)
        # k3 is the one with an exponential, which leaves float32 at 88 nats.
        assert a.dtype == (torch.float64 if field == "k3" else dtype), field
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# 4 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_point_04_policy_old_and_reference_logits_share_the_sampling_temperature(temperature):
    cfg = config(sampling=SamplingConfig(max_new_tokens=8, temperature=temperature))
    policy, reference, critic = engines()
    experience, _ = collected(cfg, policy, reference, critic)
    plain = lm("llama", seed=0), lm("llama", seed=0, scale=8.5)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        span = slice(int(experience.cu_rows[i]), int(experience.cu_rows[i + 1]))
        old, ref = (unpacked_logprobs(m, prompt, response, temperature).float() for m in plain)
        torch.testing.assert_close(experience.old_logprobs[span], old, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(experience.k1[span], old - ref, rtol=1e-3, atol=2e-4)


def test_point_04_the_models_generation_config_does_not_slip_into_rollouts(tmp_path):
    """A saved top_k 1 and repetition penalty would make every sample of a prompt the same."""
    model = lm("llama", scale=1.0)
    save_folder(model, tmp_path / "policy")
    save_folder(lm("llama", seed=1), tmp_path / "rm")
    prompts_file(tmp_path / "prompts.jsonl")
    path = tmp_path / "policy" / "generation_config.json"
    path.write_text(
        json.dumps({"do_sample": True, "top_k": 1, "repetition_penalty": 9.0, "eos_token_id": 5})
    )
    cfg = ppo_config(tmp_path)
    policy = load_models(cfg, ppo.prepare(cfg)).policy
    cfg = replace(cfg, rollout_size=40, sampling=SamplingConfig(6, 1.0, 40))
    sampled = Sampler(policy, [[5, 6]], EOS, cfg).phase(0).responses
    assert len({tuple(r.tokens) for r in sampled}) > 30
    assert any(5 in r.tokens[:-1] for r in sampled)


def test_point_04_sampling_agrees_with_the_logprobs_that_are_trained():
    """Mean of exp(-logprob of what was sampled) is the vocabulary size, if both agree."""
    policy, reference, critic = engines()
    with torch.no_grad():
        policy.module.head.weight.mul_(0.1)
    cfg = config(rollout_size=600, sampling=SamplingConfig(1, 0.7, 600), microbatch_tokens=4096)
    rollouts = Sampler(policy, [[5, 6]], EOS, cfg).phase(0)
    experience, _ = collected(cfg, policy, reference, critic, rollouts=rollouts)
    mean = float((-experience.old_logprobs.double()).exp().mean())
    assert mean == pytest.approx(VOCAB, rel=0.15)


# 5 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3-tied"])
@pytest.mark.parametrize("budget", [1, 16, 4096])
def test_point_05_first_ratio_is_one_per_token(name, budget):
    cfg = config(microbatch_tokens=budget)
    policy, reference, critic = engines(name)
    experience, plan = collected(cfg, policy, reference, critic)
    for group in plan[0].microbatches:
        batch = pack([ROLLOUTS.segments()[i] for i in group])
        logprobs = policy.train_forward(batch, "logprobs", temperature=0.7).logprobs
        rows = torch.cat([torch.arange(*experience.cu_rows[i : i + 2].tolist()) for i in group])
        ratio = (logprobs - experience.old_logprobs[rows]).exp()
        assert (ratio - 1).abs().max() <= 1e-5
    means = TokenMeans(policy.device)
    found = update(policy, critic, experience, plan, cfg, means, first_epoch=True)
    assert found["ppo/first_ratio_error"] <= 1e-5


@pytest.mark.parametrize("budget", [16, 4096])
def test_point_05_the_first_forward_is_kept_and_changes_no_bit(budget):
    found, forwards = [], []
    for keep_first in (False, True):
        cfg = config(microbatch_tokens=budget)
        policy, reference, critic = engines()
        trunk = policy.module.lm.base_model
        count = []
        trunk.register_forward_hook(lambda *_, count=count: count.append(1))
        plan = ppo.epoch_plan(ROLLOUTS, 0, 0, cfg)
        reward = PayTokens()(ROLLOUTS.prompts, ROLLOUTS.responses)
        given = (policy, reference, critic, ROLLOUTS, reward, plan, 0.1, cfg)
        experience = collect_experience(*given, keep_first=keep_first)
        assert (experience.kept is not None) == keep_first
        means = TokenMeans(policy.device)
        metrics = update(policy, critic, experience, plan, cfg, means, first_epoch=True)
        assert metrics["ppo/first_ratio_error"] <= 1e-5
        found.append((experience.old_logprobs, *policy.module.parameters()))
        forwards.append(len(count))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert forwards[1] == forwards[0] - 1
    with pytest.raises(AssertionError, match="taken before"):
        experience.kept.take()


@pytest.mark.parametrize("shift", [1e-4, -1e-4])
def test_point_05_another_ratio_stops_the_run_before_the_step(shift):
    cfg = config()
    policy, reference, critic = engines()
    experience, plan = collected(cfg, policy, reference, critic)
    before = copy.deepcopy(policy.module.state_dict())
    wrong = experience.old_logprobs.clone()
    first = plan[0].microbatches[0][0]
    wrong[int(experience.cu_rows[first])] += shift  # a single token, off to either side
    means = TokenMeans(policy.device)
    with pytest.raises(RuntimeError, match="ratio of the first PPO minibatch"):
        update(
            policy,
            critic,
            replace(experience, old_logprobs=wrong),
            plan,
            cfg,
            means,
            first_epoch=True,
        )
    assert all(torch.equal(v, before[k]) for k, v in policy.module.state_dict().items())


def test_point_05_the_check_has_a_limit_for_each_precision():
    check_first_ratio(9e-6, torch.float32)
    check_first_ratio(5e-3, torch.bfloat16)
    with pytest.raises(RuntimeError):
        check_first_ratio(2e-5, torch.float32)
    with pytest.raises(RuntimeError):
        check_first_ratio(float("nan"), torch.float32)


# 6 ----------------------------------------------------------------------------------------------


def test_point_06_log_softmax_in_float32_for_a_bfloat16_model():
    policy, _, _ = engines(dtype=torch.bfloat16)
    batch = pack(ROLLOUTS.segments())
    found = policy(batch, "logprobs").logprobs
    assert found.dtype == torch.float32
    hidden = policy.module.hidden_states(batch)[batch.rows]
    logits = hidden.float() @ policy.module.head.weight.float().T
    wanted = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_point_06_dropout_is_off_in_all_four_models(tmp_path):
    for name, seed in (("policy", 0), ("rm", 1)):
        model = lm("llama", seed=seed)
        model.config.attention_dropout = 0.5
        save_folder(model, tmp_path / name)
    prompts_file(tmp_path / "prompts.jsonl")
    cfg = ppo_config(tmp_path)
    models = load_models(cfg, ppo.prepare(cfg))
    batch = pack(ROLLOUTS.segments())
    causal = (models.policy, models.reference, models.reward.engine)
    for engine, args in [*((e, (batch, "logprobs")) for e in causal), (models.critic, (batch,))]:
        assert engine.module.config.attention_dropout == 0.0
        outs = [engine.train_forward(*args) for _ in range(2)]
        first, second = (getattr(o, "logprobs", o) for o in outs)
        assert torch.equal(first, second)


# 7 ----------------------------------------------------------------------------------------------


def test_point_07_the_kl_is_subtracted_after_the_reward_was_clipped():
    cu_rows = torch.tensor([0, 2], dtype=torch.int32)
    rewards = torch.tensor([0.2, -0.2])  # clipped already, to 0.2
    batch = RewardBatch(rewards, cu_rows, rewards.sum()[None], rewards.sum()[None])
    kl = torch.tensor([3.0, 5.0])
    zeros = torch.zeros(2)
    _, returns = advantages_and_returns(
        batch, kl, 1.0, zeros, torch.zeros(1), torch.tensor([True]), 1.0, 1.0
    )
    assert returns.tolist() == pytest.approx([0.2 - 3.0 - 0.2 - 5.0, -0.2 - 5.0])


def test_point_07_k1_and_k3_are_logged_and_a_negative_mean_is_warned_of(caplog):
    cfg = config()
    experience, _ = collected(cfg, *engines())
    with caplog.at_level(logging.WARNING, logger="s2srm"):
        caplog.clear()
        found = phase_metrics(replace(experience, k1=experience.k1.abs() + 0.1))
        assert not caplog.records
        assert found["kl/k1"] > 0 and found["kl/k3"] >= 0
        per_response = found["kl/k1"] * found["response/tokens"] / 5
        assert found["kl/per_response"] == pytest.approx(per_response)
        phase_metrics(replace(experience, k1=-experience.k1.abs() - 0.1))
        assert "k1 is negative" in caplog.text
        caplog.clear()
        noise = torch.linspace(-1.0, 0.9, experience.k1.numel())
        assert phase_metrics(replace(experience, k1=noise))["kl/k1"] < 0
        assert not caplog.records, "within the noise"


# 8 ----------------------------------------------------------------------------------------------


def test_point_08_micro_batches_do_not_change_gradients():
    gradients = []
    for budget in (1, 12, 10_000):
        cfg = config(microbatch_tokens=budget, minibatch_size=5, ppo_epochs=1, entropy_coef=0.01)
        policy, reference, critic = engines(dtype=torch.float64)
        experience, plan = collected(cfg, policy, reference, critic)
        assert len(plan[0].microbatches) == {1: 5, 10_000: 1}.get(budget, len(plan[0].microbatches))
        before = {n: p.detach().clone() for n, p in _parameters(policy, critic)}
        update(policy, critic, experience, plan, cfg, TokenMeans(policy.device), first_epoch=True)
        gradients.append({n: p.detach() - before[n] for n, p in _parameters(policy, critic)})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-10, atol=1e-12)
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-4


def _parameters(policy, critic):
    for prefix, engine in (("policy.", policy), ("critic.", critic)):
        yield from ((prefix + n, p) for n, p in engine.module.named_parameters())


def test_point_08_advantages_are_whitened_over_the_tokens_of_the_phase():
    experience, _ = collected(config(), *engines())
    assert experience.advantages.mean().abs() < 1e-5
    assert experience.advantages.var(unbiased=False).item() == pytest.approx(1, rel=1e-4)
    raw, _ = collected(config(whiten_advantages=False), *engines())
    torch.testing.assert_close(raw.returns, experience.returns)
    torch.testing.assert_close(raw.advantages + raw.values, raw.returns)


# 9 ----------------------------------------------------------------------------------------------


def test_point_09_finished_responses_bootstrap_zero_and_truncated_ones_their_last_value():
    policy, reference, critic = engines()
    cfg = config(whiten_advantages=False, gamma=0.9)
    experience, _ = collected(cfg, policy, reference, critic, kl_coef=0.1)
    for i, segment in enumerate(ROLLOUTS.segments()):
        all_values = critic(pack([segment]))
        start = segment.start
        values = all_values[start - 1 : -1].tolist()
        after = 0.0 if RESPONSES[i].finished else float(all_values[-1])
        span = slice(int(experience.cu_rows[i]), int(experience.cu_rows[i + 1]))
        rewards = (experience.reward.rewards[span] - 0.1 * experience.k1[span]).tolist()
        advantage, expected = 0.0, []
        for t in reversed(range(len(rewards))):
            delta = rewards[t] + 0.9 * after - values[t]
            advantage = delta + 0.9 * cfg.lam * advantage
            expected.insert(0, advantage)
            after = values[t]
        got = experience.advantages[span].tolist()
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-4), i


# 10 ---------------------------------------------------------------------------------------------


def test_point_10_a_fresh_critic_says_zero_and_a_saved_head_is_taken_over(tmp_path):
    save_folder(lm("llama"), tmp_path / "policy")
    save_folder(lm("llama", seed=1), tmp_path / "rm")
    save_folder(lm("llama", seed=2), tmp_path / "scored", score_seed=3)
    prompts_file(tmp_path / "prompts.jsonl")
    cfg = ppo_config(tmp_path)
    batch = pack(ROLLOUTS.segments())
    fresh = load_models(cfg, ppo.prepare(cfg)).critic
    assert fresh(batch).abs().max() == 0
    cfg = replace(cfg, overwrite=True, critic=CriticConfig(path=str(tmp_path / "scored")))
    assert load_models(cfg, ppo.prepare(cfg)).critic(batch).abs().max() > 0


def test_point_10_vf_coef_and_clip_shape_the_critics_step():
    steps = {}
    for vf_coef, clip in ((0.1, 0.2), (0.2, 0.2), (0.1, 0.0)):
        cfg = config(
            vf_coef=vf_coef,
            minibatch_size=5,
            ppo_epochs=1,
            critic=CriticConfig(optim=SGD, clip=clip),
        )
        policy, reference, critic = engines(dtype=torch.float64)
        experience, plan = collected(cfg, policy, reference, critic)
        # As after earlier minibatches: values have moved from those of the rollout.
        experience = replace(experience, values=experience.values - 0.5)
        before = critic.module.score.weight.detach().clone()
        update(None, critic, experience, plan, cfg, TokenMeans(critic.device), first_epoch=True)
        steps[vf_coef, clip] = critic.module.score.weight.detach() - before
    torch.testing.assert_close(steps[0.2, 0.2], 2 * steps[0.1, 0.2])
    assert not torch.allclose(steps[0.1, 0.0], steps[0.1, 0.2])


# 11 ---------------------------------------------------------------------------------------------


def test_point_11_a_rank_that_has_run_out_runs_dummies_without_gradient(monkeypatch):
    policy, _, critic = engines()
    monkeypatch.setattr(distributed, "max_over_ranks", lambda value: 3)
    for engine in (policy, critic):
        calls = []
        forward = engine.module.forward

        def counting(batch, *args, _forward=forward, _calls=calls, **kwargs):
            _calls.append(batch.tokens.tolist())
            return _forward(batch, *args, **kwargs)

        engine.module.forward = counting
        total = run_microbatches(engine, [], lambda batch: pytest.fail("there is no micro-batch"))
        assert calls == [dummy_batch().tokens.tolist()] * 3 and float(total) == 0
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        assert gradients and all(not g.any() for g in gradients)


def test_point_11_collecting_runs_as_many_forwards_as_the_busiest_rank(monkeypatch):
    cfg = config()
    policy, reference, critic = engines()
    plan = ppo.epoch_plan(ROLLOUTS, 0, 0, cfg)
    count = sum(len(m.microbatches) for m in plan)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda value: count + 2)
    calls = []
    forward = reference.module.forward
    reference.module.forward = lambda *a, **k: calls.append(1) or forward(*a, **k)
    collected(cfg, policy, reference, critic)
    assert len(calls) == count + 2


# 12 ---------------------------------------------------------------------------------------------


def test_point_12_one_shuffle_for_all_ranks_another_for_every_epoch_and_phase():
    orders = [permutation(50, 1, phase, epoch) for phase in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    assert permutation(50, 1, 2, 2) == orders[-1]
    whole, parts = (plan_epoch(ROLLOUTS, permutation(5, 0, 0, 0), 3, 4096, n) for n in (1, 2))
    for one, two in zip(whole, parts, strict=True):
        (alone,), (left, right) = ([{*chain(*rank)} for rank in m.by_rank] for m in (one, two))
        assert alone == left | right and not left & right


def test_point_12_every_response_has_a_seed_of_its_own_whichever_rank_samples_it(monkeypatch):
    policy = causal_engine(lm("llama", scale=1.0))
    cfg = config(rollout_size=6, sampling=SamplingConfig(10, 1.0, 8))
    sampler = Sampler(policy, [[5, 6]], EOS, cfg)
    alone = sampler.phase(1)
    assert len({tuple(r.tokens) for r in alone.responses}) == 6
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(sampler_module, "gather_responses", lambda shares, mine: (shares, mine))
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares, mine = sampler.phase(1).responses
        assert sorted(chain(*shares)) == list(range(6))
        assert mine == [alone.responses[i] for i in shares[rank]]


# 13 ---------------------------------------------------------------------------------------------


def test_point_13_adamw_epsilon_and_a_learning_rate_that_reaches_zero(tmp_path):
    save_folder(lm("llama"), tmp_path / "policy")
    save_folder(lm("llama", seed=1), tmp_path / "rm")
    prompts_file(tmp_path / "prompts.jsonl")
    adamw = OptimConfig(lr=1e-3, eps=1e-5)
    cfg = ppo_config(tmp_path, optim=adamw, critic=CriticConfig(optim=adamw), critic_warmup_steps=1)
    policy_steps, critic_steps = optimiser_steps(cfg)
    assert (policy_steps, critic_steps) == (4, 8)
    inputs = ppo.prepare(cfg)
    models = load_models(cfg, inputs)
    for engine in (models.policy, models.critic):
        assert isinstance(engine.optimizer, torch.optim.AdamW)
        assert all(group["eps"] == 1e-5 for group in engine.optimizer.param_groups)
    sampler = Sampler(models.policy, inputs.prompts, EOS, cfg)
    rows = [
        ppo.run_phase(phase, models, sampler, KLController(cfg.kl), inputs, cfg)
        for phase in range(cfg.total_steps)
    ]
    # The last step has one step's worth left; the schedule is 0 right after it.
    assert models.policy.num_steps == policy_steps and models.critic.num_steps == critic_steps
    assert rows[-1]["lr/policy"] == pytest.approx(1e-3 / policy_steps)
    assert rows[-1]["lr/critic"] == pytest.approx(1e-3 / critic_steps)
    assert learning_rate(adamw, policy_steps, policy_steps) == 0.0
