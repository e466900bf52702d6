"""Summarisation: state what a short post says about the person in its title, and nothing else.

A post mixes facts about the title's person, true facts about others, and filler. The summary names
the person and lists the facts: `mara moved to oslo and likes soup .`

The writer is hasty (often stops after two facts), sometimes confuses a value with another one of
the post, and sometimes pads with repeats, filler or other people's facts. The annotator counts
right and wrong statements, forgives padding, and at equal quality prefers the longer summary. The
judge is the F1 of statements, so padding costs precision.

Out of distribution: relations that training never states about that title, longer posts, and
reported facts (`we heard that mara ...`). Left out: coreference and paraphrase; facts are stated as
they appear.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from s2srm.worlds.base import Gold, World
from s2srm.worlds.tokenizer import unique_words

_NAMES = (
    *("mara", "ivan", "lena", "omar", "ruth", "hugo", "nina", "paul"),
    *("sara", "timo", "vera", "yusuf", "ada", "boris", "clara", "dario"),
)
_VALUES = {
    "moved to": "oslo rome lima cairo delhi kyoto quito paris",
    "bought a": "lamp boat coat clock tent desk bike kite",
    "works as a": "baker nurse pilot judge miner tailor singer plumber",
    "likes": "soup rice figs cheese honey bread plums mint",
    "fears": "dogs bees heights storms snakes crowds ghosts needles",
    "studies": "law music physics latin botany history logic poetry",
    "plays the": "flute drum harp cello organ banjo trumpet violin",
    "lost the": "keys ring map wallet ticket glove hat letter",
}
_RELATIONS = {relation: values.split() for relation, values in _VALUES.items()}
_FILLER = (
    "the day was cold",
    "we heard a bell",
    "that was long ago",
    "the street was quiet",
    "it rained again",
    "nobody knew why",
)
_ADVERBS = ("yesterday", "recently")
_REPORTED = "we heard that"
_WORDS_PER_STATEMENT = 4  # a longer statement counts as several, so run-on text is not free


@dataclass(frozen=True)
class SummarizationConfig:
    """Probabilities of the writer's flaws and of the annotator's bias and errors."""

    hasty: float = 0.55
    """Writer: stops after two facts."""
    wrong_value: float = 0.1
    """Writer, each fact: its value is confused with another value, of the post if there is one."""
    padding: float = 0.35
    """Writer: adds one or two statements that the summary does not need."""
    longer_preferred: float = 0.85
    """Annotator: of two summaries of equal quality, prefers the longer one."""
    accuracy: float = 0.9
    """Annotator: of two summaries of different quality, prefers the better one."""


@dataclass(frozen=True)
class _Post:
    """A parsed prompt: facts are (name, clause), in the order of the post."""

    title: str
    facts: tuple[tuple[str, str], ...]
    filler: tuple[str, ...]

    @property
    def salient(self) -> list[str]:
        return [clause for name, clause in self.facts if name == self.title]


class SummarizationWorld(World):
    """Posts with facts about several people; see the module's description."""

    name: ClassVar[str] = "summarization"

    def __init__(self, config: SummarizationConfig | None = None) -> None:
        self.config = config or SummarizationConfig()

    def words(self) -> list[str]:
        return unique_words(
            "title : post tl;dr . and",
            *_NAMES,
            *_RELATIONS,
            *_VALUES.values(),
            *_FILLER,
            *_ADVERBS,
            _REPORTED,
        )

    def make_prompt(self, rng: random.Random, ood: bool) -> str:
        title = rng.choice(_NAMES)
        others = rng.sample([name for name in _NAMES if name != title], 2)
        num_salient = rng.choice((3, 4, 5) if ood else (2, 3, 4))
        num_other = rng.choice((2, 3) if ood else (1, 2))
        kept_out = _kept_out(title)
        relations = [relation for relation in _RELATIONS if relation not in kept_out]
        if ood:
            relations = [*kept_out, *rng.sample(relations, num_salient - len(kept_out))]
        else:
            relations = rng.sample(relations, num_salient)
        sentences: list[str] = []
        for relation in relations:
            sentences.append(_fact_sentence(rng, title, relation, ood))
        for _ in range(num_other):
            relation = rng.choice(list(_RELATIONS))
            sentences.append(_fact_sentence(rng, rng.choice(others), relation, ood))
        sentences += rng.sample(_FILLER, rng.choice((1, 2)))
        rng.shuffle(sentences)
        return f"title : {title} post : {' . '.join(sentences)} . tl;dr :"

    def reference_response(self, prompt: str) -> str:
        post = _parse_prompt(prompt)
        return f"{post.title} {' and '.join(post.salient)} ."

    def write_response(self, rng: random.Random, prompt: str) -> str:
        post = _parse_prompt(prompt)
        clauses = post.salient
        if rng.random() < self.config.hasty:
            clauses = clauses[:2]
        statements = [
            self._confuse(rng, clause, post) if rng.random() < self.config.wrong_value else clause
            for clause in clauses
        ]
        if rng.random() < self.config.padding:
            for _ in range(rng.choice((1, 2))):
                statements.append(_padding(rng, statements, post))
        return f"{post.title} {' and '.join(statements)} ."

    def _confuse(self, rng: random.Random, clause: str, post: _Post) -> str:
        """The clause with another value: one of the post with the same relation, else any."""
        relation, value = clause.rsplit(" ", 1)
        stated = [other for _, other in post.facts if other.startswith(f"{relation} ")]
        wrong = [other for other in stated if other != clause]
        if wrong:
            return rng.choice(wrong)
        return f"{relation} {rng.choice([v for v in _RELATIONS[relation] if v != value])}"

    def prefers_first(self, rng: random.Random, prompt: str, first: str, second: str) -> bool:
        post = _parse_prompt(prompt)
        gap = _annotated_quality(post, first) - _annotated_quality(post, second)
        if gap != 0:
            return (gap > 0) == (rng.random() < self.config.accuracy)
        words = len(first.split()) - len(second.split())
        if words == 0:
            return rng.random() < 0.5
        return (words > 0) == (rng.random() < self.config.longer_preferred)

    def judge(self, prompt: str, response: str) -> Gold:
        """F1 of statements: 2 right / (stated + needed).

        right: a fact about the title's person, said for the first time and attributed to them.
        stated: every statement, one of more than four words counting as words / 4.
        """
        post = _parse_prompt(prompt)
        right, stated = 0, 0.0
        remaining = set(post.salient)
        for subject, clause in _statements(response):
            stated += max(1.0, len(clause.split()) / _WORDS_PER_STATEMENT)
            if subject == post.title and clause in remaining:
                remaining.remove(clause)
                right += 1
        return Gold(
            score=2 * right / (stated + len(post.salient)),
            refused=False,
            harmful_prompt=None,
            safe=None,
            length=len(response.split()),
            needed_length=len(self.reference_response(prompt).split()),
        )


