"""A folder of runs that every test of the page gets."""

from __future__ import annotations

import json

import pytest
import yaml
from page_rows import FEEDBACK, INTERVAL, policy

from s2srm.config import ModelConfig, PPOConfig, RewardConfig, RMConfig
from s2srm.runs import config_to_dict


@pytest.fixture
def demo(tmp_path):
    """A folder as the demo leaves it: an RM run, a PPO run and an evaluation."""
    folder = tmp_path / "demo"
    rm = RMConfig(output=str(folder / "rm"))
    ppo = PPOConfig(
        output=str(folder / "ppo"),
        reward=RewardConfig(model=ModelConfig(path=str(folder / "rm"))),
    )
    for name, cfg, metric in (("rm", rm, "loss"), ("ppo", ppo, "reward/sum_mean")):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config_to_dict(cfg)))
        rows = [{"step": i, "time": 10.0 * i, metric: 1.0 / i, "odd": None} for i in (1, 2, 3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "metrics.jsonl").write_text(lines + '{"step": 4, "lo')
    groups = [
        {
            "split": split,
            "temperature": temperature,
            "num_prompts": 16,
            "policies": {
                "sft": policy(score=INTERVAL),
                "ppo": policy(score=INTERVAL, win_rate={"sft": INTERVAL}),
            },
        }
        for split in ("test", "ood")
        for temperature in (0.0, 1.0)
    ]
    (folder / "eval").mkdir()
    result = {"world": "safety", "judge": "the judge", "against": ["sft"], "groups": groups}
    (folder / "eval" / "eval.json").write_text(json.dumps(result))
    (folder / "eval" / "feedback.jsonl").write_text((json.dumps(FEEDBACK) + "\n") * 11)
    return folder
