"""Data sets of ARC tasks: every form in which they are published, read into tasks and failures."""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arc_puzzles.data_files import parse_json, read_json, read_text, shown
from arc_puzzles.grids import ArcFormatError
from arc_puzzles.solutions import read_solutions, solutions_beside, with_solutions
from arc_puzzles.tasks import (
    PAIRS_TRAIN,
    ArcTask,
    TaskFailure,
    count_tests,
    is_meant_as_task,
    is_pairs,
    parse_task,
)

_JSON = (".json", ".json.gz")
_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_IDS = ("task_id", "id", "name")  # the first of these that is a text names a task of a list
_NAMED = 10  # skipped files that are named


@dataclass(frozen=True)
class LoadedTasks:
    """Holds the usable tasks of a data set and a failure for each other one, both in the data set's order.

    `outline` is (task id, number of tests) of all of them, in that order. `notices` are sentences for a
    person about what was skipped, or found beside the data.
    """

    tasks: tuple[ArcTask, ...]
    failures: tuple[TaskFailure, ...]
    outline: tuple[tuple[str, int], ...] = ()
    notices: tuple[str, ...] = ()


def load_tasks(
    path: str | Path, limit: int | None = None, solutions: str | Path | None = None
) -> LoadedTasks:
    """Reads a data set, or its first `limit` tasks. `path` is one of:

    - a directory with one `<task_id>.json` per task, also in folders within it, in the order of their paths.
      Where two files have one name, their ids are their paths, joined by dots. Hidden files, and JSON that
      has neither "train" nor "test" and is no list of pairs, are skipped with a notice;
    - a file `*.jsonl` or `*.ndjson` with one task per line, an object with "task_id", "id" or "name";
    - any other file, one JSON value: `{task_id: task, ...}`, a list of such objects, the Hugging Face form
      `{"rows": [{"row": task}, ...]}`, or a single task, named by the file.

    Each may be packed with gzip. A task is `{"train": [...], "test": [...]}`, whatever else it has, or a
    list of pairs as in re-arc (see `parse_task`). `solutions` is a file `{task_id: [output, ...]}` as Kaggle
    has them; without it, `*_solutions.json` beside `*_challenges.json` is read.

    An error within one task makes that task a failure. Raises ArcFormatError where the data set as a whole
    cannot be trusted: it is missing, unreadable, empty or of none of these forms, it is not strict JSON (NaN
    and Infinity are not), a key or a task id occurs twice, or the solutions are not those of these tasks.
    """
    path = Path(path)
    found = _Found()
    if path.is_dir():
        entries = _directory_entries(path, found)
    elif path.name.lower().endswith(_LINES):
        entries = _line_entries(path)
    else:
        entries = _file_entries(path, found)
    tasks: list[ArcTask] = []
    failures: list[TaskFailure] = []
    outline: list[tuple[str, int]] = []
    for task_id, content in itertools.islice(entries, None if limit is None else min(limit, sys.maxsize)):
        n_tests = count_tests(content)
        outline.append((task_id, n_tests))
        found.lists_of_pairs += is_pairs(content)
        try:
            if isinstance(content, ArcFormatError):
                raise content
            tasks.append(parse_task(task_id, content))
        except ArcFormatError as error:
            failures.append(TaskFailure(task_id, str(error), n_tests))
    if not outline:
        raise ArcFormatError(f"the data set {shown(str(path))} has no tasks in it{found.hint()}")
    answers = Path(solutions) if solutions is not None else solutions_beside(path)
    if answers is not None:
        tasks = with_solutions(tasks, read_solutions(answers), answers)
        found.notices.append(f"right answers from {shown(str(answers))}")
    return LoadedTasks(tuple(tasks), tuple(failures), tuple(outline), tuple(found.sentences()))


@dataclass
class _Found:
    """Collects what is worth a notice while a data set is read."""

    skipped: list[str] = field(default_factory=list)
    what: str = "file"
    lists_of_pairs: int = 0
    notices: list[str] = field(default_factory=list)

    def sentences(self) -> Iterator[str]:
        if self.skipped:
            one = len(self.skipped) == 1
            yield (
                f"skipped {len(self.skipped)} {self.what}{'' if one else 's'} of the data set that "
                f"{'is no task' if one else 'are no tasks'}: {self._names()}"
            )
        if self.lists_of_pairs:
            yield (
                f"{self.lists_of_pairs} tasks are lists of pairs: of each, the first {PAIRS_TRAIN} show the "
                "rule, the next is the test, the rest is not used"
            )
        yield from self.notices

    def hint(self) -> str:
        """Returns how an error goes on where everything was skipped."""
        if not self.skipped:
            return ""
        return f"; what is there are no single tasks ({self._names()}): if one is a data set, name that file"

    def _names(self) -> str:
        more = len(self.skipped) - _NAMED
        return ", ".join(map(shown, sorted(self.skipped)[:_NAMED])) + (
            f" and {more} more" if more > 0 else ""
        )


# --- Directories --------------------------------------------------------------------------------------------


