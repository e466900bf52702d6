"""The command itself: dispatch, exit codes, one line of error, nothing heavy before parsing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from s2srm import __version__
from s2srm.cli import COMMANDS, main
from s2srm.errors import UserError
from s2srm.watchdog import pulse


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"s2srm {__version__}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"s2srm {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ppoo"], "unknown command 'ppoo'; did you mean 'ppo'?"),
        (["rm"], "output is missing"),
        (["rm", "--output", "x"], "model.path is missing"),
        (["rm", "--output", "x", "--model.path", "a/b"], "data.path is missing"),
        (["ppo", "--output", "x"], "policy.path is missing"),
        (["sft", "--output", "x", "--model.path", "/no/model"], "/no/model does not exist"),
        (["correct"], "rm is missing"),
        (["correct", "--rm", "/no/model"], "rm: /no/model does not exist"),
        (["eval", "--output", "x"], "policies is missing"),
        (["eval", "--output", "x", "--policies.a", "b/c"], "give either world or data"),
        (["eval", "--output", "x", "--policies.a", "b/c", "--against", "[z]"], "against: 'z'"),
        (["report", "--out", "x.html"], "RUN"),
        (["report", "/no/run", "--out", "x.html"], "/no/run is not a folder"),
        (["demo", "--world", "poetry"], "world: expected one of"),
        (["demo", "--scale", "0"], "scale must be greater than 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("s2srm: error: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert list(tmp_path.iterdir()) == [], "nothing is written before the input is good"


def test_other_exceptions_keep_their_traceback(monkeypatch):
    def fail(name, argv):
        raise ValueError("a bug")

    monkeypatch.setattr("s2srm.commands.stages.run_stage", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["rm"])


def test_a_message_of_several_lines_becomes_one(monkeypatch, capsys):
    def fail(name, argv):
        raise UserError("first\n  second")

    monkeypatch.setattr("s2srm.commands.stages.run_stage", fail)
    assert main(["rm"]) == 2
    assert capsys.readouterr().err == "s2srm: error: first second\n"


def test_other_ranks_leave_the_printing_to_rank_0(monkeypatch, capsys):
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("s2srm.cli.time.sleep", waited.append)
    assert main(["nothing"]) == 2
    assert waited and "unknown command" in capsys.readouterr().err


def test_demo_refuses_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo"]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_nothing_heavy_is_imported_before_the_arguments_are_good():
    code = (
        "import sys, json; from s2srm.cli import main; codes = [main(['rm', '--lr', '1']),"
        " main(['ppo', '--config', 'tiny-ppo', '--gamma', '2']), main(['demo', '--world', 'x'])];"
        "print(json.dumps([codes, [m for m in ('torch', 'transformers', 'datasets', 'deepspeed')"
        " if m in sys.modules]]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert json.loads(result.stdout) == [[2, 2, 2], []], result.stderr
    assert result.stderr.count("s2srm: error:") == 3


@pytest.mark.parametrize("name", ["OutOfMemoryError", "MemoryError"])
def test_no_more_memory_is_one_line_with_the_remedy(name, monkeypatch, capsys):
    kind = MemoryError if name == "MemoryError" else type(name, (RuntimeError,), {})

    def fail(name, argv):
        raise kind("CUDA out of memory. Tried to allocate 20 GiB.\n  See documentation")

    monkeypatch.setattr("s2srm.commands.stages.run_stage", fail)
    assert main(["rm"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "20 GiB" in line and "lower microbatch_tokens" in line


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_does_not_take_it_is_one_line(code, monkeypatch, capsys):
    def fail(name, argv):
        raise OSError(code, os.strerror(code), "/runs/x")

    monkeypatch.setattr("s2srm.commands.stages.run_stage", fail)
    pulse.phase("of a run before")
    assert main(["rm"]) == 2
    assert capsys.readouterr().err == f"s2srm: error: /runs/x: {os.strerror(code)}\n"


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    def fail(name, argv):
        raise FileNotFoundError(errno.ENOENT, "no such file", "/x")

    monkeypatch.setattr("s2srm.commands.stages.run_stage", fail)
    with pytest.raises(FileNotFoundError):
        main(["rm"])


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def fail(name, argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("s2srm.commands.stages.run_stage", fail)
    assert main(["rm"]) == 130
    assert capsys.readouterr().err == "s2srm: interrupted\n"


def test_a_reader_that_has_gone_is_no_traceback():
    command = f"{sys.executable} -m s2srm rm --help; echo code $? >&2"
    result = subprocess.run(
        ["bash", "-c", f"({command}) | true"], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


def test_a_terminal_without_unicode_shows_escapes():
    code = "from s2srm import cli; from s2srm.commands import stages; stages.run_stage = print;"
    code += "cli.main(['rm', '▁é'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "rm ['\\u2581\\xe9']\n"


def test_as_a_module():
    command = [sys.executable, "-m", "s2srm", "rm", "--modl.path", "x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "s2srm: error: unknown option --modl.path; did you mean 'model.path'?\n"


def test_doctor_reports_and_exits_0(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "linear_cross_entropy", "token_rewards", "attention", "CPU"):
        assert word in shown


@pytest.mark.distributed
def test_under_torchrun_every_rank_fails_and_our_line_is_the_last():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "s2srm", "rm", "--modl.path", "x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    line = "s2srm: error: unknown option --modl.path; did you mean 'model.path'?"
    assert result.stderr.splitlines()[-1] == line
    assert f"traceback : {line}" in result.stderr, "torchrun's report names it too"
    assert "Traceback" not in result.stderr.split(line)[0], "the first line is ours"
