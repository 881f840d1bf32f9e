"""Rules of small ARC-style puzzles: the eight that the embedded model learns, and two that it never sees.

A rule draws what stays the same in a puzzle (its colours), how an input grid looks, and what the output is.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

Grid = tuple[tuple[int, ...], ...]
BACKGROUND = 0


class Dice:
    """Seeded random choices that are the same in every Python version.

    Of `random`, only seeding and `random()` promise that.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def between(self, least: int, most: int) -> int:
        """Returns an integer from `least` to `most`, both included."""
        return least + int(self._random() * (most - least + 1))

    def choose(self, values: Sequence[int]) -> int:
        return values[self.between(0, len(values) - 1)]

    def shuffled(self, values: Sequence[int]) -> list[int]:
        return sorted(values, key=lambda _: self._random())

    def colours(self, n: int) -> list[int]:
        """Returns `n` different colours, none of them the background."""
        return self.shuffled(range(1, 10))[:n]

    def grid(self, rows: int, columns: int, colours: Sequence[int]) -> Grid:
        """Returns a grid of random cells; a colour that is named twice is twice as frequent."""
        return tuple(tuple(self.choose(colours) for _ in range(columns)) for _ in range(rows))


class Drawn(NamedTuple):
    """What one puzzle's rule does: makes an input grid, and the output of a grid."""

    draw_input: Callable[[Dice], Grid]
    apply: Callable[[Grid], Grid]


DrawRule = Callable[[Dice], Drawn]


def rotate(grid: Grid) -> Grid:
    """Returns the grid turned clockwise by a quarter."""
    return tuple(zip(*grid[::-1], strict=True))


def flip(grid: Grid) -> Grid:
    """Returns the grid mirrored left to right."""
    return tuple(row[::-1] for row in grid)


def copy_beside(grid: Grid) -> Grid:
    return tuple(row + row for row in grid)


def mirror_beside(grid: Grid) -> Grid:
    return tuple(row + row[::-1] for row in grid)


def fill_rows(grid: Grid) -> Grid:
    """Returns the grid whose rows have the colour of their coloured cell, where they have one."""
    return tuple((max(row),) * len(row) for row in grid)


def cut_out(grid: Grid) -> Grid:
    """Returns the smallest part that holds every coloured cell."""
    rows = [i for i, row in enumerate(grid) if any(row)]
    columns = [j for j, column in enumerate(zip(*grid, strict=True)) if any(column)]
    if not rows:
        return grid
    return tuple(row[columns[0] : columns[-1] + 1] for row in grid[rows[0] : rows[-1] + 1])


def fall_down(grid: Grid) -> Grid:
    columns = []
    for column in zip(*grid, strict=True):
        coloured = [cell for cell in column if cell != BACKGROUND]
        columns.append([BACKGROUND] * (len(column) - len(coloured)) + coloured)
    return tuple(zip(*columns, strict=True))


def count_cells(grid: Grid) -> Grid:
    """Returns one row that has as many cells as are coloured, in the largest of their colours."""
    coloured = [cell for row in grid for cell in row if cell != BACKGROUND]
    return ((max(coloured),) * len(coloured),) if coloured else grid


def join_pairs(grid: Grid) -> Grid:
    """Returns the grid with a line between the two cells of a row that have one colour."""
    joined = []
    for row in grid:
        ends = [i for i, cell in enumerate(row) if cell != BACKGROUND] or [0]
        joined.append(tuple(row[ends[0]] if ends[0] <= i <= ends[-1] else 0 for i in range(len(row))))
    return tuple(joined)


def _draw_recolour(dice: Dice) -> Drawn:
    old, new = dice.colours(2)

    def apply(grid: Grid) -> Grid:
        return tuple(tuple(new if cell == old else cell for cell in row) for row in grid)

    return Drawn(lambda dice: dice.grid(3, 3, (BACKGROUND, old)), apply)


def _on_random_grids(apply: Callable[[Grid], Grid], rows: int) -> DrawRule:
    def draw(dice: Dice) -> Drawn:
        colours = (BACKGROUND, *dice.colours(2))
        return Drawn(lambda dice: dice.grid(rows, 3, colours), apply)

    return draw


def _draw_fill(dice: Dice) -> Drawn:
    colours = dice.colours(2)

    def draw_row(dice: Dice) -> tuple[int, ...]:
        row = [BACKGROUND] * 3
        if dice.between(0, 2):
            row[dice.between(0, 2)] = dice.choose(colours)
        return tuple(row)

    return Drawn(lambda dice: tuple(draw_row(dice) for _ in range(3)), fill_rows)


def _draw_cut_out(dice: Dice) -> Drawn:
    colours = (BACKGROUND, *dice.colours(2))

    def draw_input(dice: Dice) -> Grid:
        height, width = dice.between(1, 2), dice.between(1, 3)
        top, left = dice.between(0, 3 - height), dice.between(0, 3 - width)
        grid = [[BACKGROUND] * 3 for _ in range(3)]
        for i, row in enumerate(dice.grid(height, width, colours)):
            grid[top + i][left : left + width] = row
        return tuple(map(tuple, grid))

    return Drawn(draw_input, cut_out)


def _draw_count(dice: Dice) -> Drawn:
    (colour,) = dice.colours(1)

    def draw_input(dice: Dice) -> Grid:
        n = dice.between(1, 5)
        cells = dice.shuffled([colour] * n + [BACKGROUND] * (9 - n))
        return tuple(tuple(cells[start : start + 3]) for start in (0, 3, 6))

    return Drawn(draw_input, count_cells)


def _draw_join(dice: Dice) -> Drawn:
    colours = dice.colours(2)

    def draw_row(dice: Dice) -> tuple[int, ...]:
        row = [BACKGROUND] * 4
        if dice.between(0, 2):
            left = dice.between(0, 1)
            row[left] = row[dice.between(left + 2, 3)] = dice.choose(colours)
        return tuple(row)

    return Drawn(lambda dice: tuple(draw_row(dice) for _ in range(3)), join_pairs)


# By the id that a sample has. Only the seen ones are ever trained on.
SEEN_RULES: dict[str, DrawRule] = {
    "turn-clockwise": _on_random_grids(rotate, rows=2),
    "flip-left-right": _on_random_grids(flip, rows=3),
    "recolour": _draw_recolour,
    "copy-beside": _on_random_grids(copy_beside, rows=2),
    "fill-rows": _draw_fill,
    "cut-out": _draw_cut_out,
    "fall-down": _on_random_grids(fall_down, rows=3),
    "count-cells": _draw_count,
}
UNSEEN_RULES: dict[str, DrawRule] = {
    "mirror-beside": _on_random_grids(mirror_beside, rows=2),
    "join-pairs": _draw_join,
}
# What the seen rules do that have no colours of their own.
PLAIN_RULES = (rotate, flip, copy_beside, fill_rows, cut_out, fall_down, count_cells)
