"""ARC grids: validation, the text formats that a model reads and writes, and the symmetries of a puzzle.

A grid is a tuple of rows, each a tuple of colours 0..9; 1 to 30 rows, 1 to 30 columns.

    >>> encoder = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
    >>> print(encoder.encode(((1, 0, 0), (0, 1, 0))))
    ```grid shape: 2x3
    1 100
    2 010
    ```
    >>> Augmentation.parse("rot90").apply(((1, 0, 0), (0, 1, 0)))
    ((0, 1), (1, 0), (0, 0))
"""

import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

Grid = tuple[tuple[int, ...], ...]

MAX_SIDE = 30
COLOURS = 10


class ArcFormatError(ValueError):
    """Something is not what ARC data, the text of a grid, or one of our names has to look like."""


def validate_grid(value: object, where: str) -> Grid:
    """`value`, as parsed from JSON, as a grid. `where` names it in errors; rows and columns count from 0.

    Raises ArcFormatError unless it is a list of 1 to 30 equally long lists of 1 to 30 integers 0..9.
    A boolean is no integer, nor is 1.0.
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
    """What a parsed JSON value is, in words."""
    words = {"bool": "a boolean", "dict": "an object", "float": "a float", "int": "a number"}
    words |= {"list": "a list", "str": "a text", "NoneType": "null"}
    name = type(value).__name__
    return words.get(name, f"a {name}")


# --- Text formats -------------------------------------------------------------------------------------------


class GridEncoder(ABC):
    """A text format for grids. `str(encoder)` is the name from which `create_grid_encoder` makes it again."""

    @abstractmethod
    def encode(self, grid: Grid) -> str:
        """The grid as text, without a newline at the end."""

    @abstractmethod
    def decode(self, text: str) -> Grid:
        """The grid that `encode` turns into exactly this text; raises ArcFormatError if there is none."""

    @abstractmethod
    def find(self, text: str) -> str | None:
        """The last part of `text` that is laid out like a grid; `decode` then says whether it is one."""

    def __str__(self) -> str:
        return f"{type(self).__name__}()"


class RowsEncoder(GridEncoder):
    """A format of one line a row. Subclasses say how a line is written; rows are numbered from 1."""

    @property
    @abstractmethod
    def row_pattern(self) -> str:
        """A regular expression for any line of the format."""

    @abstractmethod
    def encode_row(self, row: tuple[int, ...], number: int) -> str:
        """One line."""

    @abstractmethod
    def decode_row(self, line: str, number: int) -> list[int]:
        """The cells of a line that matches `row_pattern`."""

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
        # The whole run of rows, so that a ragged or oversized grid is not cut to a part that happens to fit.
        run: list[str] = []
        for line in reversed(text.strip().split("\n")):
            if re.fullmatch(self.row_pattern, line):
                run.append(line)
            elif run:
                break
        return "\n".join(reversed(run)) if run else None


@dataclass(frozen=True)
class MinimalGridEncoder(RowsEncoder):
    """The digits of a row and nothing else: `102`."""

    @property
    def row_pattern(self) -> str:
        return "[0-9]+"

    def encode_row(self, row: tuple[int, ...], number: int) -> str:
        return "".join(map(str, row))

    def decode_row(self, line: str, number: int) -> list[int]:
        return [int(cell) for cell in line]


@dataclass(frozen=True)
class GridWithSeparationEncoder(RowsEncoder):
    """The digits of a row with a separator between them: `1|0|2`."""

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
    """Each line of another format with the row's number before it: `2 102`."""

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
    """A format of rows inside a Markdown code block that opens with a line "```grid"."""

    inner: RowsEncoder

    def __post_init__(self) -> None:
        if not isinstance(self.inner, RowsEncoder):
            raise ArcFormatError(f"{type(self).__name__} encloses rows, it cannot enclose {self.inner}")

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.inner})"

    def opening(self, grid: Grid) -> str:
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
    """A code block whose first line announces the shape, rows before columns: "```grid shape: 2x3"."""

    def opening(self, grid: Grid) -> str:
        return f"```grid shape: {len(grid)}x{len(grid[0])}"


# Each known encoder, with a name that shows what goes between its parentheses.
ENCODERS: dict[str, tuple[type[GridEncoder], str]] = {
    "MinimalGridEncoder": (MinimalGridEncoder, "MinimalGridEncoder()"),
    "GridWithSeparationEncoder": (GridWithSeparationEncoder, "GridWithSeparationEncoder('|')"),
    "RowNumberEncoder": (RowNumberEncoder, "RowNumberEncoder(MinimalGridEncoder())"),
    "GridCodeBlockEncoder": (GridCodeBlockEncoder, "GridCodeBlockEncoder(MinimalGridEncoder())"),
    "GridShapeEncoder": (GridShapeEncoder, "GridShapeEncoder(MinimalGridEncoder())"),
}

