"""The end of a run on a terminal: its report as a table, and one puzzle beside the truth."""

from __future__ import annotations

import re
from typing import Any

import pytest
from terminals import on_terminal

from arc_puzzles import ArcTask, Pair
from arc_runner.console import show
from arc_runner.end_screen import choose_example, draw_end
from arc_runner.predictions import Book, Predicted, TaskPredictions
from arc_runner.report import Report

ONE, SMALL, LARGE, HUGE = ((9,),), ((1, 2),), ((3, 4), (5, 6)), ((7,) * 30,) * 30
REPORT = Report("some/modèle", "cpu", tasks=2, sequences=8, tests_known=2, tests_solved=1, tokens_generated=9)


def task(name: str, *outputs: Any) -> ArcTask:
    return ArcTask(name, (), tuple(Pair(((0,),), output) for output in outputs))


def predicted(tasks: list[ArcTask], **grids: Any) -> Book:
    """A book where each named task's first test is answered with these grids."""
    tests = {
        name: tuple(Predicted(f"{name}{i}", "identity", i, grid, -1.0 * i) for i, grid in enumerate(of_task))
        for name, of_task in grids.items()
    }
    return Book({one.task_id: TaskPredictions("p", one.outputs, (tests[one.task_id],)) for one in tasks})


TASKS = [task("small", SMALL), task("large", LARGE), task("huge", HUGE), task("hidden", None)]


@pytest.mark.parametrize(
    ("answers", "chosen", "solved"),
    [
        ({"small": [SMALL], "large": [SMALL, LARGE], "huge": [HUGE]}, "large", True),
        ({"small": [SMALL], "large": [HUGE], "huge": [HUGE]}, "small", True),
        ({"small": [LARGE], "large": [None], "huge": [HUGE]}, "huge", True),
        ({"small": [ONE], "large": [None], "huge": [SMALL]}, "small", False),
    ],
)
def test_a_solved_puzzle_that_fits_is_shown_else_an_answered_one(
    answers: dict[str, Any], chosen: str, solved: bool
):
    example = choose_example(TASKS, predicted(TASKS, hidden=[SMALL], **answers), columns=100)
    assert example is not None
    assert (example.task_id, example.solved) == (chosen, solved)
    assert (example.answer == example.truth) is solved


def test_without_a_known_answer_there_is_no_picture():
    assert choose_example(TASKS[-1:], predicted(TASKS[-1:], hidden=[SMALL]), columns=100) is None


def shown(
    monkeypatch: pytest.MonkeyPatch, columns: int, encoding: str, **answers: Any
) -> tuple[str, list[str]]:
    """What was written to a terminal, and the lines it shows."""
    terminal = on_terminal(monkeypatch, columns, encoding)
    tasks = [one for one in TASKS if one.task_id in answers]
    show(draw_end(REPORT, tasks, predicted(tasks, **answers)))
    terminal.close()
    return terminal.written, terminal.lines()


def test_input_answer_and_truth_stand_side_by_side_in_the_colours_of_arc(monkeypatch: pytest.MonkeyPatch):
    written, lines = shown(monkeypatch, 100, "utf-8", large=[LARGE])
    assert "solved: task large" in lines
    (names,) = [line for line in lines if line.startswith("input")]
    assert names.split() == ["input", "answer", "truth"]
    green, yellow = "\x1b[48;2;46;204;64m", "\x1b[48;2;255;220;0m"
    assert re.search(rf"{re.escape(green)}  \x1b\[0m{re.escape(yellow)}  \x1b\[0m", written)
    assert written.count(green) == 2  # in the answer and in the truth
    assert any("some/modèle on cpu" in line and line.startswith("│") for line in lines)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(("columns", "side_by_side"), [(200, True), (100, True), (70, False), (40, False)])
def test_the_largest_grids_fit(
    columns: int, side_by_side: bool, encoding: str, monkeypatch: pytest.MonkeyPatch
):
    _, lines = shown(monkeypatch, columns, encoding, huge=[HUGE])
    names = [line.split() for line in lines if line.startswith(("input", "answer", "truth"))]
    assert len(names) == (1 if side_by_side else 3)
    bare = [line for line in lines if re.fullmatch(r"[+|│╭╮╰╯─-].*", line)]
    assert bare
    assert all(len(line) <= columns for line in lines)


def test_without_colours_the_cells_are_digits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "7")
    terminal = on_terminal(monkeypatch, 60)
    monkeypatch.setenv("NO_COLOR", "1")
    show(draw_end(REPORT, TASKS[:1], predicted(TASKS[:1], small=[LARGE])))
    terminal.close()
    assert "none was solved; an unsolved one: task small" in terminal.lines()
    assert "0       3 4      1 2" in terminal.lines()
    assert "        5 6" in terminal.lines()
    assert "8;2;" not in terminal.written


def test_a_test_without_a_grid_says_so(monkeypatch: pytest.MonkeyPatch):
    _, lines = shown(monkeypatch, 80, "utf-8", small=[None])
    assert any("no grid" in line for line in lines)
