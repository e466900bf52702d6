"""The time model: what it counts, and the limits that the recorded kernels keep."""

import dataclasses

import pytest

from benchmarks.resources import time_model
from benchmarks.resources.compiled import Resources
from benchmarks.resources.table import read_table
from benchmarks.shapes import MODELS

ROW = Resources("statistics", 90, "128x256", 200, 0, 0, 147480, "HGMMA x4", 2800, 2200, 2048)
RECORDED = {row.variant: row for row in read_table(time_model.TABLE)[0]}
# Once kept, a limit stays kept.
KEPT = [
    (operation.name, model)
    for operation in time_model.OPERATIONS
    for model in time_model.LIMITED
    if (operation.name, model) not in time_model.NOT_YET
]


@pytest.mark.parametrize(("name", "model"), KEPT)
def test_the_recorded_kernels_keep_the_limit(name, model):
    limit = next(x.limit for x in time_model.OPERATIONS if x.name == name)
    without, _ = time_model.ratios(RECORDED)[name, model]
    assert without <= limit


@pytest.mark.parametrize(("name", "model"), sorted(time_model.NOT_YET))
def test_a_limit_that_is_said_to_be_passed_is_passed(name, model):
    limit = next(x.limit for x in time_model.OPERATIONS if x.name == name)
    without, _ = time_model.ratios(RECORDED)[name, model]
    assert without > limit, f"take {name, model} out of NOT_YET"


def test_a_kernel_without_epilogue_takes_the_main_loop_and_the_fill():
    row = dataclasses.replace(ROW, issue=0, pipe=0)
    tiles = 64 * 1000
    main = 2 * 128 * 256 * 2048 / (time_model.MATRIX_FLOPS * time_model.MAIN_LOOP_SHARE)
    rounds = -(-tiles // 132)
    expected = rounds * (main + time_model.FILL_CYCLES) / time_model.CLOCK
    assert time_model.kernel_seconds(row, 2048, 256000) == pytest.approx(expected)


def test_the_busiest_pipe_bounds_an_epilogue():
    few = dataclasses.replace(ROW, issue=1000, pipe=2048)
    more = dataclasses.replace(ROW, issue=1000, pipe=4096)
    seconds = [time_model.kernel_seconds(row, 2048, 256000) for row in (few, more)]
    rounds = -(-64 * 1000 // 132)
    assert seconds[1] - seconds[0] == pytest.approx(rounds * 2048 / time_model.CLOCK)


def test_a_stored_matrix_cannot_be_written_faster_than_memory():
    row = dataclasses.replace(ROW, variant="statistics-store", issue=0, pipe=0)
    least = 2 * 8192 * 256000 / time_model.BANDWIDTH
    assert time_model.kernel_seconds(row, 16, 256000) >= least
    assert time_model.kernel_seconds(ROW, 16, 256000) != time_model.kernel_seconds(row, 16, 256000)


def test_a_wait_for_the_device_costs_what_is_assumed():
    operation = time_model.OPERATIONS[0]
    size = MODELS["gemma-2b"]
    without, waited = (time_model.ratio(operation, RECORDED, *size, syncs=n) for n in (0, 1))
    share = time_model.SYNC_SECONDS / (operation.bare * time_model.bare_seconds(*size))
    assert waited - without == pytest.approx(share)


def test_a_kernel_that_the_table_lacks_is_named():
    with pytest.raises(ValueError, match="the table has no statistics-argmax"):
        time_model.ratio(time_model.OPERATIONS[0], {}, 2048, 256000)


def test_the_command_prints_every_operation_and_fails_where_a_limit_is_passed(capsys):
    status = time_model.main([])
    printed = capsys.readouterr().out
    for operation in time_model.OPERATIONS:
        assert f"| {operation.name} |" in printed
    assert status == (1 if time_model.NOT_YET else 0)
    assert (" over" in printed) is bool(time_model.NOT_YET)