def _directory_entries(path: Path, found: _Found) -> Iterator[tuple[str, object]]:
    # Each file is one task, named by the file: broken JSON fails that task alone.
    files = _json_files(path, found)
    names = Counter(_stem(file) for file in files)
    seen: dict[str, Path] = {}
    for file in files:
        task_id = _stem(file)
        if names[task_id] > 1:
            task_id = ".".join([*file.relative_to(path).parent.parts, task_id])
        if task_id in seen:
            raise ArcFormatError(
                f"{shown(str(file))} and {shown(str(seen[task_id]))} are the same task by name; rename one"
            )
        seen[task_id] = file
        try:
            content = parse_json(read_text(file), shown(file.name))
        except ArcFormatError as error:
            yield task_id, error
            continue
        if is_meant_as_task(content):
            yield task_id, content
        else:
            found.skipped.append(str(file.relative_to(path)))


def _json_files(path: Path, found: _Found) -> list[Path]:
    """Returns the files that may be tasks, by path; links are followed, though not in circles."""
    files: list[Path] = []
    visited: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise ArcFormatError(f"cannot read {shown(str(error.filename))}: {error.strerror}") from error

    for folder, folders, names in os.walk(path, followlinks=True, onerror=refuse):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        for name in names:
            file = Path(folder, name)
            lower = name.lower()
            if lower.endswith(_LINES) or (name.startswith(".") and lower.endswith(_JSON)):
                found.skipped.append(str(file.relative_to(path)))
            elif lower.endswith(_JSON):
                files.append(file)
    return sorted(files)


def _stem(path: Path) -> str:
    """Returns a file's name without `.json` and `.gz`."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return Path(name).stem


# --- Single files -------------------------------------------------------------------------------------------


def _line_entries(path: Path) -> Iterator[tuple[str, object]]:
    lines = (
        (f"line {number}", line)
        for number, line in enumerate(read_text(path).split("\n"), start=1)
        if line.strip()
    )
    where = shown(str(path))
    return _listed(((place, parse_json(line, f"{where} {place}")) for place, line in lines), where)


def _file_entries(path: Path, found: _Found) -> Iterator[tuple[str, object]]:
    content, where = read_json(path), shown(str(path))
    if is_pairs(content) or (
        isinstance(content, dict) and any(isinstance(content.get(part), list) for part in ("train", "test"))
    ):
        return iter([(_stem(path), content)])
    if isinstance(content, dict) and isinstance(content.get("rows"), list):
        return _row_entries(content, where, found)
    if isinstance(content, list) and content:
        return _listed(((f"item {i}", item) for i, item in enumerate(content)), where)
    if not isinstance(content, dict):
        raise ArcFormatError(f"{where} is not a JSON object of the form {{task_id: task}}")
    _refuse_other_contents(content, where)
    found.what = "key"
    tasks = {key: value for key, value in content.items() if not _is_beside_tasks(value)}
    found.skipped += [key for key in content if key not in tasks]
    return iter(tasks.items())


def _is_beside_tasks(value: object) -> bool:
    """Tells whether a value beside tasks says something of them; a list, or {}, is a malformed task."""
    if isinstance(value, dict):
        return bool(value) and not is_meant_as_task(value)
    return not isinstance(value, list)


def _row_entries(content: dict[str, Any], where: str, found: _Found) -> Iterator[tuple[str, object]]:
    """Yields the tasks of a page of Hugging Face rows; those of which cells were cut off are failures."""
    rows, total = content["rows"], content.get("num_rows_total")
    if isinstance(total, int) and total > len(rows):
        found.notices.append(
            f"{where} has {len(rows)} of the data set's {total} rows; ask for the others with offset= and "
            "length="
        )
    whole = [row.get("row", row) if isinstance(row, dict) else row for row in rows]
    tasks = _listed(((f"row {i}", row) for i, row in enumerate(whole)), where)
    for (task_id, task), row in zip(tasks, rows, strict=True):
        cut = row.get("truncated_cells")
        yield task_id, ArcFormatError(f"the server cut off its {_cells(cut)}") if cut else task


def _cells(cut: object) -> str:
    return shown(", ".join(map(str, cut)) if isinstance(cut, list) else str(cut))


def _refuse_other_contents(content: dict[str, object], where: str) -> None:
    """Raises ArcFormatError for solutions, submissions and other JSON objects without any task."""
    if not content or any(map(is_meant_as_task, content.values())):
        return
    lists = [value for value in content.values() if isinstance(value, list) and value]
    if len(lists) == len(content):
        if all(isinstance(one, dict) and "attempt_1" in one for value in lists for one in value):
            raise ArcFormatError(f"{where} holds answers, not tasks; name the file of the tasks")
        if all(isinstance(grid, list) for value in lists for grid in value):
            raise ArcFormatError(
                f"{where} holds solutions, not tasks; name the file of the challenges as --dataset_path"
            )
    raise ArcFormatError(f'{where} holds no tasks: no value in it has "train" and "test"')


def _listed(items: Iterator[tuple[str, object]], where: str) -> Iterator[tuple[str, object]]:
    """Yields the tasks of a list, each named by itself.

    Raises ArcFormatError for one without a name, and for a name that occurs twice.
    """
    place_of: dict[str, str] = {}
    for place, content in items:
        names = [content.get(key) for key in _IDS] if isinstance(content, dict) else []
        task_id = next((name for name in names if isinstance(name, str)), None)
        if task_id is None:
            raise ArcFormatError(f'{where} {place} is not an object with a text "task_id", "id" or "name"')
        if task_id in place_of:
            kind, first = place_of[task_id].split(" ")
            raise ArcFormatError(
                f"{where} has the task '{shown(task_id)}' twice, on {kind}s {first} and {place.split(' ')[1]}"
            )
        place_of[task_id] = place
        yield task_id, content
