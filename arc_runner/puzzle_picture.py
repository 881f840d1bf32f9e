"""A puzzle on the terminal: grids side by side in the colours of ARC, as large as the width allows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from arc_puzzles import Grid

# As arcprize.org shows the digits 0 to 9.
PALETTE = (
    *("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00"),
    *("#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25"),
)
_COLORS = tuple(map(Color.parse, PALETTE))
_NAME_COLUMNS = 6  # of "answer"
_GAP = 3  # columns between two grids
_HALF = "\N{UPPER HALF BLOCK}"


def draw_grids(console: Console, grids: Mapping[str, Grid | None]) -> RenderableType:
    """Returns grids under their names, side by side where ``console`` is wide enough, else one below another.

    A cell is two columns wide, or one where that is too much. Without colours a cell is its digit. None is
    drawn as no grid.
    """
    for cell_columns, side_by_side in ((2, True), (1, True), (2, False), (1, False)):
        drawn = [_titled(console, name, grid, cell_columns) for name, grid in grids.items()]
        widths = [console.measure(one).maximum for one in drawn]
        needed = sum(widths) + _GAP * (len(widths) - 1) if side_by_side else max(widths)
        if needed <= console.width:
            break
    if not side_by_side:
        return Group(*drawn)
    row = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    row.add_row(*drawn)
    return row


def wide_columns(grids: Sequence[Grid]) -> int:
    """Returns how many columns grids take side by side where a cell is two columns wide."""
    return sum(max(2 * len(grid[0]), _NAME_COLUMNS) + _GAP for grid in grids)


def _titled(console: Console, name: str, grid: Grid | None, cell_columns: int) -> Group:
    return Group(Text(name, "bold"), _grid(console, grid, cell_columns), Text())


def _grid(console: Console, grid: Grid | None, cell_columns: int) -> Text:
    if grid is None:
        return Text("no grid", "dim")
    if console.no_color or console.color_system is None:
        between = " " * (cell_columns - 1)
        return Text("\n".join(between.join(map(str, row)) for row in grid), no_wrap=True)
    lines = [Text(no_wrap=True)]
    if cell_columns == 1 and not console.options.ascii_only:
        # Two rows of cells in a line, so that a cell is as high as it is wide.
        for upper, lower in itertools.zip_longest(grid[::2], grid[1::2]):
            lines.append(Text(no_wrap=True))
            for i, cell in enumerate(upper):
                below = None if lower is None else _COLORS[lower[i]]
                lines[-1].append(_HALF, Style(color=_COLORS[cell].name, bgcolor=below and below.name))
    else:
        for row in grid:
            lines.append(Text(no_wrap=True))
            for cell in row:
                lines[-1].append(" " * cell_columns, Style(bgcolor=_COLORS[cell].name))
    return Text("\n").join(lines[1:])
