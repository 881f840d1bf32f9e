"""ARC tasks: what one is, and how it is read from parsed JSON."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from arc_puzzles.augmentations import Augmentation
from arc_puzzles.data_files import shown
from arc_puzzles.grids import ArcFormatError, Grid, validate_grid

PAIRS_TRAIN = 3  # of a task that is one list of pairs: so many show the rule, as in most public tasks
TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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

    @property
    def outputs(self) -> tuple[Grid | None, ...]:
        """Returns the right answer of each test; None where it is not known."""
        return tuple(pair.output for pair in self.test)

    @property
    def digest(self) -> str:
        """Returns 16 hex digits over what the puzzle shows: not over its name, nor its right answers."""
        seen = [[[pair.input, pair.output] for pair in self.train], [pair.input for pair in self.test]]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def augmented(self, augmentation: Augmentation) -> "ArcTask":
        """Returns the puzzle with every grid augmented; its answers then need `augmentation.inverse()`."""

        def apply(pair: Pair) -> Pair:
            output = None if pair.output is None else augmentation.apply(pair.output)
            return Pair(augmentation.apply(pair.input), output)

        return ArcTask(self.task_id, tuple(map(apply, self.train)), tuple(map(apply, self.test)))


@dataclass(frozen=True)
class TaskFailure:
    """Names a task that could not be used, and says why in one sentence.

    `n_tests` is how many tests it has, as far as that can be seen, else 1. The id is as the data set has it:
    it may be unsafe to print.
    """

    task_id: str
    reason: str
    n_tests: int = 1


def is_meant_as_task(content: object) -> bool:
    """Tells whether parsed JSON is a task, well-formed or not: it has "train" or "test", or lists pairs."""
    return is_pairs(content) or (isinstance(content, dict) and ("train" in content or "test" in content))


def is_pairs(content: object) -> bool:
    """Tells whether parsed JSON is a task as one list of pairs, as re-arc has them."""
    return isinstance(content, list) and bool(content) and all("input" in _keys(one) for one in content)


def count_tests(content: object) -> int:
    """Returns how many tests a task has that may be malformed; 1 where that cannot be seen."""
    tests = content.get("test") if isinstance(content, dict) else None
    return len(tests) if isinstance(tests, list) and tests else 1


def parse_task(task_id: str, content: object) -> ArcTask:
    """Returns the task that parsed JSON describes: `{"train": [pair, ...], "test": [pair, ...]}`.

    Of a list of pairs the first `PAIRS_TRAIN` are the train pairs and the next one is the test; the rest is
    not used. A test's output that is missing, null or empty is not known. Raises ArcFormatError for anything
    else.
    """
    if not TASK_ID.fullmatch(task_id):
        name = repr(task_id) if len(task_id) <= 200 else f"'{shown(task_id)}'"
        raise ArcFormatError(
            f"the task id {name} is not safe as a file name; it is 1 to 128 letters, digits, '.', '_' "
            "and '-', and begins with a letter or digit"
        )
    if is_pairs(content):
        content = _split(content)
    if not isinstance(content, dict):
        raise ArcFormatError('the task is not an object with "train" and "test"')
    return ArcTask(task_id, _pairs(content, "train"), _pairs(content, "test"))


def parse_output(value: object, where: str) -> Grid | None:
    """Returns a test's output, None where it is null or empty: not known; raises as `validate_grid`."""
    return None if value in (None, [], [[]]) else validate_grid(value, where)


def _split(pairs: Any) -> dict[str, Any]:
    if len(pairs) < 2:
        raise ArcFormatError("the task is a list of one pair; it needs one to show the rule and one to test")
    n_train = min(PAIRS_TRAIN, len(pairs) - 1)
    return {"train": pairs[:n_train], "test": pairs[n_train : n_train + 1]}


def _pairs(content: dict[str, Any], part: str) -> tuple[Pair, ...]:
    pairs = content.get(part)
    if not isinstance(pairs, list) or not pairs:
        raise ArcFormatError(f'the task has no list of "{part}" pairs')
    result = []
    for i, pair in enumerate(pairs):
        where = f"{part}[{i}]"
        for key in ("input", "output") if part == "train" else ("input",):
            if key not in _keys(pair):
                raise ArcFormatError(f'{where} has no "{key}"')
        parse = validate_grid if part == "train" else parse_output
        result.append(
            Pair(validate_grid(pair["input"], f"{where}.input"), parse(pair.get("output"), f"{where}.output"))
        )
    return tuple(result)


def _keys(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
