"""Log-probabilities of several chosen ids per row, from the statistics of the same call.

    extra_logprobs[r, k] = z[r, extra_ids[r, k]] - lse[r],   0 where extra_ids is -1

Their gradient is that of `backward` with the upstream gradients g_k in place of the target's: each
takes g_k p_j from every column, which is the lse's part, and adds g_k at its own. The entries of dz
at these ids are formed on their own, as the target's is: an id may be one row's target, or stand
twice in it, and a likely one keeps its digits.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import torch
from torch import Tensor

from s2srm_kernels.checks import assert_on_device, check_device, check_integer, check_tensors
from s2srm_kernels.lm_head.call import Call
from s2srm_kernels.lm_head.engine import FLOOR, Engine, Entries, RowStatistics, Upstream
from s2srm_kernels.lm_head.head import Head, digest
from s2srm_kernels.lm_head.shards import all_reduce_max_

NO_ID = -1


def flat_ids(call: Call, extra_ids: Tensor | None) -> Tensor | None:
    """(..., K) token ids -> (N, K); ValueError for others. `live_ids` looks at their range."""
    if extra_ids is None:
        return None
    check_tensors(call.name, extra_ids=extra_ids)
    leading = call.hidden.shape[:-1]
    if extra_ids.dim() != len(leading) + 1 or extra_ids.shape[:-1] != leading:
        wanted = ", ".join(map(str, leading))
        raise ValueError(
            f"extra_ids must have shape ({wanted}, K), K ids for each row of hidden, "
            f"got {tuple(extra_ids.shape)}"
        )
    check_device("extra_ids", extra_ids, call.hidden)
    check_integer("extra_ids", extra_ids)
    return extra_ids.flatten(0, -2)


def extra_fact(extra_ids: Tensor | None, group: str | None) -> dict[str, int | None]:
    """What the ranks of a group must agree on."""
    if group is None:
        return {}
    return {"extra_ids": None if extra_ids is None else digest(extra_ids.flatten())}


def live_ids(extra_ids: Tensor | None, head: Head) -> Tensor:
    """(R, K) int64 of the live rows, K = 0 without extra ids.

    ValueError for an id out of range, naming row and place; see live_rows for a known num_live.
    """
    if extra_ids is None:
        return head.target.new_empty(head.num_live, 0)
    ids = extra_ids[head.rows].long()
    bad = (ids < NO_ID) | (ids >= head.shard.num_total)
    if not head.waits:
        named = f"an extra id is neither in [0, {head.shard.num_total}) nor {NO_ID}"
        assert_on_device(~bad.any(), named)
        return ids.clamp(NO_ID, head.shard.num_total - 1)
    if bad.any():
        place = int(bad.flatten().byte().argmax())
        row, k = int(head.rows[place // ids.shape[1]]), place % ids.shape[1]
        raise ValueError(
            f"extra_ids[{row}, {k}] is {int(extra_ids[row, k])}: neither in "
            f"[0, {head.shard.num_total}) nor {NO_ID}"
        )
    return ids


def extra_logprobs(engine: Engine, head: Head, ids: Tensor, statistics: RowStatistics) -> Tensor:
    """(R, K) log p of (R, K) ids. With a group one all-reduce of their logits."""
    if ids.numel() == 0:
        return ids.to(head.dtype)
    logits = all_reduce_max_(engine.target_logits(head, head.columns_of(ids)), head.shard)
    logprobs = statistics.logprobs_at(logits).clamp_(max=0)
    return logprobs.masked_fill_(ids == NO_ID, 0)


def extra_upstream(
    head: Head,
    statistics: RowStatistics,
    upstream: Upstream,
    extra_ids: Tensor,
    logprobs: Tensor,
    grads: Tensor,
) -> tuple[Upstream, Entries]:
    """The upstream gradients with those of the extra ids' log p, and the entries of dz at the ids.

    logprobs and grads (N, K), as the forward gave them and autograd gave them back.
    """
    ids = extra_ids[head.rows].long()
    logp = logprobs[head.rows]
    grads = grads[head.rows].to(head.dtype).masked_fill(ids == NO_ID, 0)
    lse = torch.zeros_like(upstream.logprobs) if upstream.lse is None else upstream.lse
    # Of each entry: what is added at its own id, and what others take from it in proportion to p.
    is_target = ids == head.target[:, None]
    own = torch.where(is_target, upstream.logprobs[:, None], 0.0)
    others = torch.where(is_target, 0.0, upstream.logprobs[:, None])
    for k in range(ids.shape[1]):
        same, grad = ids == ids[:, k : k + 1], grads[:, k : k + 1]
        own += torch.where(same, grad, 0.0)
        others += torch.where(same, 0.0, grad)
    factor = lse[:, None] - others
    constant = 0.0
    if upstream.mean_logprob is not None:
        factor = factor - upstream.mean_logprob[:, None]
        constant = upstream.mean_logprob[:, None] / head.shard.num_total
    if upstream.entropy is not None:
        surprise = logp.clamp(min=FLOOR) + statistics.entropy[:, None]
        factor = factor - upstream.entropy[:, None] * surprise
    values = factor * logp.exp() - own * logp.expm1() + constant
    if head.softcap is not None:
        z = logp + statistics.log_sum[:, None] + statistics.max_logit[:, None]
        values = values * (1 - (z * (head.temperature / head.softcap)).square())
    entries = Entries(head.columns_of(ids), values / head.temperature)
    return upstream._replace(lse=lse - grads.sum(dim=1)), entries
