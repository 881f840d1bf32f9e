"""A model's answers: the grid in a text, the submission of all attempts, and its score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arc_puzzles.grids import ArcFormatError, Grid, GridEncoder
from arc_puzzles.tasks import ArcTask

# {task_id: [{"attempt_1": grid, ...} for each test]}
Submission = dict[str, list[dict[str, list[list[int]]]]]


def parse_answer(text: str, encoder: GridEncoder) -> Grid | None:
    """Returns the grid in a model's answer, or None; never raises.

    Text before and after the grid is ignored: the last closed code block counts, or for formats without code
    blocks the last run of lines that look like rows. That part must be exactly what `encoder` writes; if it
    is ragged, too large, misnumbered or headed by another shape, the result is None.
    """
    found = encoder.find(text)
    if found is None:
        return None
    try:
        return encoder.decode(found)
    except ArcFormatError:
        return None


@dataclass(frozen=True)
class Score:
    """Counts the solved tests and tasks.

    A test is solved if any attempt equals its output, a task if all of its tests are solved.
    `tasks_known` and `tests_known` count those whose outputs the data set has (for a task, all of them).
    """

    tasks_solved: int
    tasks_known: int
    tasks_unknown: int
    tests_solved: int
    tests_known: int
    tests_unknown: int


def build_submission(
    tasks: Sequence[ArcTask], attempts: Mapping[tuple[str, int], Sequence[Grid | None]]
) -> Submission:
    """Returns the submission: `{task_id: [{"attempt_1": grid, "attempt_2": grid, ...} for each test]}`.

    A grid is a list of lists. `attempts` is keyed by (task id, test index). An attempt that is None, as
    `parse_answer` gives it, becomes `[]`; a test without attempts becomes `{}`. Raises ValueError for
    attempts at an unknown test.
    """
    known = {(task.task_id, i) for task in tasks for i in range(len(task.test))}
    if stray := sorted(set(attempts) - known):
        raise ValueError(
            f"there are attempts at test {stray[0][1]} of {stray[0][0]!r}, which is not in the tasks"
        )
    return {
        task.task_id: [
            {
                f"attempt_{number}": [list(row) for row in grid or ()]
                for number, grid in enumerate(attempts.get((task.task_id, i), ()), start=1)
            }
            for i in range(len(task.test))
        ]
        for task in tasks
    }


def score(tasks: Sequence[ArcTask], submission: Submission) -> Score:
    """Compares a submission with the known outputs of the tasks. A missing answer counts as not solved."""
    tasks_solved = tasks_known = tests_solved = tests_known = 0
    for task in tasks:
        solved = known = 0
        answers = submission.get(task.task_id, [])
        for i, pair in enumerate(task.test):
            if pair.output is None:
                continue
            known += 1
            output = [list(row) for row in pair.output]
            solved += i < len(answers) and output in answers[i].values()
        tests_known += known
        tests_solved += solved
        tasks_known += known == len(task.test)
        tasks_solved += solved == len(task.test)
    tests = sum(len(task.test) for task in tasks)
    return Score(
        tasks_solved=tasks_solved,
        tasks_known=tasks_known,
        tasks_unknown=len(tasks) - tasks_known,
        tests_solved=tests_solved,
        tests_known=tests_known,
        tests_unknown=tests - tests_known,
    )
