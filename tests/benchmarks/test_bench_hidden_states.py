"""Problems from a real model, and what skipping would leave of their backward."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import live_fraction
from benchmarks.hidden_states import model_problem, model_shape
from benchmarks.live_fraction import live_fractions
from benchmarks.problems import IGNORE_INDEX, normal_problem
from benchmarks.shapes import Shape

TEXT = "the cat sat on the mat and the dog sat on the cat " * 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of one layer with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = {word: index for index, word in enumerate(["<unk>", *sorted(set(TEXT.split()))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(words),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "text.jsonl").write_text(
        json.dumps({"id": 3, "prompt": TEXT[:20], "rest": TEXT[20:]})
    )
    return folder


def test_hidden_states_of_a_model(model, cpu):
    data = str(model / "text.jsonl")
    shape = model_shape(str(model), 100)
    problem = model_problem(str(model), data, 100, torch.float32, cpu, 0.4)
    assert (shape.num_rows, shape.hidden_size) == (100, 16)
    assert problem.shape == shape
    assert problem.hidden.shape == (100, 16)
    assert problem.kind == f"hidden states of {model.name}"
    assert 0 < problem.num_live < 100
    # Each row's target is the token that came next.
    everyone = model_problem(str(model), data, 100, torch.float32, cpu, 0.0)
    words = TEXT.split()
    ids = {word: everyone.target[i].item() for i, word in enumerate(words[1:101])}
    assert [ids[word] for word in words[1:101]] == everyone.target.tolist()
    assert len(set(ids.values())) == len(ids)
    live = problem.target != IGNORE_INDEX
    assert torch.equal(problem.target[live], everyone.target[live])
    assert not torch.equal(problem.hidden[3], problem.hidden[4])


def test_a_model_with_other_logits_is_refused(model, cpu, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        made = forward(self, *args, **kwargs)
        made.logits = made.logits * 0.5
        return made

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ValueError, match="its logits are not"):
        model_problem(str(model), str(model / "text.jsonl"), 50, torch.float32, cpu, 0.0)


def test_too_short_a_text_is_named(model, cpu):
    with pytest.raises(ValueError, match="needs 100001"):
        model_problem(str(model), str(model / "text.jsonl"), 100000, torch.float32, cpu, 0.0)
    with pytest.raises(ValueError, match="no/model"):
        model_shape("no/model", 3)


def test_near_uniform_rows_keep_every_block(cpu):
    problem = normal_problem(Shape("test", 300, 8, 1100), torch.float32, cpu)
    (found,) = live_fractions(problem, [0.01])
    assert found.fraction == 1
    assert found.mean_mass == 0


def test_the_live_fraction_of_known_blocks(cpu):
    """All mass of rows 0-127 in tile 0, of the rest in tile 2: two of ten blocks stay."""
    problem = normal_problem(Shape("test", 256, 8, 1280), torch.float32, cpu)
    row = torch.arange(256)
    problem.target = torch.where(row < 128, row % 256, 512 + row % 256)
    with torch.no_grad():
        problem.weight.zero_()
        problem.weight[:256, 0] = 1
        problem.weight[512:768, 1] = 1
        problem.hidden.zero_()
        problem.hidden[:128, 0] = 30
        problem.hidden[128:, 1] = 30
    (found,) = live_fractions(problem, [1e-6])
    assert found.fraction == pytest.approx(0.2)
    assert 0 < found.mean_mass <= 1e-6


def test_the_command(model, capsys):
    data = str(model / "text.jsonl")
    arguments = ["--model", str(model), "--data", data, "--rows", "64", "--device", "cpu"]
    assert live_fraction.main([*arguments, "--skip-mass", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(f"| hidden states of {model.name} | 0.01 | 1.000 | 4.00 |")
    with pytest.raises(SystemExit):
        live_fraction.main([*arguments, "--skip-mass", "0"])
    assert "--skip-mass" in capsys.readouterr().err
