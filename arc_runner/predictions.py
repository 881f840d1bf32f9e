"""All predictions of a submission, task by task: what is kept, what the attempts are, what is right.

Submission and score follow from the book. A later run adds to it: the tasks that the run does not have stay,
and so do the predictions that it did not ask for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from arc_puzzles import (
    ArcFormatError,
    Augmentation,
    Candidate,
    Grid,
    GridEncoder,
    Prediction,
    Score,
    Submission,
    build_submission,
    parse_answer,
    score,
    validate_grid,
    vote,
)
from arc_puzzles.scoring import ATTEMPTS


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Holds what one stored sequence predicts of a test.

    ``grid`` is turned back into the puzzle's own orientation and colours; None where the answer holds none.
    ``logprob`` is the summed log-probability of the answer's tokens, in nats. ``failure`` says why nothing is
    stored. ``thinking`` is true where the text ended before the model's thinking did.
    """

    key: str
    augmentation: str
    sample: int
    grid: Grid | None = None
    logprob: float = 0.0
    failure: str | None = None
    thinking: bool = False


@dataclasses.dataclass(frozen=True)
class TaskPredictions:
    """Holds the predictions of each test of a task, in their order, and the right answers that are known.

    ``puzzle`` is the digest of what the puzzle shows, "" if it is malformed. ``failure`` says why the task as
    a whole could not be used.
    """

    puzzle: str
    outputs: tuple[Grid | None, ...]
    tests: tuple[tuple[Predicted, ...], ...]
    failure: str | None = None

    def extended(self, earlier: TaskPredictions) -> TaskPredictions:
        """Returns these predictions, then those that an earlier run made of the same puzzle besides."""
        if not self.puzzle or (earlier.puzzle, len(earlier.tests)) != (self.puzzle, len(self.tests)):
            return self
        tests = tuple(
            (*now, *(one for one in before if one.key not in {kept.key for kept in now}))
            for now, before in zip(self.tests, earlier.tests, strict=True)
        )
        outputs = tuple(now or before for now, before in zip(self.outputs, earlier.outputs, strict=True))
        return dataclasses.replace(self, tests=tests, outputs=outputs)


@dataclasses.dataclass(frozen=True)
class Book:
    """Holds the predictions of every task of a submission, in its order, by task id."""

    tasks: Mapping[str, TaskPredictions] = dataclasses.field(default_factory=dict)

    def extended(self, earlier: Book) -> Book:
        """Returns this book with what an earlier one of the same store has besides: nothing gets lost."""
        merged = {
            task_id: task.extended(earlier.tasks[task_id]) if task_id in earlier.tasks else task
            for task_id, task in self.tasks.items()
        }
        return Book(merged | {name: task for name, task in earlier.tasks.items() if name not in merged})

    def predictions(self) -> Iterator[tuple[str, int, Predicted]]:
        """Yields (task id, test index, prediction) of all."""
        for task_id, task in self.tasks.items():
            for test_index, predictions in enumerate(task.tests):
                for one in predictions:
                    yield task_id, test_index, one

    def candidates(self) -> dict[tuple[str, int], list[Candidate]]:
        """Returns the distinct grids of each test, best first."""
        return {
            (task_id, i): vote([Prediction(one.grid, one.logprob) for one in predictions])
            for task_id, task in self.tasks.items()
            for i, predictions in enumerate(task.tests)
        }

    def submission(self) -> Submission:
        """Returns the submission: the two best grids of each test, for all tasks."""
        outline = [(task_id, len(task.tests)) for task_id, task in self.tasks.items()]
        return build_submission(outline, self._attempts(ATTEMPTS))

    def scores(self) -> tuple[Score, Score]:
        """Returns the score of the two attempts, as Kaggle counts, and that of all predictions."""
        outputs = {task_id: task.outputs for task_id, task in self.tasks.items()}
        return score(outputs, self._attempts(ATTEMPTS)), score(outputs, self._attempts(None))

    def outcomes(self) -> dict[str, bool]:
        """Returns whether each sequence, by key, predicts the right grid, where that is known."""
        return {
            one.key: one.grid == output
            for task in self.tasks.values()
            for predictions, output in zip(task.tests, task.outputs, strict=True)
            for one in predictions
            if output is not None
        }

    def _attempts(self, most: int | None) -> dict[tuple[str, int], list[Grid]]:
        return {test: [one.grid for one in best[:most]] for test, best in self.candidates().items()}

    def to_json(self) -> dict[str, Any]:
        """Returns `{task_id: {"puzzle", "failure", "tests": [{"output", "predictions": [...]}, ...]}}`."""
        votes: dict[tuple[str, int], dict[Grid | None, int]] = {
            test: {candidate.grid: candidate.votes for candidate in best}
            for test, best in self.candidates().items()
        }
        return {
            task_id: {
                "puzzle": task.puzzle,
                "failure": task.failure,
                "tests": [
                    {
                        "output": output,
                        "predictions": [
                            dataclasses.asdict(one) | {"votes": votes[task_id, i].get(one.grid, 0)}
                            for one in predictions
                        ],
                    }
                    for i, (output, predictions) in enumerate(zip(task.outputs, task.tests, strict=True))
                ],
            }
            for task_id, task in self.tasks.items()
        }

    @classmethod
    def from_json(cls, value: Any) -> Book:
        """Returns the book that `to_json` gave, parsed; raises ValueError for anything else."""
        try:
            return cls({task_id: _task(task) for task_id, task in value.items()})
        except (ArcFormatError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"these are no predictions: {error}") from error


def read_grid(text: str, augmentation: str, encoder: GridEncoder, opened: bool = False) -> Grid | None:
    """Returns the grid in an answer to an augmented puzzle, turned back into the puzzle's form, or None.

    ``opened`` says that the prompt opens the model's thinking.
    """
    grid = parse_answer(text, encoder, opened)
    return None if grid is None else Augmentation.parse(augmentation).inverse().apply(grid)


def _task(value: Any) -> TaskPredictions:
    tests = value["tests"]
    return TaskPredictions(
        _text(value["puzzle"]),
        tuple(_grid(test["output"]) for test in tests),
        tuple(tuple(map(_predicted, test["predictions"])) for test in tests),
        None if value["failure"] is None else _text(value["failure"]),
    )


def _predicted(value: Any) -> Predicted:
    sample, logprob = value["sample"], value["logprob"]
    if type(sample) is not int or type(logprob) not in (int, float):
        raise TypeError("a number is none")
    return Predicted(
        _text(value["key"]),
        str(Augmentation.parse(_text(value["augmentation"]))),
        sample,
        _grid(value["grid"]),
        float(logprob),
        None if value["failure"] is None else _text(value["failure"]),
        value.get("thinking") is True,  # files of before know nothing of it
    )


def _grid(value: Any) -> Grid | None:
    return None if value is None else validate_grid(value, "a grid")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is none")
    return value
