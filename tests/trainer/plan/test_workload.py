"""Micro-batches as the run packs them, and operations by hand."""

from __future__ import annotations

from s2srm.config import DataConfig, PPOConfig, RMConfig, SamplingConfig, ScalarRMConfig
from s2srm.plan import flops
from s2srm.plan.counts import Counts
from s2srm.plan.lengths import of_limits
from s2srm.plan.workload import Row, cut, fill, pack_steps

COUNTS = Counts(
    *(1000, 600, 200, 0, 200, 100, 50),
    layers=2,
    hidden=10,
    vocabulary=20,
    query_width=10,
    kv_width=5,
    window=None,
)


def test_the_largest_micro_batch_is_found():
    rows = [Row((n,), n // 2) for n in (10, 20, 30, 40)]
    load = pack_steps([rows], budget=60)
    assert (load.tokens, load.num_microbatches) == (60, 2)
    assert load.step_tokens == 100
    assert load.longest == 40


def test_a_rank_with_few_rows_does_not_fill_its_budget():
    assert pack_steps(cut([Row((10,), 5)], 3), budget=1000).tokens == 30
    assert fill([Row((10,), 5)], budget=1000).tokens == 1000


def test_limits_become_the_sequences_of_each_stage():
    data = DataConfig(max_prompt_tokens=8, max_response_tokens=4)
    assert [r.lengths for r in of_limits(RMConfig(data=data), 8, 4).rows] == [(16,), (16,)]
    assert [r.lengths for r in of_limits(RMConfig(identity_weight=0), 8, 4).rows] == [(16,)]
    assert of_limits(ScalarRMConfig(data=data), 8, 4).rows == [Row((12, 12), 8)]
    ppo = of_limits(PPOConfig(sampling=SamplingConfig(max_new_tokens=6)), 8, 4)
    assert (ppo.rows[0].tokens, ppo.reading[0].tokens, ppo.prompts) == (14, 20, [8])


def test_operations_by_hand():
    assert flops.trunk(COUNTS, 10, 8) == 2 * 600 * 10 + 4 * 10 * 2 * 10 * 4
    assert flops.head(COUNTS, 5) == 2 * 200 * 5
    assert flops.training(100, 10, checkpointing=True, recomputes_head=False) == 430
    one_token = flops.decoding(COUNTS, 1, 6, 1)
    assert one_token == 2 * 800 + 4 * 10 * 2 * 6.5
