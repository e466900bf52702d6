"""What the Triton engine chooses, and what it says where it cannot run: no kernel is launched."""

import importlib.metadata
import importlib.util
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="without triton there is nothing to choose")

from s2srm_kernels import triton as backend
from s2srm_kernels.lm_head.engine import SKIP_COLUMNS, SKIP_ROWS
from s2srm_kernels.triton import configs, engine, launch
from s2srm_kernels.triton.engine import TritonEngine

FAMILIES = (configs.INTERPRETER, "sm_80", "sm_90", "sm_100")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KERNELS = ("statistics", "stored_statistics", "gradients")


@pytest.mark.parametrize(("family", "dtype"), list(itertools.product(FAMILIES, DTYPES)), ids=str)
def test_tiles_fit_the_blocks_and_each_other(family, dtype):
    for path in (False, True):
        tiles = [configs.logits_tile(kernel, family, dtype, path) for kernel in KERNELS]
        # One order of summation in every kernel.
        assert len({tile.block_k for tile in tiles}) == 1
        for tile in tiles:
            assert SKIP_ROWS % tile.block_m == 0
            assert SKIP_COLUMNS % tile.block_n == 0
            assert tile.block_n // tile.parts >= 16
        # What the bound on the workspace counts on.
        stored = tiles[KERNELS.index("stored_statistics")]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert stored.block_n // stored.parts >= engine._REFERENCE_COLUMNS[compute]
    product = configs.product_tile(family, dtype)
    assert SKIP_ROWS % product.block_m == 0 and SKIP_ROWS % product.block_k == 0


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


@pytest.mark.parametrize(
    ("n", "workspace", "made"),
    [(8192, None, True), (8192, 2**30, False), (100, 2**31 + 2**27, True), (100, 2**31, False)],
)
def test_gradients_in_forward_where_2048_rows_or_all_of_them_fit(n, workspace, made):
    """Gemma-2B: the sum of the weight's gradient takes 2 GiB - 48 MiB."""
    hidden = torch.empty(n, 2048, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(256000, 2048, dtype=torch.bfloat16, device="meta")
    assert TritonEngine().gradients_in_forward(hidden, weight, workspace) is made


def test_a_chunk_of_many_rows_is_whole_blocks():
    hidden = torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(256000, 2048, dtype=torch.bfloat16, device="meta")
    rows = engine._chunk_rows(hidden, weight, None)
    assert rows >= engine.MIN_CHUNK_ROWS and rows % SKIP_ROWS == 0
    row_bytes = launch.storage_stride(256000) * 2
    assert rows * row_bytes + weight.numel() * 4 <= engine.WORKSPACE_BYTES


def test_without_triton_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="triton package is not installed"):
        backend.register()


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    with pytest.raises(ImportError, match=r"3\.6 or later is needed, got 3\.5\.1"):
        backend.register()
