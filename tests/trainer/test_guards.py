"""Numbers that are not finite end a run with the place, the number and the remedy."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from s2srm import distributed, evidence
from s2srm.engine import StepInfo
from s2srm.errors import TrainingDiverged, UserError
from s2srm.evidence import Seen
from s2srm.guards import (
    Place,
    Rows,
    check_gradient,
    check_loss,
    check_rows,
    check_step,
    check_trained,
)
from s2srm.packing import Packed, Segment, pack

sys.path.insert(0, str(Path(__file__).parent / "ppo"))
from ppo_tiny import causal_engine, lm, value_engine

PLACE = Place("rm step 3", 3, "lower optim.lr (0.1)")


def batch(first: int = 3) -> Packed:
    return pack([Segment([first, 4, 5], 1), Segment([6, 7], 1)])


def seen(*losses: float) -> list[Seen]:
    return [Seen(batch(10 + i), {"loss": torch.tensor(x)}) for i, x in enumerate(losses)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_is_named_with_its_place_and_the_remedy(value: float) -> None:
    check_loss(seen(1e30), 1e30, PLACE)
    with pytest.raises(TrainingDiverged) as caught:
        check_loss(seen(value), value, PLACE)
    line = f"rm step 3: the loss is {value}; lower optim.lr (0.1); the model is not saved"
    assert str(caught.value) == line
    assert isinstance(caught.value, UserError)
    assert caught.value.step == 3
    assert caught.value.metrics == pytest.approx({"loss": value}, nan_ok=True)


def test_the_rank_is_named_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [None, mine, None])
    with pytest.raises(TrainingDiverged, match="the loss is nan on rank 1;"):
        check_loss(seen(math.nan), math.nan, PLACE)
    with pytest.raises(TrainingDiverged, match="the loss is nan on rank 1, micro-batch 2 of 3;"):
        check_loss(seen(1.0, math.nan, 2.0), math.nan, PLACE)


def test_the_batch_is_kept_and_named(tmp_path: Path) -> None:
    place = replace(PLACE, run=tmp_path)
    with pytest.raises(TrainingDiverged, match="in micro-batch 2 of 3") as caught:
        check_loss(seen(1.0, math.nan, 2.0), math.nan, place)
    path = tmp_path / "diverged" / "step-00000003-rank-0.safetensors"
    assert f"; its batch is in {path};" in str(caught.value)
    kept = load_file(path)
    assert set(kept) == {f"2/{f.name}" for f in fields(Packed)}
    for name, tensor in vars(batch(11)).items():
        assert torch.equal(kept[f"2/{name}"], tensor), name
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["microbatches"] == [
        {"number": 2, "sequences": 2, "sequences_kept": 2, "loss": "nan"}
    ]
    facts = ("where", "cause", "step", "rank", "ranks", "num_microbatches")
    assert [about[fact] for fact in facts] == ["rm step 3", "the loss is nan", 3, 0, 1, 3]


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MAX_TOKENS", 6)
    place = replace(PLACE, run=tmp_path)
    with pytest.raises(TrainingDiverged, match="batch is in"):
        check_gradient(StepInfo(math.nan, 0.1), place, seen(1.0, 2.0, 3.0))
    (path,) = (tmp_path / "diverged").glob("*.safetensors")
    kept = load_file(path)
    assert [kept[f"{i}/tokens"].tolist() for i in (1,)] == [[10, 4, 5, 6, 7]]
    assert not any(name.startswith(("2/", "3/")) for name in kept)
    long = Seen(pack([Segment(range(1, 30), 1)]), {"loss": torch.tensor(math.nan)})
    with pytest.raises(TrainingDiverged):
        check_loss([long], math.nan, place)
    assert load_file(path)["1/tokens"].numel() == 29, "one sequence is always kept"


def test_a_batch_that_cannot_be_saved_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "diverged").write_text("in the way")
    with pytest.raises(TrainingDiverged, match="; its batch could not be saved: "):
        check_loss(seen(math.nan), math.nan, replace(PLACE, run=tmp_path))


def test_the_first_number_of_a_step_that_is_not_finite_is_named() -> None:
    names = {"loss": "ppo/policy_loss", "ratio": "ppo/ratio_max", "KL": "ppo/update_kl"}

    def numbers(*values: float) -> Seen:
        return Seen(batch(), dict(zip(names, map(torch.tensor, values), strict=True)))

    device = torch.device("cpu")
    check_step([], names, PLACE, device)
    check_step([numbers(1e38, 3.0, 0.0), numbers(1e38, 1.0, 0.0)], names, PLACE, device)
    for values, what in (
        ((math.nan, math.inf, 1.0), "loss is nan"),
        ((1.0, math.inf, math.inf), "ratio is inf"),
        ((1.0, 2.0, math.inf), "KL is inf"),
    ):
        with pytest.raises(TrainingDiverged, match=f"the {what} in micro-batch 2 of 2;") as caught:
            check_step([numbers(1.0, 1.0, 0.0), numbers(*values)], names, PLACE, device)
        assert set(caught.value.metrics) == {names[what.split()[0]]}


def test_the_norm_of_the_gradient() -> None:
    check_gradient(StepInfo(1e30, 0.1), PLACE)
    for value in (math.nan, math.inf):
        with pytest.raises(TrainingDiverged, match="norm of the gradient is") as caught:
            check_gradient(StepInfo(value, 0.1), PLACE)
        assert set(caught.value.metrics) == {"grad_norm"}


def test_the_first_kind_of_rows_that_is_not_finite_is_named(tmp_path: Path) -> None:
    fine, none = torch.tensor([1.0, -1e30]), torch.empty(0)
    wrong = torch.tensor([0.0, math.inf, math.nan])
    other = Place("critic", 3, "look at the critic", run=tmp_path)
    check_rows([Rows("reward", fine, "r", PLACE), Rows("value", none, "v", PLACE)])
    responses = [Segment([5, 6], 1), Segment([7, 8, 9], 1)]
    offsets = torch.tensor([0, 1, 3])
    with pytest.raises(TrainingDiverged, match=r"^critic: the value is inf; look at") as caught:
        columns = [Rows("reward", fine, "r", PLACE), Rows("value", wrong, "v", other, offsets)]
        check_rows(columns, responses)
    assert caught.value.metrics == {"v": math.inf}
    (path,) = (tmp_path / "diverged").glob("*.safetensors")
    kept = load_file(path)
    assert kept["1/tokens"].tolist() == [7, 8, 9]
    assert kept["1/values"].isfinite().logical_not().all()


@pytest.mark.parametrize("make", [causal_engine, value_engine])
def test_a_model_is_looked_at_before_it_is_saved(make) -> None:
    engine = make(lm("llama"))
    check_trained(engine, PLACE)
    weight = next(engine.module.parameters())
    with torch.no_grad():
        weight[-1, -1] = math.nan  # A row that the two tokens do not meet.
    with pytest.raises(TrainingDiverged, match="left weights that are not finite"):
        check_trained(engine, PLACE)


def test_finite_weights_that_give_no_finite_output() -> None:
    model = lm("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e15)
    with pytest.raises(TrainingDiverged, match="output of the trained model is not finite"):
        check_trained(causal_engine(model), PLACE)
