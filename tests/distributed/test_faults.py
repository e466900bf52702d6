"""What befalls one of two ranks ends both, in one line that names rank, phase and cause.

Every kind of fault at random moments is in tests/soak.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer" / "checkpoint"))
from runs_tiny import make_inputs, rows_without_times, tensors

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
WORKER = Path(__file__).with_name("faults.py")
STEP = "seq2seq RM step 2"
CASES: list[dict[str, Any]] = [
    {"name": "loop", "fault": "loop", "phase": STEP, "beat": 3},
    {"name": "stop", "fault": "stop", "phase": "checkpoint of step 2"},
    {"name": "kill", "fault": "kill", "phase": STEP, "rank": 0, "beat": 2},
    {"name": "disk", "fault": "disk", "phase": "checkpoint of step 2"},
    {"name": "memory", "fault": "memory", "phase": STEP},
    {"name": "nan", "fault": "nan", "phase": STEP},
]
WANTED = {
    "loop": "watchdog: rank 1 made no progress for 5 s in: seq2seq RM step 2; rank 0 waited for it",
    "stop": "watchdog: rank 1 was stopped (SIGSTOP) and did nothing for 5 s in: checkpoint of ",
    "kill": "rank 0 was killed (SIGKILL, which is also what the system does when memory runs out) "
    "in: seq2seq RM step 2",
    "disk": "the checkpoint could not be written (rank 1: [Errno 27] File too large); the last "
    "good one is {run}/checkpoints/step-00000001",
    "memory": "out of memory on rank 1 in: seq2seq RM step 2: on the CPU",
    "nan": "seq2seq RM step 2: the loss is nan on rank 1; lower optim.lr",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def played(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with OUT/NAME.json and OUT/NAME/run of every case."""
    out = tmp_path_factory.mktemp("faults")
    cases = [{"stage": "rm", **case} for case in CASES]
    (out / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(WORKER), str(out / "cases.json"), str(root), str(out)]
    log = (out / "log").open("w")
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        process.wait(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, (out / "log").read_text()[-3000:]
    return out


@pytest.mark.parametrize("name", WANTED)
def test_one_line_names_rank_phase_and_cause(name: str, played: Path) -> None:
    found = json.loads((played / f"{name}.json").read_text())
    assert found["reached"], found
    run = played / name / "run"
    (line,) = found["lines"]
    assert line.startswith(f"s2srm: error: {WANTED[name].format(run=run)}"), found
    assert 0 not in found["codes"] and -1000 not in found["codes"], found
    assert "Traceback" not in "".join(found["outputs"]), found
    assert not list(run.glob("*.safetensors"))
    complete = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    # A stopped rank goes on while its stack is written, and may finish the checkpoint meanwhile.
    late = ["step-00000002"] if name == "stop" else []
    assert complete in (["step-00000001"], ["step-00000001", *late])
    if name in ("loop", "stop"):
        assert "faults.py" in (run / "stacks" / "rank-1.txt").read_text()
    if name == "nan":
        assert [path.name for path in (run / "diverged").glob("*.json")] == [
            "step-00000002-rank-1.json"
        ]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(*arguments: object) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(
        launcher,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return process.returncode, output


def program(root: Path, out: Path, data: Path | None = None) -> list[object]:
    """The command of a small RM run."""
    settings = {
        "model.path": root / "policy",
        "data.path": data or root / "rows.jsonl",
        "output": out,
        "template.kind": "plain",
        "template.separator": " x y",
        "optim.lr": "1e-2",
        "max_steps": 3,
        "batch_size": 4,
        "microbatch_tokens": 20,
        "save_every": 2,
    }
    return ["-m", "s2srm", "rm", *(f"--{key}={value}" for key, value in settings.items())]


def two_nodes(port: int) -> list[object]:
    """Options of either node's torchrun."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    return ["--nnodes", 2, "--nproc-per-node", 1, *rendezvous]


def test_two_nodes_do_what_one_node_does(root: Path, tmp_path: Path, free_port: int) -> None:
    """To the bit; and what fails on one node alone ends the other with the same line."""
    one = ["--standalone", "--nproc-per-node", 2, *program(root, tmp_path / "one")]
    assert finish(launch(*one))[0] == 0
    nodes = [launch(*two_nodes(free_port), *program(root, tmp_path / "two")) for _ in range(2)]
    for code, output in [finish(node) for node in nodes]:
        assert code == 0, output[-3000:]
    assert rows_without_times(tmp_path / "one") == rows_without_times(tmp_path / "two")
    for pattern in ("*.safetensors", "checkpoints/*/*.safetensors"):
        first, second = tensors(tmp_path / "one", pattern), tensors(tmp_path / "two", pattern)
        assert first and first.keys() == second.keys()
        assert all(first[name].equal(second[name]) for name in first)


def test_a_node_that_fails_alone_ends_the_other(root: Path, tmp_path: Path, free_port: int) -> None:
    """Data that is there on one node only."""
    runs = [program(root, tmp_path / "run"), program(root, tmp_path / "run", tmp_path / "no.jsonl")]
    nodes = [launch(*two_nodes(free_port), *run) for run in runs]
    for code, output in [finish(node) for node in nodes]:
        assert code != 0
        last = output.splitlines()[-1]
        assert "data.path" in last and "no.jsonl does not exist" in last, output[-3000:]
