"""The right answers that Kaggle keeps in a file of their own, beside the challenges."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from arc_puzzles.data_files import read_json, shown
from arc_puzzles.grids import ArcFormatError, Grid
from arc_puzzles.tasks import ArcTask, is_meant_as_task, parse_output

_CHALLENGES = re.compile(r"(.*[_-])?challenges(\.json(\.gz)?)")


def solutions_beside(path: Path) -> Path | None:
    """Returns `*_solutions.json` beside a file `*_challenges.json`, or None where there is none."""
    match = _CHALLENGES.fullmatch(path.name)
    if match is None:
        return None
    beside = path.with_name(f"{match[1] or ''}solutions{match[2]}")
    return beside if beside.is_file() else None


def read_solutions(path: Path) -> dict[str, list[Grid | None]]:
    """Reads `{task_id: [output of each test, ...]}`; an output that is null or empty is not known.

    Raises ArcFormatError for anything else.
    """
    content, where = read_json(path), shown(str(path))
    if not isinstance(content, dict) or not content:
        raise ArcFormatError(f"{where} is not a JSON object of the form {{task_id: [output, ...]}}")
    if any(map(is_meant_as_task, content.values())) or is_meant_as_task(content):
        raise ArcFormatError(f"{where} holds tasks, not solutions {{task_id: [output, ...]}}")
    solutions: dict[str, list[Grid | None]] = {}
    for task_id, outputs in content.items():
        if not isinstance(outputs, list) or not outputs:
            raise ArcFormatError(f"{where}: the solution of task '{shown(task_id)}' is not a list of outputs")
        solutions[task_id] = [
            parse_output(output, f"{where}: task '{shown(task_id)}' output {i}")
            for i, output in enumerate(outputs)
        ]
    return solutions


def with_solutions(
    tasks: Sequence[ArcTask], solutions: Mapping[str, Sequence[Grid | None]], path: Path
) -> list[ArcTask]:
    """Returns the tasks with their right answers; solutions of other tasks are left alone.

    Raises ArcFormatError where a task has no solution or another number of them than tests, or where the task
    itself has another output: these are not its solutions. The error calls the solutions by their `path`.
    """
    where = shown(str(path))
    missing = [task.task_id for task in tasks if task.task_id not in solutions]
    if missing:
        others = f" and {len(missing) - 1} other tasks" if len(missing) > 1 else ""
        raise ArcFormatError(
            f"{where} has no solution of task {missing[0]}{others}; it belongs to another data set"
        )
    return [_with_outputs(task, solutions[task.task_id], where) for task in tasks]


def _with_outputs(task: ArcTask, outputs: Sequence[Grid | None], where: str) -> ArcTask:
    if len(outputs) != len(task.test):
        raise ArcFormatError(
            f"{where} has {len(outputs)} outputs of task {task.task_id}, which has {len(task.test)} tests; "
            "it belongs to another data set"
        )
    pairs = []
    for i, (pair, output) in enumerate(zip(task.test, outputs, strict=True)):
        if None not in (pair.output, output) and pair.output != output:
            raise ArcFormatError(
                f"{where} has another output of task {task.task_id} test {i} than the data set itself"
            )
        pairs.append(replace(pair, output=pair.output or output))
    return replace(task, test=tuple(pairs))
