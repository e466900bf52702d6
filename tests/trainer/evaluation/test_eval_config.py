"""Settings of an evaluation that make no sense are refused before anything is loaded."""

from __future__ import annotations

import dataclasses

import pytest

from s2srm.config import DataConfig, ModelConfig
from s2srm.errors import UserError
from s2srm.evaluation.config import EvalConfig, validate_eval

GOOD = EvalConfig(output="o", policies={"a": "x/a", "b": "x/b"}, world="safety")


def test_a_good_one_passes():
    validate_eval(GOOD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": ""}, "output is missing"),
        ({"policies": {}}, "policies is missing"),
        ({"policies": {"a": "/no/model"}}, r"policies\.a: /no/model does not exist"),
        ({"against": ["c"]}, "'c' is not among the policies"),
        ({"world": None}, "give either world or data"),
        ({"data": DataConfig(path="x/y")}, "give either world or data"),
        ({"ood_data": DataConfig(path="x/y")}, "ood_data"),
        ({"reward_model": ModelConfig(path="/no/rm")}, r"reward_model\.path"),
        ({"temperatures": []}, "temperatures is empty"),
        ({"temperatures": [-1.0]}, r"temperatures\[0\] must be at least 0"),
        ({"num_prompts": 1}, "num_prompts"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_resamples": 10}, "num_resamples"),
    ],
)
def test_bad_value(changes, message):
    with pytest.raises(UserError, match=message):
        validate_eval(dataclasses.replace(GOOD, **changes))
