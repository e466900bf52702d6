"""Whether every model has a row for every id that the policy can sample.

A policy samples from all rows of its head, and some have more than their tokenizer has tokens:
padded to a multiple as Qwen2.5, or resized. Such an id has no text, and a trained model all but
never samples it, but once is enough to stop a run. Models that are padded alike work together; a
model with fewer rows than the policy is refused before anything is sampled. Nothing is masked: a
logprob is that of the distribution that is sampled from, which has all rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from s2srm.errors import UserError


def check_vocabularies(
    tokenizer: PreTrainedTokenizerBase,
    policy_name: str,
    policy: PretrainedConfig,
    readers: Mapping[str, PretrainedConfig],
) -> None:
    """UserError if a reader (name -> configuration) has fewer rows than the policy samples from.

    Names are setting and path, as "reward.model.path runs/rm".
    """
    sampled = policy.vocab_size
    for name, config in readers.items():
        rows = config.vocab_size
        if rows >= sampled:
            continue
        if rows >= len(tokenizer):
            remedy = f"shrink the policy once with resize_token_embeddings({rows})"
        else:
            remedy = f"enlarge it once with resize_token_embeddings({sampled})"
        raise UserError(
            f"{name}: its vocabulary has {rows} rows, but {policy_name} samples from {sampled} "
            f"(the tokenizer has {len(tokenizer)} tokens); {remedy} and save_pretrained"
        )
