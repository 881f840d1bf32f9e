"""ARC grids: their validation, and the text formats in which a model reads and writes them.

A grid is a tuple of rows, each a tuple of colours 0..9; 1 to 30 rows, 1 to 30 columns.

    >>> encoder = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
    >>> print(encoder.encode(((1, 0, 0), (0, 1, 0))))
    ```grid shape: 2x3
    1 100
    2 010
    ```
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

Grid = tuple[tuple[int, ...], ...]

MAX_SIDE = 30
COLOURS = 10


class ArcFormatError(ValueError):
    """Says which part of ARC data, of a grid's text or of a name is malformed, and how."""


def validate_grid(value: object, where: str) -> Grid:
    """Turns `value`, as parsed from JSON, into a grid.

    Raises ArcFormatError unless `value` is a list of 1 to 30 equally long lists of 1 to 30 integers 0..9.
    A boolean is no integer, nor is 1.0. The error calls the value `where` and counts rows and columns from 0.
    """
    if not isinstance(value, list):
        raise ArcFormatError(f"{where} is {_kind(value)}, not a list of rows")
    if not 1 <= len(value) <= MAX_SIDE:
        raise ArcFormatError(f"{where} has {len(value)} rows; a grid has 1 to {MAX_SIDE}")
    for i, row in enumerate(value):
        if not isinstance(row, list):
            raise ArcFormatError(f"{where} row {i} is {_kind(row)}, not a list of cells")
        if not 1 <= len(row) <= MAX_SIDE:
            raise ArcFormatError(f"{where} row {i} has {len(row)} cells; a row has 1 to {MAX_SIDE}")
        if len(row) != len(value[0]):
            raise ArcFormatError(f"{where} row {i} has {len(row)} cells, but row 0 has {len(value[0])}")
        for j, cell in enumerate(row):
            if type(cell) is not int:  # isinstance would let True through
                raise ArcFormatError(f"{where} row {i} column {j} is {_kind(cell)}, not an integer")
            if not 0 <= cell < COLOURS:
                raise ArcFormatError(f"{where} row {i} column {j} is not a colour from 0 to {COLOURS - 1}")
    return tuple(tuple(row) for row in value)


def _kind(value: object) -> str:
    """Names the kind of a parsed JSON value."""
    words = {"bool": "a boolean", "dict": "an object", "float": "a float", "int": "a number"}
    words |= {"list": "a list", "str": "a text", "NoneType": "null"}
    name = type(value).__name__
    return words.get(name, f"a {name}")


# --- Text formats -------------------------------------------------------------------------------------------


class GridEncoder(ABC):
    """Writes grids as text and reads them back. `create_grid_encoder(str(encoder))` gives an equal one."""

    @abstractmethod
    def encode(self, grid: Grid) -> str:
        """Returns the grid as text, without a newline at the end."""

    @abstractmethod
    def decode(self, text: str) -> Grid:
        """Returns the grid that `encode` writes as exactly this text; raises ArcFormatError if none is."""

    @abstractmethod
    def find(self, text: str) -> str | None:
        """Returns the last part of `text` that is laid out like a grid, valid or not; None without one."""

    def __str__(self) -> str:
        return f"{type(self).__name__}()"


class RowsEncoder(GridEncoder):
    """Writes one line per row. Subclasses define the line; rows are numbered from 1."""

    @property
    @abstractmethod
    def row_pattern(self) -> str:
        """Returns the regular expression that every line of the format matches."""

    @abstractmethod
    def encode_row(self, row: tuple[int, ...], number: int) -> str:
        """Returns the line of one row."""

    @abstractmethod
    def decode_row(self, line: str, number: int) -> list[int]:
        """Returns the cells of a line that matches `row_pattern`."""

    def encode(self, grid: Grid) -> str:
        return "\n".join(self.encode_row(row, number) for number, row in enumerate(grid, start=1))

    def decode(self, text: str) -> Grid:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not re.fullmatch(self.row_pattern, line):
                raise ArcFormatError(f"line {number} of the grid is not a row of {self}: {line[:80]!r}")
            rows.append(self.decode_row(line, number))
        return validate_grid(rows, "the grid")

    def find(self, text: str) -> str | None:
        # Take the whole run of rows: a ragged or oversized grid must not be cut to a part that fits.
        run: list[str] = []
        for line in reversed(text.strip().split("\n")):
            if re.fullmatch(self.row_pattern, line):
                run.append(line)
            elif run:
                break
        return "\n".join(reversed(run)) if run else None


@dataclass(frozen=True)
class MinimalGridEncoder(RowsEncoder):
    """Writes the digits of a row and nothing else: `102`."""

    @property
    def row_pattern(self) -> str:
        return "[0-9]+"

    def encode_row(self, row: tuple[int, ...], number: int) -> str:
        return "".join(map(str, row))

    def decode_row(self, line: str, number: int) -> list[int]:
        return [int(cell) for cell in line]


@dataclass(frozen=True)
class GridWithSeparationEncoder(RowsEncoder):
    """Writes the digits of a row with a separator between them: `1|0|2`."""

    separator: str

    def __post_init__(self) -> None:
        if not isinstance(self.separator, str) or not re.fullmatch(
            r"[!#-&(-/:-@\[\]^_{-~]+| ", self.separator
        ):
            raise ArcFormatError(
                f"the separator {self.separator} cannot be used; "
                "it is one space, or ASCII punctuation other than quotes and backslash, as in '|'"
            )

    def __str__(self) -> str:
        return f"{type(self).__name__}('{self.separator}')"

    @property
    def row_pattern(self) -> str:
        return f"[0-9](?:{re.escape(self.separator)}[0-9])*"

    def encode_row(self, row: tuple[int, ...], number: int) -> str:
        return self.separator.join(map(str, row))

    def decode_row(self, line: str, number: int) -> list[int]:
        return [int(cell) for cell in line.split(self.separator)]


