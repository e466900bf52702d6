"""What the Triton engine chooses, and what it says where it cannot run: no kernel is launched."""

import importlib.metadata
import importlib.util
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="without triton there is nothing to choose")

from s2srm_kernels import triton as backend
from s2srm_kernels.lm_head.engine import SKIP_COLUMNS, SKIP_ROWS
from s2srm_kernels.triton import configs, engine
from s2srm_kernels.triton.engine import TritonEngine

FAMILIES = (configs.INTERPRETER, "sm_80", "sm_90", "sm_100")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KERNELS = ("statistics", "stored_statistics", "stored_sums", "gradients", "sample")


@pytest.mark.parametrize(("family", "dtype"), list(itertools.product(FAMILIES, DTYPES)), ids=str)
def test_tiles_fit_the_blocks_and_each_other(family, dtype):
    for path, plain in itertools.product((False, True), repeat=2):
        tiles = [configs.logits_tile(kernel, family, dtype, path, plain) for kernel in KERNELS]
        # One order of summation in every kernel.
        assert len({tile.block_k for tile in tiles}) == 1
        for tile in tiles:
            assert SKIP_ROWS % tile.block_m == 0
            assert SKIP_COLUMNS % tile.block_n == 0
            assert tile.block_n // tile.parts >= 16
        # Blocks of rows that one kernel finds are made again by another.
        assert len({tile.block_m for tile in tiles[:3]}) == 1


@pytest.mark.parametrize("num_columns", [1, 300, 32000, 49152, 128256, 151936, 262144, 10**6])
def test_splits_are_whole_tiles_and_few(num_columns):
    columns = configs.split_columns(num_columns)
    assert columns % SKIP_COLUMNS == 0
    assert num_columns / columns <= 128 or num_columns > 2**18


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_family_of_a_chip(capability, family):
    assert configs.family_of(capability) == family


def test_an_old_chip_is_refused_by_name():
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or later, got 7\.5"):
        configs.family_of((7, 5))


def _chunk_rows(n, d, v, workspace=None, dtype=torch.bfloat16):
    hidden = torch.empty(n, d, dtype=dtype, device="meta")
    weight = torch.empty(v, d, dtype=dtype, device="meta")
    rows = engine._chunk_rows(hidden, weight, workspace, n)
    assert TritonEngine().gradients_in_forward(hidden, weight, workspace) is (rows > 0)
    return rows


@pytest.mark.parametrize(
    ("d", "v"),
    [(2048, 256000), (4096, 32000), (4096, 128256), (640, 262144), (576, 49152)],
    ids=["gemma-2b", "llama-2-7b", "llama-3-8b", "gemma-3-270m", "smollm2"],
)
def test_one_chunk_holds_the_models(d, v):
    assert _chunk_rows(8192, d, v) == 8192


@pytest.mark.parametrize(
    ("n", "workspace", "rows"),
    [
        # Gemma-2B: beside one of several chunks the weight's gradient takes 2 GiB - 48 MiB.
        (8388, None, 8388),
        (8389, None, 4224),
        (16384, None, 4096),
        (8192, 2**30, 0),
        (100, 2**26, 100),
        (100, 2**25, 0),
        (0, 0, 1),
    ],
)
def test_chunks_are_all_rows_or_whole_blocks_of_one_size(n, workspace, rows):
    """Of 2048 rows at least unless all of them fit; otherwise backward makes the gradients."""
    assert _chunk_rows(n, 2048, 256000, workspace) == rows


def test_without_triton_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="triton package is not installed"):
        backend.register()


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    with pytest.raises(ImportError, match=r"3\.6 or later is needed, got 3\.5\.1"):
        backend.register()