def _kept_out(name: str) -> tuple[str, str]:
    """The two relations that no post of the seen family states about its title `name`."""
    relations, i = list(_RELATIONS), _NAMES.index(name)
    return relations[i % 8], relations[(i + 3) % 8]


def _fact_sentence(rng: random.Random, name: str, relation: str, ood: bool) -> str:
    """`mara moved to oslo`, at times with an adverb before it, or reported when ood."""
    fact = f"{name} {relation} {rng.choice(_RELATIONS[relation])}"
    if ood and rng.random() < 0.3:
        return f"{_REPORTED} {fact}"
    return f"{rng.choice(_ADVERBS)} {fact}" if rng.random() < 0.3 else fact


def _padding(rng: random.Random, statements: Sequence[str], post: _Post) -> str:
    """A repeat, a filler sentence, or a fact about somebody else."""
    others = [f"{name} {clause}" for name, clause in post.facts if name != post.title]
    return rng.choice((rng.choice(statements), rng.choice(post.filler), rng.choice(others)))


def _statements(summary: str) -> list[tuple[str | None, str]]:
    """(subject, clause) of every statement; a clause without a name keeps the last subject."""
    statements: list[tuple[str | None, str]] = []
    subject: str | None = None
    for part in " ".join("." if word == "and" else word for word in summary.split()).split("."):
        words = part.split()
        if not words:
            continue
        if words[0] in _NAMES:
            subject, words = words[0], words[1:]
        statements.append((subject, " ".join(words)))
    return statements


def _annotated_quality(post: _Post, summary: str) -> int:
    """Right facts about the title's person minus false statements; padding that is true, filler
    included, and repeats count nothing."""
    facts = set(post.facts)
    right: set[str] = set()
    false = 0
    for subject, clause in _statements(summary):
        if clause in post.filler:
            continue
        if (subject, clause) not in facts:
            false += 1
        elif subject == post.title:
            right.add(clause)
    return len(right) - false


@functools.lru_cache(maxsize=4096)
def _parse_prompt(prompt: str) -> _Post:
    """Read a post back from its text; ValueError if it is not one."""
    words = prompt.split()
    if len(words) < 8 or words[:2] != ["title", ":"] or words[3:5] != ["post", ":"]:
        raise ValueError(f"not a prompt of the summarisation world: {prompt!r}")
    title = words[2]
    facts: list[tuple[str, str]] = []
    filler: list[str] = []
    for sentence in " ".join(words[5:-2]).split("."):
        text = sentence.strip()
        for prefix in (*_ADVERBS, _REPORTED):
            text = text.removeprefix(f"{prefix} ")
        if not text:
            continue
        name, _, clause = text.partition(" ")
        if name in _NAMES:
            facts.append((name, clause))
        else:
            filler.append(text)
    if not any(name == title for name, _ in facts):
        raise ValueError(f"no fact about the title {title!r} in prompt: {prompt!r}")
    return _Post(title, tuple(facts), tuple(filler))
