"""The opt-in kernel of sm_90: when it is taken, and the order in which its groups read the ring.

No kernel runs: test_triton_compile compiles it and holds it to the limits.
"""

import types

import pytest

pytest.importorskip("triton", reason="without triton there is no kernel")

from s2srm_kernels.triton import hopper

FIELDS = {"ARGMAX": True, "COUNT": True, "ENTROPY": True, "MEAN": False}


def problem(family="sm_90", aligned=True, num_columns=256000, **head):
    head = {"bias": None, "softcap": None, "temperature": 1.0} | head
    return types.SimpleNamespace(
        head=types.SimpleNamespace(**head), family=family, aligned=aligned, num_columns=num_columns
    )


@pytest.mark.parametrize("tiles", [(2, 2), (2, 1), (1, 2), (3, 0), (0, 3), (0, 0)])
def test_each_group_reads_its_own_tiles_in_the_order_of_the_copies(tiles):
    copied = [
        (group, tile) for tile in range(max(tiles)) for group in (0, 1) if tile < tiles[group]
    ]
    before = hopper.tiles_before.fn
    read = {
        before(tile, group, tiles[1 - group]): (group, tile)
        for group in (0, 1)
        for tile in range(tiles[group])
    }
    assert [read[place] for place in range(len(copied))] == copied


def test_it_serves_a_plain_head_on_sm_90():
    assert hopper.serves(problem(), FIELDS, fixed=False, stored=False)
    assert hopper.serves(problem(), FIELDS | {"ENTROPY": False}, fixed=True, stored=True)


@pytest.mark.parametrize(
    "other",
    [
        {"family": "sm_80"},
        {"family": "sm_100"},
        {"aligned": False},
        {"num_columns": 32001},
        {"bias": "one"},
        {"softcap": 30.0},
        {"temperature": 0.7},
    ],
    ids=str,
)
def test_other_heads_keep_their_kernel(other):
    assert not hopper.serves(problem(**other), FIELDS, fixed=False, stored=False)


@pytest.mark.parametrize(
    ("fields", "fixed", "stored"),
    [({"MEAN": True}, False, False), ({}, True, True), ({}, False, True)],
)
def test_what_it_does_not_make_is_left_to_the_other_kernel(fields, fixed, stored):
    assert not hopper.serves(problem(), FIELDS | fields, fixed=fixed, stored=stored)
