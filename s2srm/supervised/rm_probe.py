"""What a seq2seq reward model is worth as a reward, on a few held-out triples.

    pair_accuracy              how often the chosen response's rewards add up to more than the
                               rejected one's; a tie counts one half
    reward_length_correlation  Pearson, of the sum of a response's token rewards with its length,
                               over chosen and rejected responses
    copied_fraction            how often the correction of a rejected response, generated greedily,
                               is that response itself

Token rewards are +1 before the divergence and -1 for a diverging token after it. The correlation is
0 where rewards or lengths do not vary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from s2srm import distributed
from s2srm.config import RMConfig, SamplingConfig
from s2srm.correlation import correlation, joint_moments
from s2srm.data.examples import TokenisedPreference, rm_segments
from s2srm.data.templates import Template
from s2srm.engine import Engine, PackedSegments
from s2srm.packing import Packed, Segment, split_rows
from s2srm.rollout.build import build_rollout
from s2srm.rollout.hf import named_tensors
from s2srm_kernels import token_rewards


def probe_rm(
    engine: Engine, template: Template, rows: Sequence[TokenisedPreference], cfg: RMConfig
) -> dict[str, float]:
    """The three metrics over the first cfg.probe_rows held-out triples of all ranks.

    rows: this rank's share, every world-th row. All ranks call it.
    """
    if cfg.probe_rows == 0:
        return {}
    world, rank = distributed.world_size(), distributed.rank()
    rows = rows[: len(range(rank, cfg.probe_rows, world))]
    chosen = [_identity(template, row.prompt, row.chosen) for row in rows]
    rejected = [_identity(template, row.prompt, row.rejected) for row in rows]
    sums = reward_sums(engine, [*chosen, *rejected], cfg.microbatch_tokens)
    lengths = torch.tensor(
        [float(s.num_predicted) for s in (*chosen, *rejected)], dtype=torch.float64
    )
    difference = sums[: len(rows)] - sums[len(rows) :]
    copied = count_copies(engine, template, rows)
    counts = torch.tensor(
        [
            float(len(rows)),
            float((difference > 0).sum()) + 0.5 * float((difference == 0).sum()),
            float(copied),
        ],
        dtype=torch.float64,
    )
    local = torch.cat([counts, joint_moments(sums, lengths)]).to(engine.device)
    num_rows, num_right, num_copied, *rest = distributed.sum_over_ranks(local).tolist()
    return {
        "pair_accuracy": num_right / num_rows,
        "copied_fraction": num_copied / num_rows,
        "reward_length_correlation": correlation(rest),
    }


def reward_sums(engine: Engine, segments: Sequence[Segment], budget: int) -> Tensor:
    """(len(segments),) float64: sum of the token rewards of every segment's predicted tokens."""

    def rewards(batch: Packed) -> tuple[Tensor]:
        signal = engine(batch, "token_stats").argmax
        per_token, _ = token_rewards(batch.targets, signal, batch.cu_rows)
        sums = [part.double().sum() for part in split_rows(per_token, batch.cu_rows)]
        return (torch.stack(sums),)

    (sums,) = PackedSegments.within(segments, budget, engine.device).map(engine, rewards)
    return sums.cpu()


def count_copies(engine: Engine, template: Template, rows: Sequence[TokenisedPreference]) -> int:
    """Rejected responses whose generated correction is the response itself. All ranks call it."""
    lm = engine.module.lm
    assert isinstance(lm, PreTrainedModel)
    with engine.gathered():
        if not rows:
            return 0
        rollout = build_rollout(lm)
        rollout.update_weights(named_tensors(lm))
        longest = max(len(row.rejected) for row in rows) + 1
        corrections = rollout.generate(
            [template.rm_input(row.prompt, row.rejected) for row in rows],
            [0] * len(rows),
            SamplingConfig(max_new_tokens=longest, temperature=0.0, batch_size=32),
            template.eos_id,
        )
        rollout.drop_weights()
    return sum(
        correction.tokens == [*row.rejected, template.eos_id]
        for correction, row in zip(corrections, rows, strict=True)
    )


def _identity(template: Template, prompt: Sequence[int], response: Sequence[int]) -> Segment:
    """x | y | separator | y EOS, with the second y and EOS predicted."""
    return rm_segments(template, prompt, response, response)[1]
