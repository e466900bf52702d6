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
    rm_tok: PreTrainedTokenizerBase,
    policy_name: str,
    rm_name: str,
) -> None:
    """UserError naming the first difference: vocabulary size, token, special token, or encoding."""
    fault = _difference(policy_tok, rm_tok, policy_name, rm_name)
    if fault is not None:
        raise UserError(
            f"the reward model {rm_name!r} does not have the tokenizer of the policy "
            f"{policy_name!r}: {fault}"
        )


def _difference(
    policy_tok: PreTrainedTokenizerBase,
    rm_tok: PreTrainedTokenizerBase,
    policy_name: str,
    rm_name: str,
) -> str | None:
    if len(policy_tok) != len(rm_tok):
        return f"{len(policy_tok)} tokens in {policy_name!r}, {len(rm_tok)} in {rm_name!r}"
    policy_vocab, rm_vocab = policy_tok.get_vocab(), rm_tok.get_vocab()
    for token, token_id in sorted(policy_vocab.items(), key=lambda item: item[1]):
        if rm_vocab.get(token) != token_id:
            there = f"has id {rm_vocab[token]}" if token in rm_vocab else "does not exist"
            return (
                f"token {token!r} has id {token_id} in {policy_name!r} and {there} in {rm_name!r}"
            )
    for name in ("bos_token", "eos_token", "unk_token"):
        mine, theirs = getattr(policy_tok, name), getattr(rm_tok, name)
        if mine != theirs:
            return f"{name} is {mine!r} in {policy_name!r} and {theirs!r} in {rm_name!r}"
    if _probe(policy_tok) != _probe(rm_tok):
        return f"the vocabularies agree, but {_PROBE!r} is encoded differently"
    return None


def _probe(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
