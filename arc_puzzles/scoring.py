"""A model's answers: the grid in a text, the submission of two attempts, and the score of any."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from arc_puzzles.grids import ArcFormatError, Grid, GridEncoder
from arc_puzzles.thinking import after_thinking

# {task_id: [{"attempt_1": grid, "attempt_2": grid} for each test]}
Submission = dict[str, list[dict[str, list[list[int]]]]]
ATTEMPTS = 2
PLACEHOLDER: Grid = ((0, 0), (0, 0))  # a missing attempt, as in Kaggle's sample submission


def parse_answer(text: str, encoder: GridEncoder, opened: bool = False) -> Grid | None:
    """Returns the grid in a model's answer, or None; never raises.

    Text before and after the grid is ignored: the last closed code block counts, or for formats without code
    blocks the last run of lines that look like rows. That part must be exactly what `encoder` writes; if it
    is ragged, too large, misnumbered or headed by another shape, the result is None. Thinking is no answer:
    what counts follows it, and a text that ends before has none (`after_thinking`, which takes `opened`).
    """
    answer = after_thinking(text, opened)
    found = None if answer is None else encoder.find(answer)
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
    outline: Iterable[tuple[str, int]], attempts: Mapping[tuple[str, int], Sequence[Grid]]
) -> Submission:
    """Returns the submission as Kaggle takes it: `{task_id: [{"attempt_1": grid, "attempt_2": grid}, ...]}`.

    `outline` is (task id, number of tests) of every task of the data set, in its order. `attempts` are the
    grids of a test, best first, keyed by (task id, test index); those after the second are left out, and each
    that is missing is `PLACEHOLDER`. A grid is a list of lists. Raises ValueError for attempts at an unknown
    test.
    """
    tests = dict(outline)
    known = {(task_id, i) for task_id, n_tests in tests.items() for i in range(n_tests)}
    if stray := sorted(set(attempts) - known):
        raise ValueError(
            f"there are attempts at test {stray[0][1]} of {stray[0][0]!r}, which is not in the tasks"
        )
    return {
        task_id: [_two_attempts(attempts.get((task_id, i), ())) for i in range(n_tests)]
        for task_id, n_tests in tests.items()
    }


def _two_attempts(grids: Sequence[Grid]) -> dict[str, list[list[int]]]:
    two = (*grids[:ATTEMPTS], PLACEHOLDER, PLACEHOLDER)[:ATTEMPTS]
    return {f"attempt_{number}": [list(row) for row in grid] for number, grid in enumerate(two, start=1)}


def score(
    outputs: Mapping[str, Sequence[Grid | None]], attempts: Mapping[tuple[str, int], Sequence[Grid]]
) -> Score:
    """Compares attempts with the right answers that are known.

    `outputs` are the right answers of each task's tests, None where they are not known. `attempts` is keyed
    by (task id, test index); a test without attempts is not solved.
    """
    tests_solved = tests_known = tasks_solved = tasks_known = 0
    for task_id, answers in outputs.items():
        known = [i for i, output in enumerate(answers) if output is not None]
        solved = sum(answers[i] in attempts.get((task_id, i), ()) for i in known)
        tests_known += len(known)
        tests_solved += solved
        tasks_known += len(known) == len(answers)
        tasks_solved += solved == len(answers)
    return Score(
        tasks_solved=tasks_solved,
        tasks_known=tasks_known,
        tasks_unknown=len(outputs) - tasks_known,
        tests_solved=tests_solved,
        tests_known=tests_known,
        tests_unknown=sum(map(len, outputs.values())) - tests_known,
    )
