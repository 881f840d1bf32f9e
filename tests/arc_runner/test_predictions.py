"""The book of predictions: what it adds up to, what it keeps, and its JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from arc_puzzles import Grid
from arc_runner.predictions import Book, Predicted, TaskPredictions

A: Grid = ((1,),)
B: Grid = ((2, 2),)
C: Grid = ((3,),)
NOTHING = [[0, 0], [0, 0]]


def predicted(key: str, grid: Grid | None, logprob: float = -1.0, failure: str | None = None) -> Predicted:
    return Predicted(key, "identity", 0, grid, logprob, failure)


def task(*predictions: Predicted, puzzle: str = "p", output: Grid | None = None) -> TaskPredictions:
    return TaskPredictions(puzzle, (output,), (predictions,))


ONE = task(predicted("a", B), predicted("b", A), predicted("c", A), output=A)
TWO = TaskPredictions("q", (None, B), ((predicted("d", None),), ()))
BAD = TaskPredictions("", (None, None), ((), ()), "it is malformed")


def test_the_submission_has_two_attempts_at_every_test_of_every_task():
    book = Book({"one": ONE, "two": TWO, "../bad": BAD})
    assert book.submission() == {
        "one": [{"attempt_1": [[1]], "attempt_2": [[2, 2]]}],
        "two": [{"attempt_1": NOTHING, "attempt_2": NOTHING}] * 2,
        "../bad": [{"attempt_1": NOTHING, "attempt_2": NOTHING}] * 2,
    }


def test_outcomes_are_those_of_tests_with_a_known_answer():
    assert Book({"one": ONE, "two": TWO}).outcomes() == {"a": False, "b": True, "c": True}


def test_the_json_says_all_and_reads_back_the_same():
    book = Book({"one": ONE, "two": TWO, "\ud800": BAD, "x": task(predicted("e", None, 0.0, "not finite"))})
    value = json.loads(json.dumps(book.to_json()))
    common = {"augmentation": "identity", "sample": 0, "logprob": -1.0, "failure": None, "thinking": False}
    assert value["one"] == {
        "puzzle": "p",
        "failure": None,
        "tests": [
            {
                "output": [[1]],
                "predictions": [
                    entry | common
                    for entry in (
                        {"key": "a", "grid": [[2, 2]], "votes": 1},
                        {"key": "b", "grid": [[1]], "votes": 2},
                        {"key": "c", "grid": [[1]], "votes": 2},
                    )
                ],
            }
        ],
    }
    assert value["two"]["tests"][0]["predictions"][0]["votes"] == 0
    assert Book.from_json(value) == book


def test_a_file_of_before_that_knows_nothing_of_thinking_is_read():
    book = Book({"one": task(Predicted("a", "identity", 0, thinking=True))})
    value = json.loads(json.dumps(book.to_json()))
    assert Book.from_json(value) == book
    del value["one"]["tests"][0]["predictions"][0]["thinking"]
    assert Book.from_json(value) == Book({"one": task(Predicted("a", "identity", 0))})


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"one": None},
        {"one": {"puzzle": "p", "failure": None}},
        {"one": {"puzzle": 3, "failure": None, "tests": []}},
        {"one": {"puzzle": "p", "failure": [], "tests": []}},
        {"one": {"puzzle": "p", "failure": None, "tests": [{"output": [[11]], "predictions": []}]}},
        {"one": {"puzzle": "p", "failure": None, "tests": [{"output": None, "predictions": [3]}]}},
    ],
)
def test_other_json_is_refused(value: Any):
    with pytest.raises(ValueError, match="these are no predictions"):
        Book.from_json(value)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"key": 1}, {"augmentation": "rot45"}, {"sample": "0"}, {"sample": True}, {"logprob": None},
        {"grid": [[1], [2, 3]]}, {"grid": "1"}, {"failure": 1},
    ],
)  # fmt: skip
def test_a_prediction_of_another_form_is_refused(spoilt: dict[str, Any]):
    value = json.loads(json.dumps(Book({"one": ONE}).to_json()))
    value["one"]["tests"][0]["predictions"][1] |= spoilt
    with pytest.raises(ValueError, match="these are no predictions"):
        Book.from_json(value)


# --- What a later run keeps ---------------------------------------------------------------------------------


def test_tasks_that_a_run_does_not_have_stay():
    earlier = Book({"two": TWO, "one": ONE, "bad": BAD})
    assert list(Book({"one": ONE}).extended(earlier).tasks) == ["one", "two", "bad"]
    assert Book({"one": ONE}).extended(earlier).tasks == earlier.tasks
    assert Book({}).extended(earlier) == earlier
    assert earlier.extended(Book()) == earlier


def test_predictions_that_a_run_did_not_ask_for_stay_after_its_own():
    now = Book({"one": task(predicted("c", A), predicted("x", C))})
    merged = now.extended(Book({"one": ONE}))
    assert [one.key for _, _, one in merged.predictions()] == ["c", "x", "a", "b"]
    assert merged.tasks["one"].outputs == (A,)  # known from then


def test_of_a_puzzle_that_has_changed_only_what_the_run_made_counts():
    for changed in (
        task(predicted("x", C), puzzle="other"),
        TaskPredictions("p", (None, None), ((predicted("x", C),), ())),
        TaskPredictions("", (None,), ((),), "it is malformed"),
    ):
        assert Book({"one": changed}).extended(Book({"one": ONE})) == Book({"one": changed})
