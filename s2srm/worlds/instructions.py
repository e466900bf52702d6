"""Instruction following: transform a list of words and write it in the format asked for.

`instruction : sort then uppercase format : commas ending : done input : pear goat fig output :` is
answered by `FIG , GOAT , PEAR done`.

The writer slips: items are dropped, swapped, repeated or replaced, the second operation, the format
or the ending are forgotten (the ending more often than not). The annotator prefers the better of
two answers and errs at a stated rate; it has no other bias. The judge gives partial credit for
content in order, format and ending.

Out of distribution: pairs of operations that never occur together in that order in training. Left
out: nested or conditional instructions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from rapidfuzz.distance import Levenshtein

from s2srm.worlds.base import Gold, World
from s2srm.worlds.tokenizer import unique_words

_ANIMALS = ("ant", "bear", "cow", "deer", "eel", "fox", "goat", "hen")
_PLANTS = ("apple", "beet", "corn", "date", "elm", "fig", "grape", "herb")
_ITEMS = (*_ANIMALS, *_PLANTS)
_NUMBERS = tuple(str(number) for number in range(10))


def _first_two(items: list[str]) -> list[str]:
    return items[:2]


def _only_animals(items: list[str]) -> list[str]:
    return [item for item in items if item.lower() in _ANIMALS]


def _only_plants(items: list[str]) -> list[str]:
    return [item for item in items if item.lower() in _PLANTS]


def _count(items: list[str]) -> list[str]:
    return [str(len(items))]


_OPERATIONS: dict[str, Callable[[list[str]], list[str]]] = {
    "sort": lambda items: sorted(items, key=str.lower),
    "reverse": lambda items: items[::-1],
    "uppercase": lambda items: [item.upper() for item in items],
    "animals": _only_animals,
    "plants": _only_plants,
    "first": _first_two,
    "count": _count,
    "copy": list,
}
_OOD_PAIRS = (
    ("sort", "uppercase"),
    ("animals", "reverse"),
    ("reverse", "first"),
    ("plants", "count"),
    ("uppercase", "animals"),
)
_FORMATS = ("plain", "commas", "dashes")
_ENDINGS = ("none", "done", "over")


@dataclass(frozen=True)
class InstructionConfig:
    """Probabilities of the writer's slips and of the annotator's errors."""

    slip: float = 0.3
    """Writer: one item is dropped, swapped with its neighbour, repeated or replaced."""
    forget_operation: float = 0.15
    """Writer: the last of two operations is not carried out."""
    forget_format: float = 0.15
    """Writer: another format is used."""
    forget_ending: float = 0.55
    """Writer: an ending that was asked for is left out."""
    accuracy: float = 0.9
    """Annotator: of two answers of different score, prefers the better one."""


@dataclass(frozen=True)
class _Task:
    operations: tuple[str, ...]
    format: str
    ending: str
    items: tuple[str, ...]

    def content(self, operations: tuple[str, ...]) -> list[str]:
        items = list(self.items)
        for operation in operations:
            items = _OPERATIONS[operation](items)
        return items


class InstructionWorld(World):
    """Lists to transform under format constraints; see the module's description."""

    name: ClassVar[str] = "instructions"

    def __init__(self, config: InstructionConfig | None = None) -> None:
        self.config = config or InstructionConfig()

    def words(self) -> list[str]:
        return unique_words(
            "instruction : then format ending input output , - nothing",
            *_OPERATIONS,
            *_FORMATS,
            *_ENDINGS,
            *_ITEMS,
            *(item.upper() for item in _ITEMS),
            *_NUMBERS,
        )

    def make_prompt(self, rng: random.Random, ood: bool) -> str:
        if ood:
            operations: tuple[str, ...] = rng.choice(_OOD_PAIRS)
        else:
            operations = tuple(rng.sample(list(_OPERATIONS), rng.choice((1, 2))))
            while operations in _OOD_PAIRS or operations[:-1] == ("count",):
                operations = tuple(rng.sample(list(_OPERATIONS), rng.choice((1, 2))))
        items = rng.sample(_ITEMS, rng.choice((3, 4, 5)))
        return (
            f"instruction : {' then '.join(operations)} format : {rng.choice(_FORMATS)} "
            f"ending : {rng.choice(_ENDINGS)} input : {' '.join(items)} output :"
        )

    def reference_response(self, prompt: str) -> str:
        task = _parse_prompt(prompt)
        return _render(task.content(task.operations), task.format, task.ending)

    def write_response(self, rng: random.Random, prompt: str) -> str:
        task, config = _parse_prompt(prompt), self.config
        operations, style, ending = task.operations, task.format, task.ending
        if len(operations) == 2 and rng.random() < config.forget_operation:
            operations = operations[:1]
        content = task.content(operations)
        if rng.random() < config.slip:
            content = _slip(rng, content)
        if rng.random() < config.forget_format:
            style = rng.choice([other for other in _FORMATS if other != style])
        if rng.random() < config.forget_ending:
            ending = "none"
        return _render(content, style, ending)

    def prefers_first(self, rng: random.Random, prompt: str, first: str, second: str) -> bool:
        gap = self.judge(prompt, first).score - self.judge(prompt, second).score
        if gap == 0:
            return rng.random() < 0.5
        return (gap > 0) == (rng.random() < self.config.accuracy)

    def judge(self, prompt: str, response: str) -> Gold:
        """content * (7 + 2 [format] + 1 [ending]) / 10.

        content: 1 - edit distance / longer length, between the items answered and those asked for.
        """
        task = _parse_prompt(prompt)
        words = response.split()
        ending = words.pop() if words and words[-1] in _ENDINGS else "none"
        items = [word for word in words if word not in (",", "-")]
        wanted = task.content(task.operations)
        content = Levenshtein.normalized_similarity(items, wanted or ["nothing"])
        format_kept = " ".join(words) == _render(items, task.format, "none") and bool(items)
        kept = 7 + 2 * format_kept + (ending == task.ending)
        return Gold(
            score=content * kept / 10,
            refused=False,
            harmful_prompt=None,
            safe=None,
            length=len(response.split()),
            needed_length=len(self.reference_response(prompt).split()),
        )