MAX_NAME = 200  # far above any encoder that exists; bounds the recursion of the parser


def create_grid_encoder(name: str) -> GridEncoder:
    """The encoder of a nested name, e.g. "GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))".

    The name is parsed, never evaluated. Raises ArcFormatError that points at what is wrong.
    """
    if len(name) > MAX_NAME:
        raise ArcFormatError(f"a grid encoder's name has at most {MAX_NAME} characters, this one {len(name)}")
    encoder, end = _parse_encoder(name, 0)
    if name[end:].strip():
        raise _name_error(name, end, "nothing more was expected here")
    return encoder


def _parse_encoder(name: str, start: int) -> tuple[GridEncoder, int]:
    """The encoder whose name begins at `start`, and where its closing parenthesis is behind us."""
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


# --- Symmetries ---------------------------------------------------------------------------------------------

# Name: (mirror left to right first?, then how many quarter turns clockwise).
GEOMETRIES = {
    "identity": (False, 0),
    "rot90": (False, 1),
    "rot180": (False, 2),
    "rot270": (False, 3),
    "flip": (True, 0),
    "flip+rot90": (True, 1),
    "flip+rot180": (True, 2),
    "flip+rot270": (True, 3),
}

SAME_COLOURS = tuple(range(COLOURS))


@dataclass(frozen=True)
class Augmentation:
    """One of the eight flips and rotations (a key of GEOMETRIES), then colour c becomes `colours[c]`.

    `str()` names it, `parse` reads the name: "identity", "rot90", "flip+rot270", "rot90/c0213456789".
    Raises ArcFormatError for another geometry and for colours that are no permutation of 0..9.
    """

    geometry: str = "identity"
    colours: tuple[int, ...] = SAME_COLOURS

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise ArcFormatError(f"{self.geometry!r} is not one of the geometries {', '.join(GEOMETRIES)}")
        if tuple(sorted(self.colours)) != SAME_COLOURS:
            raise ArcFormatError(f"the colours {self.colours} are not a permutation of 0 to {COLOURS - 1}")

    def apply(self, grid: Grid) -> Grid:
        mirror, turns = GEOMETRIES[self.geometry]
        if mirror:
            grid = tuple(row[::-1] for row in grid)
        for _ in range(turns):
            grid = tuple(zip(*grid[::-1], strict=True))
        return tuple(tuple(self.colours[cell] for cell in row) for row in grid)

    def inverse(self) -> "Augmentation":
        """The augmentation that undoes this one: `a.inverse().apply(a.apply(grid)) == grid`."""
        # Everything with a mirror in it is a reflection, and undoes itself.
        geometry = {"rot90": "rot270", "rot270": "rot90"}.get(self.geometry, self.geometry)
        return Augmentation(geometry, tuple(self.colours.index(colour) for colour in range(COLOURS)))

    def __str__(self) -> str:
        if self.colours == SAME_COLOURS:
            return self.geometry
        return f"{self.geometry}/c{''.join(map(str, self.colours))}"

    @classmethod
    def parse(cls, name: str) -> "Augmentation":
        """The augmentation that `str()` gives this name; raises ArcFormatError if there is none."""
        geometry, slash, colours = name.partition("/c")
        if slash and not re.fullmatch("[0-9]{10}", colours):
            raise ArcFormatError(f"{name!r} is no augmentation; write it like rot90 or rot90/c0213456789")
        augmentation = cls(geometry, tuple(map(int, colours)) if slash else SAME_COLOURS)
        if str(augmentation) != name:
            raise ArcFormatError(f"{name!r} is no augmentation's name; this one is called {augmentation}")
        return augmentation


def augmentations(n: int, seed: int) -> list[Augmentation]:
    """`n` different augmentations: the eight geometries, identity first, then seeded ones that recolour too.

    Colour 0, the background of most puzzles, keeps its value. The list for a smaller `n` is the beginning of
    the list for a larger one. Raises ValueError unless 1 <= n <= 100000.
    """
    if not 1 <= n <= 100_000:
        raise ValueError(f"the number of augmentations is {n}; it has to be from 1 to 100000")
    chosen = dict.fromkeys(map(Augmentation, GEOMETRIES))
    # Of all that `random` offers, only seeding and random() promise the same values in every Python version.
    rng = random.Random(seed)
    geometries = list(GEOMETRIES)
    while len(chosen) < n:
        geometry = geometries[int(rng.random() * len(geometries))]
        colours = (0, *sorted(range(1, COLOURS), key=lambda _: rng.random()))
        chosen[Augmentation(geometry, colours)] = None
    return list(chosen)[:n]
