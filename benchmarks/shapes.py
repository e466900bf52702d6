"""The shapes that are measured, by name.

Vocabulary operations: N rows (packed tokens), hidden size D, vocabulary V of real models. Sequence
operations: tokens and the number of packed sequences that they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# model: (D, V)
MODELS = {
    "gemma-2b": (2048, 256000),
    "llama-2-7b": (4096, 32000),
    "llama-3-8b": (4096, 128256),
    "gemma-3-270m": (640, 262144),
    "smollm2-135m": (576, 49152),
}
NUM_ROWS = (2048, 8192, 16384)


@dataclass(frozen=True)
class Shape:
    """Rows N, hidden size D, vocabulary V."""

    name: str
    num_rows: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class SequenceShape:
    """Tokens of all packed sequences together, and how many sequences there are."""

    name: str
    num_rows: int
    num_sequences: int


CPU_SHAPES = tuple(
    Shape(f"{n}x{d}x{v}", n, d, v)
    for n, d, v in ((2048, 640, 65536), (512, 576, 49152), (256, 640, 262144))
)
SEQUENCE_SHAPES = (
    SequenceShape("8k-short", 2**13, 2**7),
    SequenceShape("8k-one", 2**13, 1),
    SequenceShape("16m-short", 2**24, 2**15),
    SequenceShape("16m-one", 2**24, 1),
)


def model_shape(model: str, num_rows: int) -> Shape:
    """ValueError for a model that is not in MODELS."""
    if model not in MODELS:
        raise ValueError(f"shape {model!r} is not one of {', '.join(MODELS)}")
    return Shape(f"{model}:{num_rows}", num_rows, *MODELS[model])


def parse_shapes(texts: Iterable[str]) -> list[Shape]:
    """Each text is `models`, `cpu`, `gemma-2b`, `gemma-2b:8192`, `models:8192` or `512x576x49152`.

    Without a number of rows a model has all of NUM_ROWS. ValueError for anything else.
    """
    return [shape for text in texts for shape in _parse_shape(text)]


def _parse_shape(text: str) -> list[Shape]:
    if text == "cpu":
        return list(CPU_SHAPES)
    parts = text.split("x")
    if len(parts) == 3 and all(part.isdigit() and int(part) > 0 for part in parts):
        n, d, v = map(int, parts)
        return [Shape(text, n, d, v)]
    model, _, rows = text.partition(":")
    if rows and not (rows.isdigit() and int(rows) > 0):
        raise ValueError(f"shape {text!r}: {rows!r} is not a number of rows")
    counts = (int(rows),) if rows else NUM_ROWS
    models = tuple(MODELS) if model == "models" else (model,)
    return [model_shape(name, count) for count in counts for name in models]


def parse_sequence_shapes(texts: Iterable[str]) -> list[SequenceShape]:
    """Each text is `sequences` (all of SEQUENCE_SHAPES), one of their names, or `8192/128`.

    `8192/128` is 8192 tokens in 128 sequences. ValueError for anything else.
    """
    named = {shape.name: shape for shape in SEQUENCE_SHAPES}
    shapes: list[SequenceShape] = []
    for text in texts:
        tokens, _, sequences = text.partition("/")
        if text == "sequences":
            shapes += SEQUENCE_SHAPES
        elif text in named:
            shapes.append(named[text])
        elif tokens.isdigit() and sequences.isdigit() and int(tokens) >= int(sequences) > 0:
            shapes.append(SequenceShape(text, int(tokens), int(sequences)))
        else:
            raise ValueError(
                f"sequence shape {text!r} is neither `sequences`, one of {', '.join(named)}, nor "
                "tokens/sequences"
            )
    return shapes
