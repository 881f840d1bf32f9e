"""ARC tasks: reading them, asking a model about them, reading its answers, scoring and the submission file.

loaded = load_tasks("training.json")                 # tasks, and the failures of those that are malformed
encoder = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
messages = build_messages(loaded.tasks[0], 0, encoder, "output-from-examples-v0")
prompt = encode_prompt(tokenizer, messages)          # int32 [n]
grid = parse_answer(answer_text, encoder)            # or None
"""

import itertools
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from arc_puzzles.grids import (
    ArcFormatError,
    Augmentation,
    Grid,
    GridCodeBlockEncoder,
    GridEncoder,
    GridShapeEncoder,
    GridWithSeparationEncoder,
    MinimalGridEncoder,
    RowNumberEncoder,
    augmentations,
    create_grid_encoder,
    validate_grid,
)

__all__ = [
    "PROMPT_VERSIONS",
    "ArcFormatError",
    "ArcTask",
    "Augmentation",
    "Grid",
    "GridCodeBlockEncoder",
    "GridEncoder",
    "GridShapeEncoder",
    "GridWithSeparationEncoder",
    "LoadedTasks",
    "MinimalGridEncoder",
    "Pair",
    "PromptVersion",
    "RowNumberEncoder",
    "Score",
    "TaskFailure",
    "augmentations",
    "build_messages",
    "build_submission",
    "create_grid_encoder",
    "encode_prompt",
    "load_tasks",
    "parse_answer",
    "score",
    "validate_grid",
    "write_json_atomic",
]


@dataclass(frozen=True)
class Pair:
    """An input grid and its output grid; None where the output is not known."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True)
class ArcTask:
    """One puzzle. `task_id` is file-name safe; every train pair has its output, a test pair may have it."""

    task_id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def augmented(self, augmentation: Augmentation) -> "ArcTask":
        """The same puzzle with every grid augmented. A model's answers then need `augmentation.inverse()`."""

        def apply(pair: Pair) -> Pair:
            output = None if pair.output is None else augmentation.apply(pair.output)
            return Pair(augmentation.apply(pair.input), output)

        return ArcTask(self.task_id, tuple(map(apply, self.train)), tuple(map(apply, self.test)))


@dataclass(frozen=True)
class TaskFailure:
    """A task that could not be used, and why, in one sentence."""

    task_id: str
    reason: str


@dataclass(frozen=True)
class LoadedTasks:
    """The usable tasks of a data set and a failure for each of the others, both in the data set's order."""

    tasks: tuple[ArcTask, ...]
    failures: tuple[TaskFailure, ...]


# --- Loading ------------------------------------------------------------------------------------------------

TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def load_tasks(path: str | Path, limit: int | None = None) -> LoadedTasks:
    """Read a data set, or its first `limit` tasks, in one of three forms, told apart by what `path` is:

    - a directory: one `<task_id>.json` a task, taken in the order of their names;
    - a file named `*.jsonl`: one task a line, an object with "task_id" beside "train" and "test";
    - any other file: one JSON object `{task_id: {"train": [...], "test": [...]}}`.

    What is wrong within one task makes that task a failure. Raises ArcFormatError where the data set as a
    whole cannot be trusted: it is missing, unreadable, empty or of no such form, it is not strict JSON (NaN
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
    # A file here is one task and its name says which, so that even broken JSON fails that task alone.
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
    """Strict JSON: no constants beyond the standard's, and no key twice in an object."""

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


# --- Prompts and answers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptVersion:
    """The words around a puzzle: the system message, and what the user says before the examples."""

    system: str
    introduction: str


