import pytest
import torch

from benchmarks.problems import IGNORE_INDEX, normal_problem, prompt_rows, sequence_problem
from benchmarks.shapes import SequenceShape, Shape

SHAPE = Shape("test", 700, 8, 50)


@pytest.mark.parametrize("num_rows", [1, 3, 256, 2048, 5000])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.9])
def test_prompts_are_runs_at_the_start_of_sequences(num_rows, ignored):
    mask = prompt_rows(num_rows, ignored, seed=3)
    assert mask.shape == (num_rows,)
    length = max(1, min(512, num_rows // 4))
    for sequence in mask.split(length):
        # Once a response has begun no prompt row follows.
        assert (sequence.int().diff() <= 0).all()
    if num_rows >= 256:
        assert abs(mask.float().mean().item() - ignored) < 0.03
        assert ignored == 0 or len({int(part.sum()) for part in mask.split(length)}) > 1


@pytest.mark.parametrize("ignored", [-0.1, 1.0])
def test_a_bad_fraction_is_named(ignored):
    with pytest.raises(ValueError, match=str(ignored)):
        prompt_rows(10, ignored, seed=0)


def test_same_seed_same_tensors(cpu):
    one, other = (normal_problem(SHAPE, torch.float32, cpu, 0.4, seed=1) for _ in range(2))
    third = normal_problem(SHAPE, torch.float32, cpu, 0.4, seed=2)
    for name in ("hidden", "weight", "target", "old_logprobs", "advantages"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert not torch.equal(getattr(one, name), getattr(third, name)), name
    assert torch.equal(one.upstream("entropy"), other.upstream("entropy"))
    assert not torch.equal(one.upstream("entropy"), one.upstream("logprobs"))
    assert one.upstream("loss").dim() == 0


def test_ratios_lie_on_both_sides_of_the_clip_and_never_at_its_ends(cpu):
    problem = normal_problem(SHAPE, torch.float32, cpu, 0.4)
    logits = problem.hidden.double() @ problem.weight.double().t()
    rows = torch.log_softmax(logits, -1).gather(1, problem.safe_target[:, None]).squeeze(1)
    log_ratio = (rows - problem.old_logprobs)[problem.live]
    ends = torch.tensor([0.8, 1.2]).log()
    assert (log_ratio[:, None] - ends).abs().min() > 0.049
    ratio = log_ratio.exp()
    assert (ratio < 0.8).any()
    assert (ratio > 1.2).any()
    assert ((ratio > 0.8) & (ratio < 1.2)).any()
    assert (problem.advantages > 0).any()
    assert (problem.advantages < 0).any()


def test_ignored_rows(cpu):
    problem = normal_problem(SHAPE, torch.float32, cpu, 0.4)
    assert problem.num_live == int((problem.target != IGNORE_INDEX).sum()) < 700
    scattered = problem.scatter(torch.ones(problem.num_live))
    assert torch.equal(scattered, problem.live_mask)
    assert problem.safe_target.min() >= 0


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (1000, 7), (4096, 4096), (10000, 1)])
def test_sequences_cover_all_tokens(tokens, sequences, cpu):
    problem = sequence_problem(SequenceShape("s", tokens, sequences), cpu)
    lengths = problem.cu_seqlens.diff()
    assert problem.cu_seqlens[0] == 0
    assert problem.cu_seqlens[-1] == tokens
    assert len(lengths) == sequences
    assert (lengths >= 0).all()
    assert sequences != 7 or len(set(lengths.tolist())) > 1
    if tokens > 100:
        assert 0.05 < (problem.response != problem.argmax).float().mean() < 0.2
