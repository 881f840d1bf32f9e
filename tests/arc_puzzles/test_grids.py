"""Grids: which values are refused, and the text formats, written and read back."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from puzzle_cases import small_grids

from arc_puzzles.grids import (
    ENCODERS,
    ArcFormatError,
    GridCodeBlockEncoder,
    GridEncoder,
    GridShapeEncoder,
    GridWithSeparationEncoder,
    MinimalGridEncoder,
    RowNumberEncoder,
    RowsEncoder,
    create_grid_encoder,
    validate_grid,
)

GRID = ((1, 0, 0), (0, 1, 0))

quick = settings(derandomize=True, deadline=None, max_examples=60, database=None)

grids = st.tuples(st.integers(1, 30), st.integers(1, 30)).flatmap(
    lambda shape: st.tuples(*[st.tuples(*[st.integers(0, 9)] * shape[1])] * shape[0])
)
plain: list[RowsEncoder] = [
    MinimalGridEncoder(),
    *map(GridWithSeparationEncoder, ("|", " ", ",", "-+-")),
]
rows: list[RowsEncoder] = [*plain, *map(RowNumberEncoder, plain)]
all_encoders: list[GridEncoder] = [*rows, *map(GridCodeBlockEncoder, rows), *map(GridShapeEncoder, rows)]
encoders = st.sampled_from(all_encoders)


# --- Validation ---------------------------------------------------------------------------------------------


def test_a_valid_grid_becomes_tuples():
    assert validate_grid([[1, 0, 0], [0, 1, 0]], "g") == GRID
    assert validate_grid([[9] * 30] * 30, "g") == ((9,) * 30,) * 30


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("12", "train[0].input is a text, not a list of rows"),
        (None, "train[0].input is null, not a list of rows"),
        ({"0": [1]}, "train[0].input is an object, not a list of rows"),
        (((1, 2),), "train[0].input is a tuple, not a list of rows"),
        ([], "train[0].input has 0 rows; a grid has 1 to 30"),
        ([[1]] * 31, "train[0].input has 31 rows; a grid has 1 to 30"),
        ([[1, 2], 3], "train[0].input row 1 is a number, not a list of cells"),
        ([[1], []], "train[0].input row 1 has 0 cells; a row has 1 to 30"),
        ([[1] * 31], "train[0].input row 0 has 31 cells; a row has 1 to 30"),
        ([[1, 2], [1, 2], [1, 2], [3]], "train[0].input row 3 has 1 cells, but row 0 has 2"),
        ([[1, 1.5]], "train[0].input row 0 column 1 is a float, not an integer"),
        ([[1.0]], "train[0].input row 0 column 0 is a float, not an integer"),
        ([["1"]], "train[0].input row 0 column 0 is a text, not an integer"),
        ([[1, True]], "train[0].input row 0 column 1 is a boolean, not an integer"),
        ([[None]], "train[0].input row 0 column 0 is null, not an integer"),
        ([[[1]]], "train[0].input row 0 column 0 is a list, not an integer"),
        ([[0], [10]], "train[0].input row 1 column 0 is not a colour from 0 to 9"),
        ([[-1]], "train[0].input row 0 column 0 is not a colour from 0 to 9"),
    ],
)
def test_a_value_that_is_no_grid_is_refused_with_the_place_of_the_error(value: object, message: str):
    with pytest.raises(ArcFormatError, match=f"^{re.escape(message)}$"):
        validate_grid(value, "train[0].input")


# --- Text formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MinimalGridEncoder()", "100\n010"),
        ("GridWithSeparationEncoder('|')", "1|0|0\n0|1|0"),
        ("RowNumberEncoder(MinimalGridEncoder())", "1 100\n2 010"),
        ("GridCodeBlockEncoder(MinimalGridEncoder())", "```grid\n100\n010\n```"),
        ("GridShapeEncoder(MinimalGridEncoder())", "```grid shape: 2x3\n100\n010\n```"),
        ("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))", "```grid shape: 2x3\n1 100\n2 010\n```"),
    ],
)
def test_each_format_by_example(name: str, text: str):
    encoder = create_grid_encoder(name)
    assert encoder.encode(GRID) == text
    assert encoder.decode(text) == GRID
    assert str(encoder) == name


@quick
@given(encoders, grids)
def test_decode_returns_the_encoded_grid_and_find_finds_it_in_a_text(encoder: GridEncoder, grid):
    text = encoder.encode(grid)
    assert encoder.decode(text) == grid
    assert encoder.find(f"Let me think.\n\n{text}\n\nThat is it.") == text


@settings(quick, max_examples=300)
@given(encoders, encoders, small_grids, st.data())
def test_decode_accepts_only_texts_that_encode_writes(encoder: GridEncoder, other: GridEncoder, grid, data):
    """Damage a text, or take another format's: it is refused, or it is the exact text of another grid."""
    text = other.encode(grid)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 2)))
    text = text[:start] + data.draw(st.text("0123 |\n`x٣", max_size=2)) + text[end:]
    try:
        decoded = encoder.decode(text)
    except ArcFormatError:
        return
    assert encoder.encode(decoded) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MinimalGridEncoder()", ""),
        ("MinimalGridEncoder()", "12\n3"),
        ("MinimalGridEncoder()", "12\n"),
        ("MinimalGridEncoder()", "1٣"),  # another script's digit three, which int() would take
        ("MinimalGridEncoder()", "1" * 31),
        ("GridWithSeparationEncoder('|')", "1|2|"),
        ("GridWithSeparationEncoder('|')", "12"),
        ("RowNumberEncoder(MinimalGridEncoder())", "1 12\n3 34"),
        ("RowNumberEncoder(MinimalGridEncoder())", "01 12"),
        ("GridCodeBlockEncoder(MinimalGridEncoder())", "12"),
        ("GridCodeBlockEncoder(MinimalGridEncoder())", "```grid\n12\n"),
        ("GridCodeBlockEncoder(MinimalGridEncoder())", "```grid\n```"),
        ("GridCodeBlockEncoder(MinimalGridEncoder())", "```grid shape: 1x2\n12\n```"),
        ("GridShapeEncoder(MinimalGridEncoder())", "```grid shape: 2x1\n12\n```"),
    ],
)
def test_decode_refuses_a_malformed_text(name: str, text: str):
    with pytest.raises(ArcFormatError):
        create_grid_encoder(name).decode(text)


