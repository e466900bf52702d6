"""Vocabulary and sequence operations of RLHF on packed rows, as torch.library operators.

Every operation is defined by its `reference` in plain PyTorch; other backends register kernels
under the same operator names. See kernels/README.md for the table of operations and backends.
Left out: padded tensors and masks (rows are packed; `ignore_index` marks the rows to skip) and
any knowledge of models, tokenizers or trainers.
"""

from s2srm_kernels.dispatch import load
from s2srm_kernels.lm_head.skipping import SkipReport
from s2srm_kernels.ops.gae import Advantages, gae
from s2srm_kernels.ops.linear_cross_entropy import linear_cross_entropy
from s2srm_kernels.ops.linear_logprobs import Logprobs, LogprobsAtIds, linear_logprobs
from s2srm_kernels.ops.linear_ppo_loss import PPOLoss, PPOMetrics, linear_ppo_loss
from s2srm_kernels.ops.linear_sample import Samples, linear_sample
from s2srm_kernels.ops.linear_token_stats import TokenStats, TokenStatsAtIds, linear_token_stats
from s2srm_kernels.ops.token_rewards import TokenRewards, token_rewards

load("reference")  # once every operation is defined

__all__ = [
    "Advantages",
    "Logprobs",
    "LogprobsAtIds",
    "PPOLoss",
    "PPOMetrics",
    "Samples",
    "SkipReport",
    "TokenRewards",
    "TokenStats",
    "TokenStatsAtIds",
    "gae",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_ppo_loss",
    "linear_sample",
    "linear_token_stats",
    "token_rewards",
]