@dataclass(frozen=True)
class RowNumberEncoder(RowsEncoder):
    """Writes the row's number before each line of another format: `2 102`."""

    inner: RowsEncoder

    def __post_init__(self) -> None:
        if not isinstance(self.inner, MinimalGridEncoder | GridWithSeparationEncoder):
            raise ArcFormatError(f"RowNumberEncoder numbers plain rows, it cannot enclose {self.inner}")

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.inner})"

    @property
    def row_pattern(self) -> str:
        return f"[1-9][0-9]* {self.inner.row_pattern}"

    def encode_row(self, row: tuple[int, ...], number: int) -> str:
        return f"{number} {self.inner.encode_row(row, number)}"

    def decode_row(self, line: str, number: int) -> list[int]:
        prefix, _, rest = line.partition(" ")
        if prefix != str(number):
            raise ArcFormatError(f"line {number} of the grid has the row number {prefix[:80]}")
        return self.inner.decode_row(rest, number)


@dataclass(frozen=True)
class GridCodeBlockEncoder(GridEncoder):
    """Writes the rows inside a Markdown code block that opens with the line "```grid"."""

    inner: RowsEncoder

    def __post_init__(self) -> None:
        if not isinstance(self.inner, RowsEncoder):
            raise ArcFormatError(f"{type(self).__name__} encloses rows, it cannot enclose {self.inner}")

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.inner})"

    def opening(self, grid: Grid) -> str:
        """Returns the first line of the block."""
        return "```grid"

    def encode(self, grid: Grid) -> str:
        return f"{self.opening(grid)}\n{self.inner.encode(grid)}\n```"

    def decode(self, text: str) -> Grid:
        opening, *rows, closing = text.split("\n") if text.count("\n") >= 2 else ("", "")
        if closing != "```":
            raise ArcFormatError("the grid is not a code block that is closed on a line of its own")
        grid = self.inner.decode("\n".join(rows))
        if opening != self.opening(grid):
            raise ArcFormatError(
                f"the code block opens with {opening[:80]!r}, not with {self.opening(grid)!r}"
            )
        return grid

    def find(self, text: str) -> str | None:
        block = None
        lines = text.split("\n")
        start = None
        for i, line in enumerate(lines):
            if line.startswith("```grid"):
                start = i
            elif line.rstrip() == "```" and start is not None:
                block = "\n".join([*lines[start:i], "```"])
                start = None
        return block


@dataclass(frozen=True)
class GridShapeEncoder(GridCodeBlockEncoder):
    """Writes a code block whose first line gives the shape, rows before columns: "```grid shape: 2x3"."""

    def opening(self, grid: Grid) -> str:
        return f"```grid shape: {len(grid)}x{len(grid[0])}"


# Each known encoder, with an example of its name.
ENCODERS: dict[str, tuple[type[GridEncoder], str]] = {
    "MinimalGridEncoder": (MinimalGridEncoder, "MinimalGridEncoder()"),
    "GridWithSeparationEncoder": (GridWithSeparationEncoder, "GridWithSeparationEncoder('|')"),
    "RowNumberEncoder": (RowNumberEncoder, "RowNumberEncoder(MinimalGridEncoder())"),
    "GridCodeBlockEncoder": (GridCodeBlockEncoder, "GridCodeBlockEncoder(MinimalGridEncoder())"),
    "GridShapeEncoder": (GridShapeEncoder, "GridShapeEncoder(MinimalGridEncoder())"),
}

MAX_NAME = 200  # far longer than the name of any encoder; bounds the parser's recursion


def create_grid_encoder(name: str) -> GridEncoder:
    """Returns the encoder of a nested name, e.g. "GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))".

    The name is parsed, never evaluated. Raises ArcFormatError, which quotes the part that could not
    be parsed.
    """
    if len(name) > MAX_NAME:
        raise ArcFormatError(f"a grid encoder's name has at most {MAX_NAME} characters, this one {len(name)}")
    encoder, end = _parse_encoder(name, 0)
    if name[end:].strip():
        raise _name_error(name, end, "nothing more was expected here")
    return encoder


def _parse_encoder(name: str, start: int) -> tuple[GridEncoder, int]:
    """Returns the encoder whose name begins at `start`, and the index after its closing parenthesis."""
    head = re.compile(r"\s*(\w+)\s*").match(name, start)
    if not head or head[1] not in ENCODERS:
        raise _name_error(name, start, f"expected one of the known encoders {', '.join(ENCODERS)}")
    kind, example = ENCODERS[head[1]]
    expected = f"write {head[1]} with parentheses, as in {example}"
    if name[head.end() : head.end() + 1] != "(":
        raise _name_error(name, head.end(), expected)
    position = head.end() + 1
    arguments: list[object] = []
    if text := re.compile(r"\s*(?:'([^']*)'|\"([^\"]*)\")").match(name, position):
        arguments.append(text[1] if text[1] is not None else text[2])
        position = text.end()
    elif re.compile(r"\s*\w").match(name, position):
        inner, position = _parse_encoder(name, position)
        arguments.append(inner)
    closing = re.compile(r"\s*\)").match(name, position)
    if not closing or len(arguments) != (0 if kind is MinimalGridEncoder else 1):
        raise _name_error(name, position, expected)
    try:
        return kind(*arguments), closing.end()
    except ArcFormatError as error:
        raise _name_error(name, start, str(error)) from None


def _name_error(name: str, position: int, problem: str) -> ArcFormatError:
    rest = name[position:].strip()
    return ArcFormatError(f"grid encoder {name!r}, at {repr(rest) if rest else 'its end'}: {problem}")
