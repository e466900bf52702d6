"""What happens while a checkpoint is written: full disks, SIGTERM, leftovers, order of files."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_tiny import assert_same_run, config, interrupted, run
from safetensors.torch import load_file

from s2srm.checkpoint import files, lock, saver, tensors
from s2srm.checkpoint.saver import Checkpoints
from s2srm.checkpoint.stop import Stopped
from s2srm.checkpoint.tensors import Entry, TensorFiles, write_tensors
from s2srm.errors import UserError


@pytest.mark.parametrize("full", ["tensors", "state", "manifest"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    full: str,
    whole: dict[str, Path],
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = files.write_chunks
    wanted = {"tensors": ".safetensors", "state": files.STATE, "manifest": files.MANIFEST}[full]

    def until_full(path: Path, chunks: Iterable[bytes | memoryview]) -> files.FileSum:
        if "step-00000003" in str(path) and path.name.endswith(wanted):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, chunks)

    cfg = config("sft", inputs, tmp_path / "run", resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_chunks", until_full)
        patch.setattr(tensors, "write_chunks", until_full)
        with pytest.raises(
            UserError, match=r"No space left.*step-00000002.*--resume auto"
        ) as caught:
            run("sft", cfg)
    assert "\n" not in str(caught.value)
    names = sorted(p.name for p in files.checkpoints_of(tmp_path / "run").iterdir())
    assert names == [".lock", "step-00000001", "step-00000002"]
    run("sft", cfg)
    assert_same_run(whole["sft"], tmp_path / "run")


@pytest.mark.parametrize("save_every", [0, 4])
def test_sigterm_saves_and_exits_143(save_every: int, inputs: Path, tmp_path: Path) -> None:
    run("sft", config("sft", inputs, tmp_path / "whole", save_every=save_every))
    cfg = config("sft", inputs, tmp_path / "run", save_every=save_every, resume="auto")
    after_step = Checkpoints.after_step
    handler = signal.getsignal(signal.SIGTERM)

    def and_signal(self: Checkpoints, step: int, check: Callable[[], None] | None = None) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, step, check)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(Checkpoints, "after_step", and_signal)
        run("sft", cfg)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [files.step_of(p) for p in files.list_checkpoints(tmp_path / "run")] == [2]
    run("sft", cfg)
    if save_every:
        assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_the_manifest_is_written_last(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    write, commit = files.write_chunks, files.commit

    def noted(path: Path, chunks: Any) -> files.FileSum:
        order.append(path.name)
        return write(path, chunks)

    def noted_commit(temporary: Path, final: Path) -> None:
        order.append("commit")
        assert files.find_damage(temporary) is None
        commit(temporary, final)

    monkeypatch.setattr(files, "write_chunks", noted)
    monkeypatch.setattr(tensors, "write_chunks", noted)
    monkeypatch.setattr(files, "commit", noted_commit)
    run("sft", config("sft", inputs, tmp_path / "run", save_every=5))
    assert order[-5:-1] == [
        "model-00000-of-00001.safetensors",
        files.STATE,
        files.MANIFEST,
        "commit",
    ]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (files.make_temporary(tmp_path, 3) / "half").write_text("x")
    temporary = files.make_temporary(tmp_path, 4)
    assert [p.name for p in files.checkpoints_of(tmp_path).iterdir()] == [temporary.name]
    assert files.list_checkpoints(tmp_path) == []
    files.commit(temporary, files.checkpoint_path(tmp_path, 4))
    again = files.make_temporary(tmp_path, 4)
    (again / "new").write_text("x")
    files.commit(again, files.checkpoint_path(tmp_path, 4))
    assert [p.name for p in files.checkpoint_path(tmp_path, 4).iterdir()] == ["new"]


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 99_999_999, 100_000_000, 10):
        files.commit(files.make_temporary(tmp_path, step), files.checkpoint_path(tmp_path, step))
    files.keep_newest(tmp_path, 2)
    found = [files.step_of(path) for path in files.list_checkpoints(tmp_path)]
    assert found == [100_000_000, 99_999_999]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_files_are_safetensors_and_read_by_ranges(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(11, dtype=dtype) / 7
    for number, (low, high) in enumerate([(0, 4), (4, 9), (9, 11)]):
        path = tmp_path / f"{number}.safetensors"
        write_tensors(path, [(Entry("weight", low, "a/b.c"), values[low:high])])
        assert torch.equal(load_file(path)[f"weight/{low}/a/b.c"], values[low:high])
    reader = TensorFiles(sorted(tmp_path.glob("*.safetensors")))
    assert reader.names == {"a/b.c"} and reader.kinds("a/b.c") == ["weight"]
    for low, high in ((0, 11), (3, 5), (2, 10), (9, 11)):
        target = torch.full((high - low,), float("nan"), dtype=dtype)
        reader.read("a/b.c", "weight", low, target)
        assert torch.equal(target, values[low:high])
    with pytest.raises(AssertionError):
        reader.read("a/b.c", "weight", 9, torch.empty(5, dtype=dtype))


def test_nodes_that_do_not_share_the_folder_are_told_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the nodes must share the output folder"):
        saver._check_visible(tmp_path, {"model-00001-of-00002.safetensors": files.FileSum(1, "")})


def test_two_processes_do_not_write_one_run(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    cfg = config("sft", inputs, output, resume="auto")
    other = lock.RunLock(output)
    interrupted("sft", cfg, after=2)
    other.take()
    monkeypatch.setattr(lock, "_WAIT_S", 0.2)
    before = (output / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="another process is still writing"):
        run("sft", cfg)
    assert (output / "metrics.jsonl").read_bytes() == before
    other.release()
    run("sft", cfg)
