"""ARC tasks: reading a data set, and telling the malformed tasks from the others."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from arc_puzzles.augmentations import Augmentation
from arc_puzzles.grids import ArcFormatError, Grid, validate_grid


@dataclass(frozen=True)
class Pair:
    """Holds an input grid and its output grid; None where the output is not known."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True)
class ArcTask:
    """Holds one puzzle. `task_id` is safe as a file name; a test pair may lack its output."""

    task_id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def augmented(self, augmentation: Augmentation) -> "ArcTask":
        """Returns the puzzle with every grid augmented; its answers then need `augmentation.inverse()`."""

        def apply(pair: Pair) -> Pair:
            output = None if pair.output is None else augmentation.apply(pair.output)
            return Pair(augmentation.apply(pair.input), output)

        return ArcTask(self.task_id, tuple(map(apply, self.train)), tuple(map(apply, self.test)))


@dataclass(frozen=True)
class TaskFailure:
    """Names a task that could not be used, and says why in one sentence."""

    task_id: str
    reason: str


@dataclass(frozen=True)
class LoadedTasks:
    """Holds the usable tasks of a data set and a failure for each other one, both in the data set's order."""

    tasks: tuple[ArcTask, ...]
    failures: tuple[TaskFailure, ...]


TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def load_tasks(path: str | Path, limit: int | None = None) -> LoadedTasks:
    """Reads a data set, or its first `limit` tasks. `path` is one of:

    - a directory with one `<task_id>.json` per task, read in the order of their names;
    - a file named `*.jsonl` with one task per line, an object with "task_id" beside "train" and "test";
    - any other file: one JSON object `{task_id: {"train": [...], "test": [...]}}`.

    An error within one task makes that task a failure. Raises ArcFormatError where the data set as a whole
    cannot be trusted: it is missing, unreadable, empty or of none of these forms, it is not strict JSON (NaN
    and Infinity are not), or a key or a task id occurs twice.
    """
    path = Path(path)
    if path.is_dir():
        entries = _directory_entries(path)
    elif path.suffix == ".jsonl":
        entries = _jsonl_entries(path)
    else:
        entries = _dict_entries(path)
    tasks: list[ArcTask] = []
    failures: list[TaskFailure] = []
    for task_id, content in itertools.islice(entries, limit):
        try:
            if isinstance(content, ArcFormatError):
                raise content
            tasks.append(_task(task_id, content))
        except ArcFormatError as error:
            failures.append(TaskFailure(task_id, str(error)))
    if not tasks and not failures:
        raise ArcFormatError(f"the data set {path} has no tasks in it")
    return LoadedTasks(tuple(tasks), tuple(failures))


def _directory_entries(path: Path) -> Iterator[tuple[str, object]]:
    # Each file is one task, named by the file: broken JSON fails that task alone.
    for file in sorted(path.glob("*.json")):
        try:
            yield file.stem, _parse_json(_read_text(file), file.name)
        except ArcFormatError as error:
            yield file.stem, error


def _jsonl_entries(path: Path) -> Iterator[tuple[str, object]]:
    line_of: dict[str, int] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        content = _parse_json(line, f"{path} line {number}")
        task_id = content.get("task_id") if isinstance(content, dict) else None
        if not isinstance(task_id, str):
            raise ArcFormatError(f'{path} line {number} is not an object with a text "task_id"')
        if task_id in line_of:
            raise ArcFormatError(
                f"{path} has the task {task_id!r} twice, on lines {line_of[task_id]} and {number}"
            )
        line_of[task_id] = number
        yield task_id, content


def _dict_entries(path: Path) -> Iterator[tuple[str, object]]:
    content = _parse_json(_read_text(path), str(path))
    if not isinstance(content, dict):
        raise ArcFormatError(f"{path} is not a JSON object of the form {{task_id: task}}")
    if isinstance(content.get("train"), list):
        raise ArcFormatError(f"{path} is a single task; name its directory, or write {{task_id: task}}")
    yield from content.items()


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ArcFormatError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArcFormatError(f"{path} is not JSON: byte {error.start} is not UTF-8") from error


def _parse_json(text: str, where: str) -> object:
    """Parses strict JSON: refuses NaN and Infinity, and a key that occurs twice in an object."""

    def refuse_constant(constant: str) -> NoReturn:
        raise ArcFormatError(f"{where} is not JSON: it contains {constant}")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result:
                raise ArcFormatError(f"{where} has the key {key!r} twice in one object")
            result[key] = value
        return result

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except ArcFormatError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise ArcFormatError(f"{where} is not JSON: {error}") from error


def _task(task_id: str, content: object) -> ArcTask:
    if not TASK_ID.fullmatch(task_id):
        raise ArcFormatError(
            f"the task id {task_id!r} is not safe as a file name; it is 1 to 128 letters, digits, '.', '_' "
            "and '-', and begins with a letter or digit"
        )
    if not isinstance(content, dict):
        raise ArcFormatError('the task is not an object with "train" and "test"')
    return ArcTask(task_id, _pairs(content, "train"), _pairs(content, "test"))


def _pairs(content: dict[str, Any], part: str) -> tuple[Pair, ...]:
    pairs = content.get(part)
    if not isinstance(pairs, list) or not pairs:
        raise ArcFormatError(f'the task has no list of "{part}" pairs')
    result = []
    for i, pair in enumerate(pairs):
        where = f"{part}[{i}]"
        required = ("input", "output") if part == "train" else ("input",)
        for key in required:
            if not isinstance(pair, dict) or key not in pair:
                raise ArcFormatError(f'{where} has no "{key}"')
        output = validate_grid(pair["output"], f"{where}.output") if "output" in pair else None
        result.append(Pair(validate_grid(pair["input"], f"{where}.input"), output))
    return tuple(result)
