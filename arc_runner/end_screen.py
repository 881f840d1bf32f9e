"""What a run ends with on a terminal: its report as a table, and one puzzle with its answer and the truth."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from arc_puzzles import ArcTask, Grid
from arc_puzzles.scoring import ATTEMPTS
from arc_runner.console import shown_on
from arc_runner.live_lines import size_of
from arc_runner.predictions import Book
from arc_runner.puzzle_picture import draw_grids, wide_columns
from arc_runner.report import Report
from arc_runner.rich_text import make_console, rendered

_MOST_LINES = 16  # of a picture, where there is a choice
_NARROW = 60  # columns; below it a figure stands under its name


class Example(NamedTuple):
    """Holds one test of a puzzle: what it shows, the better of the two attempts, and the right answer."""

    task_id: str
    test_index: int
    solved: bool
    input: Grid
    answer: Grid | None
    truth: Grid


def draw_end(report: Report, tasks: Sequence[ArcTask], book: Book | None) -> str:
    """Returns the table of the report and the picture, in lines for stdout's terminal.

    Without a book, after own prompts, there is no picture.
    """
    columns, _ = size_of(sys.stdout)
    console = make_console(sys.stdout, columns)
    parts: list[RenderableType] = [_table(console, report)]
    if book is not None and (example := choose_example(tasks, book, columns)) is not None:
        parts += _picture(console, example)
    return rendered(console, Group(*parts))


def choose_example(tasks: Sequence[ArcTask], book: Book, columns: int) -> Example | None:
    """Returns a test to show: one that is solved, else one that is answered; None where no truth is known.

    Among them it is the largest that can be drawn large in ``columns``, else the smallest.
    """
    candidates = book.candidates()
    found = []
    for task in tasks:
        for i, pair in enumerate(task.test):
            best = [one.grid for one in candidates.get((task.task_id, i), [])[:ATTEMPTS]]
            if pair.output is not None:
                solved = pair.output in best
                answer = pair.output if solved else next(iter(best), None)
                found.append(Example(task.task_id, i, solved, pair.input, answer, pair.output))
    return min(found, key=lambda one: _rank(one, columns), default=None)


def _rank(example: Example, columns: int) -> tuple[bool, bool, bool, int]:
    grids = [grid for grid in (example.input, example.answer, example.truth) if grid is not None]
    cells = sum(len(grid) * len(grid[0]) for grid in grids)
    is_large = wide_columns(grids) > columns or max(map(len, grids)) > _MOST_LINES
    return (not example.solved, example.answer is None, is_large, cells if is_large else -cells)


def _table(console: Console, report: Report) -> Table:
    title = Text(report.outcome, "bold yellow" if report.stopped_early else "bold green")
    table = Table(title=title, title_justify="left", box=ROUNDED, show_header=False)
    rows = [(name, shown_on(sys.stdout, value)) for name, value in report.rows()]
    if console.width < _NARROW:
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text.assemble((f"{name}\n", "cyan"), value))
        return table
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _picture(console: Console, example: Example) -> list[RenderableType]:
    name = f"task {example.task_id}" + (f", test {example.test_index}" if example.test_index else "")
    if example.solved:
        title = Text(f"solved: {name}", "bold green")
    else:
        title = Text(f"none was solved; an unsolved one: {name}", "bold yellow")
    grids = {"input": example.input, "answer": example.answer, "truth": example.truth}
    return [title, Text(), draw_grids(console, grids)]
