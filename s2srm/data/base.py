"""What an adapter of any format offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from s2srm.data.columns import ColumnNames, history_of, system_of
from s2srm.data.fields import Fields
from s2srm.data.messages import in_context
from s2srm.data.schema import Need, PromptText

Pair = tuple[PromptText, str, str]


class Adapter(ABC):
    """What every format offers; prompt, preference and demonstration raise BadRow."""

    name: str

    def __init__(self, names: ColumnNames, columns: Sequence[str]) -> None:
        self.names = names
        self.columns = frozenset(columns)

    @abstractmethod
    def required(self, need: Need, response_column: str) -> dict[str, str]:
        """Columns without which no row can be used: key of data.columns (or name) -> column."""

    @abstractmethod
    def prompt(self, row: Fields) -> PromptText:
        """The prompt alone."""

    @abstractmethod
    def preference(self, row: Fields) -> Pair:
        """Prompt, chosen, rejected."""

    @abstractmethod
    def demonstration(self, row: Fields, response_column: str) -> tuple[PromptText, str]:
        """Prompt and the response to imitate: the chosen one, or the column `response`."""

    def reads(self, need: Need, response_column: str) -> list[str]:
        """Every column that is read where a row has it."""
        context = (*self.names.system, self.names.history, self.names.input)
        return [*self.required(need, response_column).values(), *filter(None, context)]

    def in_context(self, row: Fields, prompt: PromptText) -> PromptText:
        """The prompt after the system turn and the history that stand in columns of their own."""
        system = system_of(row, self.names.system)
        return in_context(prompt, system, history_of(row, self.names.history))
