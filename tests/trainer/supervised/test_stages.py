"""The supervised stages in one process, on a tiny model with a vocabulary of its own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from s2srm.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RMConfig,
    ScalarRMConfig,
    SFTConfig,
    TemplateConfig,
)
from s2srm.data.templates import Template
from s2srm.engine.torch_engine import TorchEngine
from s2srm.errors import TrainingDiverged, UserError
from s2srm.models.load import load_causal_lm, load_tokenizer, load_value_model
from s2srm.packing import Segment, pack
from s2srm.supervised import rm, scalar_rm, sft
from s2srm.supervised.loop import Unit, add_up, microbatches

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from tiny_models import VOCAB, save_tiny

ROWS = [
    {"prompt": f"w{3 + i} w{4 + i}", "chosen": f"w{20 + i} w30", "rejected": f"w{20 + i} w{40 + i}"}
    for i in range(8)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w60"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    for name in ("llama", "gemma3-tied"):
        fast.save_pretrained(save_tiny(name, folder / name))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def settings(folder: Path, out: Path, /, **changes: Any) -> dict[str, Any]:
    return {
        "output": str(out),
        "model": ModelConfig(path=str(folder / "llama")),
        "template": TemplateConfig(kind="plain", separator="w3"),
        "data": DataConfig(path=str(folder / "rows.jsonl")),
        "eval_data": DataConfig(path=str(folder / "rows.jsonl")),
        "optim": OptimConfig(lr=1e-2, schedule="constant"),
        "batch_size": 8,
        "max_steps": 40,
        **changes,
    }


def history(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_sft_learns_its_demonstrations_and_saves_them(data: Path, tmp_path: Path) -> None:
    result = sft.run(SFTConfig(**settings(data, tmp_path / "out")))
    rows = history(result.output)
    assert rows[0]["step"] == 0 and rows[0]["eval/loss"] > 3
    assert result.metrics["eval/token_accuracy"] == 1.0
    assert result.metrics["eval/loss"] < 0.1
    # The saved model is the trained one: it writes the demonstrations.
    model = AutoModelForCausalLM.from_pretrained(result.output)
    tokenizer = load_tokenizer(ModelConfig(path=str(result.output)))
    template = Template.load(result.output)
    prompt = template.encode_prompt(tokenizer, ROWS[2]["prompt"])
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0].tolist()
    assert tokenizer.decode(ids[len(prompt) :]) == "w22 w30 </s>"


def test_rm_learns_to_correct(data: Path, tmp_path: Path) -> None:
    cfg = RMConfig(**settings(data, tmp_path / "out", max_steps=80), probe_rows=8)
    result = rm.run(cfg)
    first, last = history(result.output)[0], result.metrics
    assert first["eval/correction_accuracy"] < 0.2
    assert last["eval/correction_accuracy"] == 1.0
    assert last["eval/correction_token_accuracy"] == last["eval/identity_token_accuracy"] == 1.0
    assert last["eval/pair_accuracy"] == 1.0  # chosen: +1 for each token; rejected: one diverges
    assert last["eval/copied_fraction"] == 0.0
    assert last["eval/reward_length_correlation"] == 0.0  # all responses have one length
    assert last["correction_loss"] < 0.1 and last["identity_loss"] < 0.1
    AutoModelForCausalLM.from_pretrained(result.output)


def test_identity_only_teaches_copying(data: Path, tmp_path: Path) -> None:
    rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    (tmp_path / "swapped.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + ROWS))
    changes = {"data": DataConfig(path=str(tmp_path / "swapped.jsonl")), "max_steps": 80}
    cfg = RMConfig(
        **settings(data, tmp_path / "out", batch_size=16, **changes), correction_weight=0.0
    )
    metrics = rm.run(cfg).metrics
    assert metrics["eval/copied_fraction"] > 0.7
    assert metrics["eval/correction_accuracy"] < 0.3
    assert "correction_loss" not in metrics and metrics["identity_loss"] < 0.2


def test_scalar_rm_learns_and_loads_both_ways(data: Path, tmp_path: Path) -> None:
    cfg = ScalarRMConfig(**settings(data, tmp_path / "out"), centre_coef=0.01)
    result = scalar_rm.run(cfg)
    assert result.metrics["eval/accuracy"] == result.metrics["accuracy"] == 1.0
    assert history(result.output)[0]["eval/loss"] > 2 * result.metrics["eval/loss"]
    AutoModelForCausalLM.from_pretrained(result.output)
    model = load_value_model(ModelConfig(path=str(result.output)), train=False, init="saved")
    prompt = [3 + 1, 4 + 1]
    scores = model(pack([Segment([*prompt, 21, 30, 2], 2), Segment([*prompt, 21, 41, 2], 2)]))
    assert scores[4] > scores[9]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_rm_loss_is_its_formula(reduction: Any, data: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "w5", "chosen": "w6 w7 w8 w9", "rejected": "w10"},
        {"prompt": "w5 w11", "chosen": "w12", "rejected": "w13 w14 w15"},
    ]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": DataConfig(path=str(tmp_path / "two.jsonl")), "eval_data": None}
    cfg = RMConfig(
        **settings(data, tmp_path / "out", max_steps=1, microbatch_tokens=12, **changes),
        correction_weight=1.0,
        identity_weight=0.25,
        reduction=reduction,
    )
    loss = rm.run(cfg).metrics["loss"]

    model = load_causal_lm(cfg.model, train=False)
    numerator = denominator = 0.0
    for row in rows:
        ids = {key: [int(word[1:]) for word in text.split()] for key, text in row.items()}
        for source, weight in (("rejected", 1.0), ("chosen", 0.25)):
            read = [*ids["prompt"], *ids[source], 3]
            segment = Segment([*read, *ids["chosen"], 2], len(read))
            nll = -model(pack([segment]), "logprobs").logprobs.sum()
            numerator += weight * float(nll)
            tokens = segment.num_predicted if reduction == "token_mean" else 1
            denominator += weight * tokens
    assert loss == pytest.approx(numerator / denominator, rel=1e-5)


@pytest.mark.parametrize("stage, config", [(rm, RMConfig), (scalar_rm, ScalarRMConfig)])
def test_token_budget_changes_nothing(stage: Any, config: Any, data: Path, tmp_path: Path) -> None:
    found = []
    for budget in (9, 1000):
        cfg = config(
            **settings(
                data,
                tmp_path / str(budget),
                model=ModelConfig(path=str(data / "gemma3-tied"), precision="float64"),
                optim=OptimConfig(name="sgd", lr=0.5),
                max_steps=3,
                microbatch_tokens=budget,
            )
        )
        result = stage.run(cfg)
        assert len(history(result.output)) == 4
        found.append(result.metrics)
    # float64 weights; norms and rotary angles are float32 in the model itself.
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_evaluation_every_so_many_steps(data: Path, tmp_path: Path) -> None:
    cfg = SFTConfig(**settings(data, tmp_path / "out", max_steps=5, eval_every=2))
    with_eval = [row["step"] for row in history(sft.run(cfg).output) if "eval/loss" in row]
    assert with_eval == [0, 2, 4, 5]


BAD_ROWS = {
    "not json": ('{"prompt": "w3", "chosen": \n', r"rows\.jsonl:2"),
    "no column": ('{"prompt": "w3", "chosen": "w4"}\n', "rejected"),
    "empty": ('{"prompt": "w3", "chosen": "", "rejected": "w4"}\n', r"rows\.jsonl:2"),
    "long": (
        json.dumps({"prompt": "w3 " * 90, "chosen": "w4", "rejected": "w5"}) + "\n",
        r"rows\.jsonl:2.*90.*50",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_found_before_any_weight_is_read(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, message = BAD_ROWS[name]
    good = json.dumps(ROWS[0]) + "\n"
    (tmp_path / "rows.jsonl").write_text(good + line + good)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    rows = DataConfig(path=str(tmp_path / "rows.jsonl"), max_prompt_tokens=50)
    with pytest.raises(UserError, match=message) as caught:
        rm.run(RMConfig(**settings(data, tmp_path / "out", data=rows)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


STAGES = [(sft, SFTConfig), (rm, RMConfig), (scalar_rm, ScalarRMConfig)]


@pytest.mark.parametrize("stage, config", STAGES)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_that_diverges_ends_in_one_line_without_a_model(
    steps: int, stage: Any, config: Any, data: Path, tmp_path: Path
) -> None:
    changes = {"optim": OptimConfig(lr=1e30), "max_steps": steps, "eval_data": None}
    with pytest.raises(TrainingDiverged) as caught:
        stage.run(config(**settings(data, tmp_path / "out", **changes)))
    message = str(caught.value)
    assert f"step {1 if steps == 1 else 2}: the " in message and "lower optim.lr (1e+30)" in message
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert None in history(tmp_path / "out")[-1].values()
    assert history(tmp_path / "out")[0]["loss"] > 0, "the steps before it stay"


def test_a_gradient_that_overflows_under_a_finite_loss(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = TorchEngine.backward

    def overflow(self: TorchEngine, loss: torch.Tensor, last: bool = True) -> None:
        backward(self, loss, last)
        for parameter in self.module.parameters():
            parameter.grad = torch.full_like(parameter, math.inf)

    monkeypatch.setattr(TorchEngine, "backward", overflow)
    with pytest.raises(TrainingDiverged, match="SFT step 1: the norm of the gradient is"):
        sft.run(SFTConfig(**settings(data, tmp_path / "out", eval_data=None)))
    assert history(tmp_path / "out")[-1]["grad_norm"] is None


def test_held_out_rows_that_give_no_finite_loss(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = sft.SFTTask.metrics
    monkeypatch.setattr(
        sft.SFTTask, "metrics", lambda self, sums: dict.fromkeys(metrics(self, sums), math.nan)
    )
    with pytest.raises(TrainingDiverged, match="SFT step 0: the loss on eval_data is nan"):
        sft.run(SFTConfig(**settings(data, tmp_path / "out")))


@pytest.mark.parametrize("stage, config", STAGES)
def test_stages_run_from_python_check_their_values(
    stage: Any, config: Any, data: Path, tmp_path: Path
) -> None:
    for changes, key in (
        ({"batch_size": 0}, "batch_size"),
        ({"optim": OptimConfig(lr=-1.0)}, r"optim\.lr"),
        ({"output": ""}, "output is missing"),
    ):
        with pytest.raises(UserError, match=key):
            stage.run(config(**settings(data, tmp_path / "out") | changes))


def test_home_is_expanded_for_runs_from_python_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(data / "llama")
    (tmp_path / "rows.jsonl").symlink_to(data / "rows.jsonl")
    rows = DataConfig(path="~/rows.jsonl")
    changes = {"model": ModelConfig(path="~/model"), "data": rows, "eval_data": rows}
    result = sft.run(SFTConfig(**settings(data, Path("~/run"), max_steps=1, **changes)))
    assert result.output == tmp_path / "run" and (tmp_path / "run/model.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_weights_of_zero_are_refused(data: Path, tmp_path: Path) -> None:
    for correction, identity in ((0.0, 0.0), (-1.0, 2.0)):
        cfg = RMConfig(
            **settings(data, tmp_path / "out"),
            correction_weight=correction,
            identity_weight=identity,
        )
        with pytest.raises(UserError, match=r"correction_weight.*(at least 0|nothing to learn)"):
            rm.run(cfg)


def test_units_stay_together_and_kinds_follow_the_rows() -> None:
    units = [
        Unit((Segment([1, 2, 3], 1), Segment([4, 5], 1)), 7),
        Unit((Segment([6, 7, 8, 9, 10, 11], 4),), 8),
    ]
    found, _ = microbatches(units, 6, torch.device("cpu"))
    assert [m.batch.tokens.tolist() for m in found] == [[6, 7, 8, 9, 10, 11], [1, 2, 3, 4, 5]]
    assert [m.row_kinds.tolist() for m in found] == [[8, 8], [7, 7, 7]]
    (together,), _ = microbatches(units, 100, torch.device("cpu"))
    assert together.row_kinds.tolist() == [7, 7, 7, 8, 8]
    assert microbatches([], 100, torch.device("cpu")) == ([], 1.0)


def test_ranks_get_units_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [Unit((Segment([i] * length, 1),)) for i, length in enumerate([9, 8, 3, 2, 2])]
    monkeypatch.setattr("s2srm.distributed.world_size", lambda: 2)
    shares: list[list[int]] = []
    for rank in range(2):
        monkeypatch.setattr("s2srm.distributed.rank", lambda rank=rank: rank)
        (mine,), imbalance = microbatches(units, 100, torch.device("cpu"))
        assert imbalance == 1.0
        shares.append(mine.batch.tokens.unique().tolist())
    assert shares == [[1, 3, 4], [0, 2]]


def test_add_up_takes_names_that_not_every_part_has() -> None:
    parts = [{"a": 1.0, "b": torch.tensor(2)}, {"a": torch.tensor(0.5)}]
    assert add_up(parts, torch.device("cpu")) == {"a": 1.5, "b": 2.0}
