"""The step beside TRL's: a problem with the lengths that it says, and no time without like work."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bench_ppo_step
from benchmarks.bench_ppo_step import differences, time_table
from benchmarks.ppo_problem import PAD, SHORTEST, ForcedLengths, make_problem, minibatches
from benchmarks.ppo_sides import PHASES, OurSide, Seconds, Step, Work

EOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def problem_of(folder, kind):
    return make_problem(folder, kind, 32, 8, 2, 2, seed=1)


def test_mixed_lengths_are_spread_and_equal_ones_are_their_mean(folder):
    mixed = make_problem(folder, "mixed", 256, 400, 2, 1, seed=0)
    for lengths in ([len(p) for p in mixed.prompts], mixed.response_lengths):
        assert min(lengths) >= SHORTEST and max(lengths) <= 256
        assert sum(lengths) / 400 == pytest.approx(71.6, rel=0.15)
        # Log-uniform: half of them below the geometric mean of the ends.
        assert sum(n < (SHORTEST * 256) ** 0.5 for n in lengths) == pytest.approx(200, abs=40)
    equal = make_problem(folder, "equal", 256, 4, 2, 1, seed=0)
    assert {len(p) for p in equal.prompts} == set(equal.response_lengths) == {72}
    assert all(PAD not in p and EOS not in p for p in mixed.prompts)


def test_a_response_ends_at_its_length_however_its_row_is_padded(folder):
    problem = problem_of(folder, "mixed")
    rows = [[PAD] * 3 + problem.prompts[1], problem.prompts[0]]
    width = max(map(len, rows))
    rows = [[EOS] * (width - len(row)) + row for row in rows]
    processor = ForcedLengths(problem)
    ends = [0, 0]
    for step in range(1, max(problem.response_lengths[:2]) + 1):
        scores = processor(torch.tensor(rows), torch.zeros(2, 60))
        assert scores[:, PAD].eq(-torch.inf).all()
        for i, row in enumerate(rows):
            only_eos = scores[i].isfinite().nonzero().flatten().tolist() == [EOS]
            ends[i] = ends[i] or step * only_eos
            assert only_eos or scores[i, EOS] == -torch.inf
            row.append(7)
    assert ends == [problem.response_lengths[1], problem.response_lengths[0]]
    foreign = ForcedLengths(problem)(torch.full((1, 9), 5), torch.zeros(1, 60))
    assert foreign.eq(0).all(), "a row of another prompt stays as it is"


def test_our_side_does_the_problems_work(folder):
    problem = problem_of(folder, "mixed")
    step = OurSide(problem).step(0)
    total = [len(p) + n for p, n in zip(problem.prompts, problem.response_lengths, strict=True)]
    tokens = [
        sum(total[i] for i in group) for epoch in (0, 1) for group in minibatches(problem, 0, epoch)
    ]
    assert step.work == Work(sum(problem.response_lengths), tokens, True)
    assert list(step.seconds) == list(PHASES)
    parts = sum(step.seconds[phase].wall for phase in PHASES[:-1])
    assert parts == pytest.approx(step.seconds["total"].wall)


def test_other_work_is_named(folder):
    problem = problem_of(folder, "equal")
    wanted = sum(problem.response_lengths)
    none: dict[str, Seconds] = {}
    same = Step(none, Work(wanted, [3, 4], True))
    assert differences(problem, {"s2srm": same, "trl": same}) == []
    found = differences(
        problem, {"s2srm": same, "trl": Step(none, Work(wanted - 1, [4, 3], False))}
    )
    assert found == [
        f"trl sampled {wanted - 1} tokens, not {wanted}",
        "trl reports numbers that are not finite",
        "minibatches of [3, 4] tokens in s2srm, [4, 3] in TRL",
    ]


def test_the_table_has_the_median_of_each_rounds_ratio():
    def step(seconds):
        return Step(dict.fromkeys(PHASES, Seconds(seconds, seconds / 2)), Work(0, [], True))

    rounds = [{"s2srm": step(a), "trl": step(b)} for a, b in ((1, 2), (2, 3), (4, 4))]
    assert time_table(rounds).splitlines()[-1] == (
        "| total | 2.00 | 3.00 | 1.50 (1.00-2.00) | 1.00 | 1.50 | 1.50 (1.00-2.00) |"
    )


def test_without_trl_one_line_says_how_to_install_it(monkeypatch, capsys, folder):
    monkeypatch.setattr(bench_ppo_step.util, "find_spec", lambda name: None)
    assert bench_ppo_step.main(["--model", folder]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "pip install -e '.[bench]'" in lines[0]
