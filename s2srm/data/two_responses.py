"""Formats of a prompt, two responses and the number of the better one.

Left out: more than two responses, and labels that are no number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from s2srm.data.base import Adapter, Pair
from s2srm.data.columns import ColumnNames
from s2srm.data.fields import BadRow, Fields, kind, text_of, zero_or_one
from s2srm.data.schema import Need, PromptText


class TwoResponses(Adapter):
    """Formats of a prompt, two responses and the number of the better one."""

    prompt_columns: tuple[str, ...]
    choice: str

    @abstractmethod
    def bare_prompt(self, row: Fields) -> str:
        """The prompt's text."""

    @abstractmethod
    def responses(self, row: Fields) -> list[str]:
        """The two responses."""

    def prompt(self, row: Fields) -> PromptText:
        return self.in_context(row, self.bare_prompt(row))

    def preference(self, row: Fields) -> Pair:
        better = zero_or_one(row, self.choice)
        texts = self.responses(row)
        return self.prompt(row), texts[better], texts[1 - better]

    def demonstration(self, row: Fields, response_column: str) -> tuple[PromptText, str]:
        if response_column == "chosen":
            return self.preference(row)[:2]
        return self.prompt(row), text_of(row, self.names.response)


class PKUSafeRLHF(TwoResponses):
    """Two responses and the number of the better or of the safer one."""

    name = "pku_saferlhf"

    def __init__(self, names: ColumnNames, columns: Sequence[str], choice: str) -> None:
        super().__init__(names, columns)
        self.choice = choice

    def required(self, need: Need, response_column: str) -> dict[str, str]:
        if need == "prompt":
            return {"prompt": "prompt"}
        if need == "demonstration" and response_column != "chosen":
            return {"prompt": "prompt", "response": self.names.response}
        columns = ("prompt", "response_0", "response_1")
        return {**{c: c for c in columns}, "preference": self.choice}

    def bare_prompt(self, row: Fields) -> str:
        return text_of(row, "prompt")

    def responses(self, row: Fields) -> list[str]:
        return [text_of(row, "response_0"), text_of(row, "response_1")]


class TLDRComparisons(TwoResponses):
    """openai/summarize_from_feedback, subset comparisons; the usual TL;DR prompt."""

    name = "tldr_comparisons"
    choice = "choice"

    def required(self, need: Need, response_column: str) -> dict[str, str]:
        if need == "prompt":
            return {"info": "info"}
        if need == "demonstration" and response_column != "chosen":
            return {"info": "info", "response": self.names.response}
        return {c: c for c in ("info", "summaries", "choice")}

    def bare_prompt(self, row: Fields) -> str:
        info = row.get("info")
        if not isinstance(info, Mapping):
            raise BadRow(f"column 'info' holds {kind(info)}, not an object")
        texts = {key: text_of(info, key, "info.").strip() for key in ("subreddit", "title", "post")}
        return (
            f"SUBREDDIT: r/{texts['subreddit']}\n\nTITLE: {texts['title']}\n\n"
            f"POST: {texts['post']}\n\nTL;DR:"
        )

    def responses(self, row: Fields) -> list[str]:
        summaries = row.get("summaries")
        if not isinstance(summaries, list) or len(summaries) != 2:
            raise BadRow("column 'summaries' must hold a list of two")
        if not all(isinstance(s, Mapping) for s in summaries):
            raise BadRow("column 'summaries' must hold objects with a field 'text'")
        return [text_of(s, "text", f"summaries[{i}].").strip() for i, s in enumerate(summaries)]
