"""Whether two models share a tokenizer: token ids of the policy are scored by the RM as they are.

Left out: a translation between vocabularies. Padding is not compared: nothing is ever padded with
a token that is scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2srm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Differs between tokenizers with one vocabulary but other merges, normalisation or pre-tokens.
_PROBE = "It's 1234 o'clock,\n\n  said the Queen: \tÉtés naïfs, ½ 東京 🙂 don't unhappily!"


def check_same_tokenizer(
    policy_tok: PreTrainedTokenizerBase,
    other_tok: PreTrainedTokenizerBase,
    other_name: str,
    policy_name: str = "the policy",
) -> None:
    """UserError naming the first difference: vocabulary size, token, special token, or encoding.

    other_name says which model the second tokenizer belongs to, as "reward.model.path runs/rm".
    """
    fault = _difference(policy_tok, other_tok, policy_name)
    if fault is not None:
        raise UserError(f"{other_name} does not have the tokenizer of {policy_name}: {fault}")


def _difference(
    policy_tok: PreTrainedTokenizerBase, other_tok: PreTrainedTokenizerBase, policy_name: str
) -> str | None:
    policy_vocab, other_vocab = policy_tok.get_vocab(), other_tok.get_vocab()
    if len(policy_tok) != len(other_tok):
        fault = f"it has {len(other_tok)} tokens, {policy_name} has {len(policy_tok)}"
        only = sorted(policy_vocab.keys() ^ other_vocab.keys())
        return f"{fault} (only one has {', '.join(map(repr, only[:3]))})" if only else fault
    for token, token_id in sorted(policy_vocab.items(), key=lambda item: item[1]):
        if other_vocab.get(token) != token_id:
            there = f"id {other_vocab[token]}" if token in other_vocab else "no id"
            return f"token {token!r} has {there} in it, and id {token_id} in {policy_name}"
    for name in ("bos_token", "eos_token", "unk_token"):
        mine, theirs = getattr(policy_tok, name), getattr(other_tok, name)
        if mine != theirs:
            return f"its {name} is {theirs!r}, that of {policy_name} is {mine!r}"
    if _probe(policy_tok) != _probe(other_tok):
        return f"the vocabularies agree, but {_PROBE!r} is encoded differently"
    return None


def _probe(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
