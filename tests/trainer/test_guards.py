"""Numbers that are not finite end a run with the place, the number and the remedy."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from s2srm import distributed
from s2srm.engine import StepInfo
from s2srm.errors import TrainingDiverged, UserError
from s2srm.guards import Place, Rows, check_gradient, check_loss, check_rows, check_trained

sys.path.insert(0, str(Path(__file__).parent / "ppo"))
from ppo_tiny import causal_engine, lm, value_engine

PLACE = Place("rm step 3", 3, "lower optim.lr (0.1)")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_is_named_with_its_place_and_the_remedy(value: float) -> None:
    check_loss(torch.tensor(1e30), 1e30, PLACE)
    with pytest.raises(TrainingDiverged) as caught:
        check_loss(torch.tensor(value), value, PLACE)
    line = f"rm step 3: the loss is {value}; lower optim.lr (0.1); the model is not saved"
    assert str(caught.value) == line
    assert isinstance(caught.value, UserError)
    assert caught.value.step == 3
    assert caught.value.metrics == pytest.approx({"loss": value}, nan_ok=True)


def test_the_rank_is_named_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda flag: [False, flag, False])
    with pytest.raises(TrainingDiverged, match="the loss is nan on rank 1;"):
        check_loss(torch.tensor(math.nan), math.nan, PLACE)


def test_the_norm_of_the_gradient() -> None:
    check_gradient(StepInfo(1e30, 0.1), PLACE)
    for value in (math.nan, math.inf):
        with pytest.raises(TrainingDiverged, match="norm of the gradient is") as caught:
            check_gradient(StepInfo(value, 0.1), PLACE)
        assert set(caught.value.metrics) == {"grad_norm"}


def test_the_first_kind_of_rows_that_is_not_finite_is_named() -> None:
    fine, none = torch.tensor([1.0, -1e30]), torch.empty(0)
    wrong = torch.tensor([0.0, math.inf, math.nan])
    other = Place("critic", 3, "look at the critic")
    check_rows([Rows("reward", fine, "r", PLACE), Rows("value", none, "v", PLACE)])
    with pytest.raises(TrainingDiverged, match=r"^critic: the value is inf; look at") as caught:
        check_rows([Rows("reward", fine, "r", PLACE), Rows("value", wrong, "v", other)])
    assert caught.value.metrics == {"v": math.inf}


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
