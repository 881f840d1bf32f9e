"""Solutions in a file of their own: found, given, and refused where they are not those of the tasks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from puzzle_cases import GOOD, write

from arc_puzzles.data_sets import load_tasks
from arc_puzzles.grids import ArcFormatError, Grid


def unanswered(*inputs: list[list[int]]) -> dict[str, Any]:
    return {"train": GOOD["train"], "test": [{"input": grid} for grid in inputs]}


CHALLENGES = {"one": unanswered([[1]]), "two": unanswered([[2]], [[3]])}
SOLUTIONS: dict[str, Any] = {"one": [[[4]]], "two": [[[5]], [[6]]]}
ANSWERS = {"one": (((4,),),), "two": (((5,),), ((6,),))}


def outputs(path: Path, **flags: Any) -> dict[str, tuple[Grid | None, ...]]:
    return {task.task_id: task.outputs for task in load_tasks(path, **flags).tasks}


@pytest.mark.parametrize(
    ("challenges", "solutions"),
    [
        ("arc-agi_training_challenges.json", "arc-agi_training_solutions.json"),
        ("arc-agi_training-challenges.json", "arc-agi_training-solutions.json"),
        ("challenges.json", "solutions.json"),
    ],
)
def test_solutions_beside_the_challenges_are_found_by_their_name(
    tmp_path: Path, challenges: str, solutions: str
):
    path = write(tmp_path / challenges, CHALLENGES)
    assert outputs(path) == {"one": (None,), "two": (None, None)}
    write(tmp_path / solutions, SOLUTIONS)
    assert outputs(path) == ANSWERS
    assert load_tasks(path).notices == (f"right answers from {tmp_path / solutions}",)
    assert outputs(path, limit=1) == {"one": ANSWERS["one"]}


@pytest.mark.parametrize("form", ["object", "lines", "directory"])
def test_solutions_can_be_given_for_a_data_set_of_any_form(tmp_path: Path, form: str):
    solutions = write(tmp_path / "answers", SOLUTIONS | {"of-another-task": [[[1]]]})
    if form == "object":
        path = write(tmp_path / "t.json", CHALLENGES)
    elif form == "lines":
        lines = [json.dumps({"id": name, **task}) for name, task in CHALLENGES.items()]
        path = write(tmp_path / "t.jsonl", "\n".join(lines))
    else:
        path = tmp_path / "data"
        path.mkdir()
        for name, task in CHALLENGES.items():
            write(path / f"{name}.json", task)
    assert outputs(path, solutions=solutions) == ANSWERS


def test_solutions_complete_what_the_data_set_knows(tmp_path: Path):
    one = {**CHALLENGES["one"], "test": [{"input": [[1]], "output": [[4]]}]}
    path = write(tmp_path / "t.json", CHALLENGES | {"one": one})
    given = write(tmp_path / "s.json", {"one": [None], "two": [[[5]], []]})
    assert outputs(path, solutions=given) == {"one": (((4,),),), "two": (((5,),), None)}
    assert outputs(path, solutions=write(tmp_path / "s.json", SOLUTIONS)) == ANSWERS


def test_a_malformed_task_needs_no_solution(tmp_path: Path):
    path = write(tmp_path / "t.json", CHALLENGES | {"bad": {"train": [], "test": []}})
    loaded = load_tasks(path, solutions=write(tmp_path / "s.json", SOLUTIONS))
    assert [failure.task_id for failure in loaded.failures] == ["bad"]
    assert [task.outputs for task in loaded.tasks] == list(ANSWERS.values())


@pytest.mark.parametrize(
    ("solutions", "problem"),
    [
        ({"one": [[[4]]]}, "has no solution of task two; it belongs to another data set"),
        ({"x": [[[4]]]}, "has no solution of task one and 1 other tasks; it belongs to another data set"),
        (SOLUTIONS | {"two": [[[5]]]}, "has 1 outputs of task two, which has 2 tests"),
        (SOLUTIONS | {"one": [[[4]], [[4]]]}, "has 2 outputs of task one, which has 1 tests"),
        (SOLUTIONS | {"two": []}, "the solution of task 'two' is not a list of outputs"),
        (SOLUTIONS | {"two": {"0": [[5]]}}, "the solution of task 'two' is not a list of outputs"),
        (SOLUTIONS | {"two": [[[5]], [[11]]]}, "task 'two' output 1 row 0 column 0 is not a colour from 0"),
        (SOLUTIONS | {"\x1b[31m": 3}, r"the solution of task '\x1b[31m' is not a list of outputs"),
        (SOLUTIONS | {"one": [[4]]}, "task 'one' output 0 row 0 is a number, not a list of cells"),
        (CHALLENGES, "holds tasks, not solutions"),
        (GOOD, "holds tasks, not solutions"),
        ([], "is not a JSON object of the form {task_id: [output, ...]}"),
        ({}, "is not a JSON object of the form {task_id: [output, ...]}"),
        ("{", "is not JSON"),
        ('{"one": [[[4]]], "one": [[[4]]]}', "has the key 'one' twice in one object"),
    ],
)
def test_solutions_that_are_not_those_of_the_tasks_are_refused(
    tmp_path: Path, solutions: object, problem: str
):
    path = write(tmp_path / "x_challenges.json", CHALLENGES)
    file = write(tmp_path / "x_solutions.json", solutions)
    for given in (None, file):
        with pytest.raises(ArcFormatError, match=re.escape(problem)) as refused:
            load_tasks(path, solutions=given)
        assert str(file) in str(refused.value)


def test_solutions_that_contradict_the_data_set_are_refused(tmp_path: Path):
    path = write(tmp_path / "t.json", {"a": {**GOOD, "test": GOOD["test"][:1]}})
    with pytest.raises(ArcFormatError, match="has another output of task a test 0 than the data set itself"):
        load_tasks(path, solutions=write(tmp_path / "s.json", {"a": [[[9, 9]]]}))


def test_solutions_that_are_given_and_not_there_are_refused(tmp_path: Path):
    path = write(tmp_path / "t.json", CHALLENGES)
    with pytest.raises(ArcFormatError, match=r"cannot read .*nowhere\.json: No such file"):
        load_tasks(path, solutions=tmp_path / "nowhere.json")


def test_the_solutions_given_as_the_data_set_are_refused(tmp_path: Path):
    path = write(tmp_path / "x_solutions.json", SOLUTIONS)
    with pytest.raises(ArcFormatError, match="holds solutions, not tasks; name the file of the challenges"):
        load_tasks(path)
