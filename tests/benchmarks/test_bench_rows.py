import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from benchmarks.rows import (
    CaseRow,
    Row,
    append_line,
    append_row,
    environment,
    read_cases,
    read_rows,
    results_file,
    source_hash,
)


def row(**fields):
    common = {
        "op": "gae",
        "provider": "s2srm-cpp",
        "version": "1",
        "shape": "8/1",
        "num_rows": 8,
        "dtype": "float32",
        "ignored": 0.0,
        "mode": "forward",
        "inputs": "normal",
        "device": "CPU X",
        "torch": "2",
        "triton": "none",
        "python": "3",
        "num_threads": 1,
        "sources": "abc",
        "command": "python",
        "date": "2026-01-02",
    }
    return Row(**{**common, **fields})


def test_rows_come_back(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [row(p50_ms=1.5, errors={"returns": 1e-7}), row(reason="not installed", passed=False)]
    for one in rows:
        append_row(path, one)
    assert read_rows([path]) == rows


def test_an_error_that_is_not_finite_is_valid_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, row(errors={"d_hidden": math.inf}))
    line = path.read_text()
    assert json.loads(line, parse_constant=pytest.fail)["errors"] == {"d_hidden": None}
    assert read_rows([path])[0].errors == {"d_hidden": math.inf}


@pytest.mark.parametrize("line", ["{", '{"op": "gae"}', '{"nobody": 1}', "[]"])
def test_a_bad_row_names_its_line(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, row())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2"):
        read_rows([path])


def test_the_hash_follows_every_source(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "gae.cu"
    hashes = [source_hash(tmp_path)]
    source.write_text("one")
    source_hash.cache_clear()
    hashes.append(source_hash(tmp_path))
    source.write_text("two")
    source_hash.cache_clear()
    hashes.append(source_hash(tmp_path))
    source.rename(source.with_name("gae.cuh"))
    source_hash.cache_clear()
    hashes.append(source_hash(tmp_path))
    assert len(set(hashes)) == 4
    source_hash.cache_clear()


def test_environment_and_file(cpu):
    found = environment(cpu)
    assert found["device"].startswith("CPU ")
    assert "(R)" not in found["device"]
    assert len(found["sources"]) == 12
    row(**found)
    path = results_file("NVIDIA H100 80GB HBM3", "2026-11-22", Path("r"))
    assert path == Path("r/nvidia-h100-80gb-hbm3-2026-11-22.jsonl")


def test_both_kinds_of_rows_share_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    fields = {"part": "smoke", "case": "gae", "status": "passed", "device": "d", "sources": "s"}
    append_row(path, row())
    append_line(path, fields | {"command": "c", "date": "d", "torch": "2.11", "flash-attn": "3"})
    assert read_rows([path]) == [row()]
    (case,) = read_cases([path])
    assert case.versions == {"torch": "2.11", "flash-attn": "3"}
    append_line(path, {"part": "smoke"})
    with pytest.raises(ValueError, match=r"rows\.jsonl:3"):
        read_cases([path])


@pytest.mark.parametrize("kind", [Row, CaseRow])
def test_every_field_is_documented(kind):
    text = (kind.__doc__ or "") + (environment.__doc__ or "")
    words = set(re.findall(r"\w+", text))
    assert {field.name for field in dataclasses.fields(kind)} <= words