def _slip(rng: random.Random, content: list[str]) -> list[str]:
    """Drop, swap, repeat or replace one item; what is empty gets an item that was not there."""
    if not content:
        return [rng.choice(_ITEMS)]
    content = list(content)
    i = rng.randrange(len(content))
    kind = rng.choice(("drop", "swap", "repeat", "replace"))
    if kind == "drop" and len(content) > 1:
        del content[i]
    elif kind == "swap" and len(content) > 1:
        j = i - 1 if i else 1
        content[i], content[j] = content[j], content[i]
    elif kind == "repeat":
        content.insert(i, content[i])
    else:
        content[i] = rng.choice(_NUMBERS if content[i] in _NUMBERS else _ITEMS)
    return content


def _render(content: list[str], style: str, ending: str) -> str:
    """Write items in a format; no items are written `nothing`."""
    items = content or ["nothing"]
    if style == "commas":
        text = " , ".join(items)
    elif style == "dashes":
        text = " ".join(f"- {item}" for item in items)
    else:
        text = " ".join(items)
    return text if ending == "none" else f"{text} {ending}"


def _parse_prompt(prompt: str) -> _Task:
    """Read a task back from its text; ValueError if it is not one."""
    fields: dict[str, list[str]] = {}
    current: list[str] = []
    words = prompt.split()
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if following == ":":
            current = fields.setdefault(word, [])
        elif word != ":":
            current.append(word)
    try:
        operations = tuple(word for word in fields["instruction"] if word != "then")
        (style,), (ending,), items = fields["format"], fields["ending"], tuple(fields["input"])
    except (KeyError, ValueError):
        raise ValueError(f"not a prompt of the instruction world: {prompt!r}") from None
    known = set(operations) <= set(_OPERATIONS) and set(items) <= set(_ITEMS)
    if not (operations and items and known and style in _FORMATS and ending in _ENDINGS):
        raise ValueError(f"not a prompt of the instruction world: {prompt!r}")
    return _Task(operations, style, ending, items)