PROMPT_VERSIONS = {
    "output-from-examples-v0": PromptVersion(
        system="You solve puzzles on coloured grids. Answer with the output grid only.",
        introduction="Find the rule that turns each input into its output, and apply it to the test input.",
    ),
    "output-from-examples-v1": PromptVersion(
        system=(
            "You solve puzzles on coloured grids. You look for the one rule that explains every example, you "
            "apply it exactly, and you answer with the output grid only."
        ),
        introduction=(
            "A grid is a rectangle of cells. Every cell is a digit from 0 to 9 that stands for a colour; 0 "
            "is usually the background. A grid has between 1 and 30 rows and between 1 and 30 columns.\n\n"
            "Each example below shows an input grid and the output grid that a hidden rule makes of it. The "
            "rule is the same in all of them. It may move, turn, copy, recolour, count or complete shapes, "
            "and the output may have another shape than the input.\n\n"
            "Find the rule, check it against every example, and apply it to the test input. Write the output "
            "grid in exactly the format of the grids below, and nothing else."
        ),
    ),
}


def build_messages(
    task: ArcTask, test_index: int, encoder: GridEncoder, prompt_version: str
) -> list[dict[str, str]]:
    """The chat that asks for one test's output: `[{"role": "system", "content": ...}, {"role": "user", ..}]`.

    All train pairs and the test input are in it, whatever their size; the test's output never is. Raises
    ValueError for an unknown prompt version or a test that the task does not have.
    """
    if prompt_version not in PROMPT_VERSIONS:
        raise ValueError(f"unknown prompt version {prompt_version!r}; known are {', '.join(PROMPT_VERSIONS)}")
    if not 0 <= test_index < len(task.test):
        raise ValueError(f"task {task.task_id} has {len(task.test)} tests, there is no test {test_index}")
    version = PROMPT_VERSIONS[prompt_version]
    parts = [version.introduction]
    for number, pair in enumerate(task.train, start=1):
        assert pair.output is not None
        parts.append(f"### Example {number}")
        parts.append(f"Input:\n{encoder.encode(pair.input)}")
        parts.append(f"Output:\n{encoder.encode(pair.output)}")
    parts.append("### Test")
    parts.append(f"Input:\n{encoder.encode(task.test[test_index].input)}")
    return [
        {"role": "system", "content": version.system},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


def encode_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> np.ndarray:
    """Token ids, int32 `[n]`, of the chat and of the opening of the assistant's turn, by the chat template.

    Raises ValueError if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path
        raise ValueError(f"the tokenizer {name!r} has no chat template; use the tokenizer of a chat model")
    # Without return_dict=False, transformers 5 returns a mapping where transformers 4 returned a list.
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return np.asarray(ids, np.int32)


def parse_answer(text: str, encoder: GridEncoder) -> Grid | None:
    """The grid in a model's answer, or None; never raises.

    Text before and after the grid is passed over: the last closed code block counts, or for formats without
    code blocks the last run of lines that look like rows. That part has to be a grid to the letter: where it
    is ragged, too large, misnumbered or announced with another shape, there is no grid.
    """
    found = encoder.find(text)
    if found is None:
        return None
    try:
        return encoder.decode(found)
    except ArcFormatError:
        return None


# --- Scores and submissions ---------------------------------------------------------------------------------

Submission = dict[str, list[dict[str, list[list[int]]]]]


@dataclass(frozen=True)
class Score:
    """A test is solved if any attempt equals its output, a task if all of its tests are.

    `*_known` counts those whose outputs the data set has (for a task, all of them), `*_unknown` the rest.
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
    """`{task_id: [{"attempt_1": grid, "attempt_2": grid, ...} for each test]}`, with grids as lists of lists.

    `attempts` is keyed by (task id, test index). An attempt that is None, as `parse_answer` gives it, becomes
    `[]`; a test without attempts becomes `{}`. Raises ValueError for attempts at what is not in `tasks`.
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
    """Compare a submission with the outputs that the tasks have; what it lacks counts as not solved."""
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


def write_json_atomic(path: str | Path, obj: object) -> None:
    """Write `obj` as JSON so that `path` at any moment holds either its old content or all of the new.

    The file gets the mode that the umask gives any new file. Raises ValueError for what is not JSON (NaN),
    OSError where it cannot be written; `path` is then as it was.
    """
    path = Path(path)
    text = json.dumps(obj, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename durable
    finally:
        os.close(folder)