# --- Encoders by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", all_encoders, ids=str)
def test_the_name_of_an_encoder_creates_an_equal_encoder(encoder: GridEncoder):
    assert create_grid_encoder(str(encoder)) == encoder


def test_every_known_encoder_has_an_example_that_works():
    for name, (kind, example) in ENCODERS.items():
        assert isinstance(create_grid_encoder(example), kind)
        assert example.startswith(name)


def test_names_may_have_spaces_and_either_quote():
    written = create_grid_encoder(' RowNumberEncoder( GridWithSeparationEncoder( "|" ) ) ')
    assert str(written) == "RowNumberEncoder(GridWithSeparationEncoder('|'))"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "",
            "at its end: expected one of the known encoders MinimalGridEncoder, GridWithSeparationEncoder, ",
        ),
        ("FooEncoder()", "at 'FooEncoder()': expected one of the known encoders MinimalGridEncoder, "),
        ("GridShapeEncoder(Foo())", "at 'Foo())': expected one of the known encoders"),
        (
            "MinimalGridEncoder",
            "at its end: write MinimalGridEncoder with parentheses, as in MinimalGridEncoder()",
        ),
        ("MinimalGridEncoder('|')", "at ')': write MinimalGridEncoder with parentheses"),
        ("GridWithSeparationEncoder()", "at ')': write GridWithSeparationEncoder with parentheses, as in"),
        ("GridWithSeparationEncoder('1')", "the separator 1 cannot be used"),
        ("GridWithSeparationEncoder('')", "the separator  cannot be used"),
        ("GridWithSeparationEncoder('\n')", "cannot be used"),
        (
            "GridWithSeparationEncoder(MinimalGridEncoder())",
            "the separator MinimalGridEncoder() cannot be used",
        ),
        ("RowNumberEncoder('|')", "RowNumberEncoder numbers plain rows, it cannot enclose |"),
        ("RowNumberEncoder(GridShapeEncoder(MinimalGridEncoder()))", "it cannot enclose GridShapeEncoder("),
        (
            "GridShapeEncoder(GridCodeBlockEncoder(MinimalGridEncoder()))",
            "it cannot enclose GridCodeBlockEncoder(",
        ),
        ("GridShapeEncoder(MinimalGridEncoder()", "at its end: write GridShapeEncoder with parentheses"),
        ("GridShapeEncoder(MinimalGridEncoder(), 3)", "at ', 3)': write GridShapeEncoder with parentheses"),
        ("MinimalGridEncoder())", "at ')': nothing more was expected here"),
        ("MinimalGridEncoder().__class__", "at '.__class__': nothing more was expected here"),
        ("__import__('os').getcwd()", "expected one of the known encoders"),
        ("RowNumberEncoder(" * 5000, "a grid encoder's name has at most 200 characters, this one 85000"),
    ],
)
def test_a_malformed_name_is_refused_with_the_place_of_the_error(name: str, problem: str):
    with pytest.raises(ArcFormatError, match=re.escape(problem)):
        create_grid_encoder(name)


@settings(quick, max_examples=200)
@given(st.text("GridShapeEncoder(Minimal)'| ") | st.text())
def test_any_name_creates_an_encoder_or_raises_arc_format_error(name: str):
    try:
        encoder = create_grid_encoder(name)
    except ArcFormatError:
        return
    assert isinstance(encoder, GridEncoder)
