"""PPO on one rank and on two ZeRO-3 ranks: the same rollouts, rewards, gradients and weights.

One launch of torchrun for all cases (see ppo_worker.py): untied head; tied head with an adaptive KL
coefficient; tied Gemma 3 with sliding windows where every other response is one token long;
scalar reward with a critic warm-up; aligned reward, whose corrections are generated under ZeRO-3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import ppo_worker
from ppo_worker import CASES

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
Results = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ppo_parity")


@pytest.fixture(scope="module")
def launched(root: Path) -> tuple[int, str]:
    """Exit code and output of two ranks, which write into two/, beside one rank, into one/."""
    one, two = root / "one", root / "two"
    one.mkdir()
    two.mkdir()
    ppo_worker.make_root(root)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch = subprocess.Popen(
        [*command, ppo_worker.__file__, str(root), str(two)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    try:
        ppo_worker.main(root, one)
        output, _ = launch.communicate(timeout=240)
    finally:
        # Not kill: torchrun must end its ranks too.
        launch.terminate()
        launch.wait(timeout=60)
    return launch.returncode, output


@pytest.fixture(scope="module")
def results(root: Path, launched: tuple[int, str]) -> tuple[Results, Results]:
    """What one rank and two ranks computed; how the two ended is a test of its own."""
    assert (root / "two" / "results.pt").exists(), launched[1][-4000:]
    # weights_only False: our own results of a moment ago.
    one, two = (
        torch.load(root / name / "results.pt", weights_only=False) for name in ("one", "two")
    )
    return one, two


def test_both_ranks_run_to_the_end(launched: tuple[int, str]) -> None:
    code, output = launched
    assert code == 0, output[-4000:]


@pytest.mark.parametrize("case", CASES)
def test_same_rollouts_rewards_and_advantages(case: str, results: Any) -> None:
    one, two = (r[case] for r in results)
    assert one["scale"] == pytest.approx(two["scale"], rel=1e-6)
    for mine, theirs in zip(one["phases"], two["phases"], strict=True):
        assert sorted(mine) == sorted(theirs) == list(range(7))
        for number, response in mine.items():
            for name, value in response.items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(
                        value, theirs[number][name], rtol=TOLERANCE, atol=TOLERANCE
                    )
                else:
                    assert value == theirs[number][name], (number, name)


@pytest.mark.parametrize("case", CASES)
def test_same_losses_and_metrics_on_every_rank_count(case: str, results: Any) -> None:
    one, two = (r[case] for r in results)
    assert one["coef"] == pytest.approx(two["coef"], rel=TOLERANCE)
    for mine, theirs in zip(one["metrics"], two["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        apart = ("time/", "balance/")
        for name in mine.keys() - {n for n in mine if n.startswith(apart)}:
            # A KL is a small difference of logprobs, each of them exact to float32 only.
            close = 1e-6 if name.startswith("kl/") else 1e-7
            assert mine[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=close), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["policy", "critic"])
def test_same_gradients_and_weights_under_sgd(case: str, what: str, results: Any) -> None:
    one, two = (r[case] for r in results)
    for mine, theirs in ((one["gradients"][what], two["gradients"][what]), (one[what], two[what])):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            error = (tensor - theirs[name]).abs().max() / tensor.abs().max().clamp_min(1e-6)
            assert error <= TOLERANCE, (name, float(error))
    assert any(g.abs().max() > 1e-3 for g in one["gradients"][what].values())


def test_the_cases_are_what_they_say(results: Any) -> None:
    two = results[1]
    short = [r["tokens"] for p in two["gemma3_unequal"]["phases"] for n, r in p.items() if n % 2]
    long = [
        r["tokens"] for p in two["gemma3_unequal"]["phases"] for n, r in p.items() if n % 2 == 0
    ]
    assert all(len(tokens) == 1 for tokens in short)
    assert sum(map(len, long)) > 5 * len(long)
    assert two["tied_adaptive"]["coef"] != 0.2
    # The critic's warm-up leaves the policy alone for a phase.
    scalar = two["scalar"]["metrics"]
    assert "lr/policy" not in scalar[0] and "lr/policy" in scalar[1]
    assert all(m["ppo/first_ratio_error"] <= 1e-5 for m in two["untied"]["metrics"])


def test_no_rank_waits_long_for_the_other(results: Any) -> None:
    for mine, theirs in zip(*(r["untied"]["metrics"] for r in results), strict=True):
        assert (mine["balance/tokens_max_over_mean"], mine["balance/idle_fraction"]) == (1.0, 0.0)
        assert 1.0 < theirs["balance/tokens_max_over_mean"] <= 2.0, "the last minibatch has one"
        assert 0.0 < theirs["balance/idle_fraction"] < 0.3


def test_tensors_of_unequal_length_are_gathered_whole(results: Any) -> None:
    found = results[1]["gathered"]
    assert [tensor.tolist() for tensor in found] == [[0, 1, 2]] * 3
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.float64, torch.int64]


def test_the_stage_on_two_ranks_saves_what_one_rank_saves(root: Path, results: Any) -> None:
    for folder in ("stage", "stage/critic"):
        one, two = (AutoModelForCausalLM.from_pretrained(root / n / folder) for n in ("one", "two"))
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    best = [json.loads((root / n / "stage/best/best.json").read_text()) for n in ("one", "two")]
    assert best[0] == best[1] | {"value": pytest.approx(best[1]["value"], rel=1e-5)}
    assert AutoModelForCausalLM.from_pretrained(root / "two/stage/best")
    rows = [
        json.loads((root / n / "stage/metrics.jsonl").read_text().splitlines()[-1])
        for n in ("one", "two")
    ]
    evaluated = {name for name in rows[0] if name.startswith("eval/")}
    assert len(evaluated) == 6
    for name in evaluated:
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-6), name
    texts = [
        (root / n / "stage" / "samples.jsonl").read_text().splitlines() for n in ("one", "two")
    ]
    rows = [[json.loads(line) for line in lines] for lines in texts]
    assert len(rows[0]) == len(rows[1]) == 1
    for mine, theirs in zip(*rows, strict=True):
        for name in ("prompt", "response", "tokens", "rm_tokens", "correction"):
            assert mine[name] == theirs[name] is not None


def test_policies_are_compared_as_on_one_rank(root: Path, results: Any) -> None:
    one, two = (root / name / "eval" for name in ("one", "two"))
    for name in ("responses.jsonl", "feedback.jsonl"):
        mine, theirs = ((out / name).read_text().splitlines() for out in (one, two))
        assert len(mine) == len(theirs) == (28 if name == "responses.jsonl" else 3)
        for a, b in zip(map(json.loads, mine), map(json.loads, theirs), strict=True):
            assert a == b | {k: pytest.approx(v) for k, v in b.items() if isinstance(v, float)}
    mine, theirs = (json.loads((out / "eval.json").read_text()) for out in (one, two))
    for a, b in zip(mine["groups"], theirs["groups"], strict=True):
        assert a["policies"].keys() == b["policies"].keys() == {"a", "b"}
        for name, policy in a["policies"].items():
            assert policy["score"] == pytest.approx(b["policies"][name]["score"])
