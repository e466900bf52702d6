import pytest

from benchmarks.shapes import (
    CPU_SHAPES,
    NUM_ROWS,
    SEQUENCE_SHAPES,
    Shape,
    parse_sequence_shapes,
    parse_shapes,
)


def test_models_have_every_number_of_rows():
    shapes = parse_shapes(["gemma-2b"])
    assert [shape.num_rows for shape in shapes] == list(NUM_ROWS)
    assert {(shape.hidden_size, shape.vocab_size) for shape in shapes} == {(2048, 256000)}
    assert len(parse_shapes(["models"])) == 5 * len(NUM_ROWS)
    assert [s.name for s in parse_shapes(["models:64", "cpu"])][-1] == CPU_SHAPES[-1].name


def test_one_shape():
    assert parse_shapes(["llama-3-8b:77"]) == [Shape("llama-3-8b:77", 77, 4096, 128256)]
    assert parse_shapes(["3x5x7"]) == [Shape("3x5x7", 3, 5, 7)]


@pytest.mark.parametrize("text", ["gpt-5", "gemma-2b:x", "gemma-2b:0", "3x0x7", "3x5"])
def test_bad_shapes_are_named(text):
    with pytest.raises(ValueError, match="shape"):
        parse_shapes([text])


def test_sequence_shapes():
    assert parse_sequence_shapes(["sequences"]) == list(SEQUENCE_SHAPES)
    (shape,) = parse_sequence_shapes(["100/7"])
    assert (shape.num_rows, shape.num_sequences) == (100, 7)
    for text in ("7/100", "100", "100/0", "many"):
        with pytest.raises(ValueError, match=text):
            parse_sequence_shapes([text])
