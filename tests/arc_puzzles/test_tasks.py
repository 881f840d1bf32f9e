"""ARC tasks: which data sets load, which errors fail one task and which the whole data set, atomic files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from puzzle_cases import GOOD, GOOD_TASK, write

from arc_puzzles.augmentations import Augmentation, choose_augmentations
from arc_puzzles.grids import ArcFormatError
from arc_puzzles.tasks import ArcTask, Pair, TaskFailure, load_tasks

# --- Loading ------------------------------------------------------------------------------------------------


def write_dict(folder: Path, tasks: dict[str, object]) -> Path:
    return write(folder / "tasks.json", tasks)


def write_directory(folder: Path, tasks: dict[str, object]) -> Path:
    for task_id, task in tasks.items():
        write(folder / f"{task_id}.json", task)
    return folder


def write_jsonl(folder: Path, tasks: dict[str, Any]) -> Path:
    lines = [json.dumps({"task_id": task_id, **task}) for task_id, task in tasks.items()]
    return write(folder / "tasks.jsonl", "\n".join(lines) + "\n")


@pytest.mark.parametrize("form", [write_dict, write_directory, write_jsonl])
def test_the_three_forms_of_a_data_set_load_the_same_tasks(tmp_path: Path, form):
    loaded = load_tasks(form(tmp_path, {"good": GOOD}))
    assert loaded.tasks == (GOOD_TASK,)
    assert loaded.failures == ()


@pytest.mark.parametrize(
    ("form", "order"),
    [(write_dict, ["b", "a", "c"]), (write_directory, ["a", "b", "c"]), (write_jsonl, ["b", "a", "c"])],
)
def test_tasks_keep_the_order_of_the_file_or_of_the_names_in_a_directory(
    tmp_path: Path, form, order: list[str]
):
    loaded = load_tasks(str(form(tmp_path, {"b": GOOD, "a": GOOD, "c": GOOD})))
    assert [task.task_id for task in loaded.tasks] == order


def test_other_files_in_a_directory_and_empty_lines_of_jsonl_are_ignored(tmp_path: Path):
    write(tmp_path / "README.md", "# not a task")
    write(tmp_path / "a.json", GOOD)
    assert [task.task_id for task in load_tasks(tmp_path).tasks] == ["a"]
    lines = f"\n{json.dumps({'task_id': 'a', **GOOD})}\n\n"
    assert [task.task_id for task in load_tasks(write(tmp_path / "x.jsonl", lines)).tasks] == ["a"]


@pytest.mark.parametrize("form", [write_dict, write_directory, write_jsonl])
@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({**GOOD, "train": []}, 'the task has no list of "train" pairs'),
        ({**GOOD, "train": {"input": [[1]]}}, 'the task has no list of "train" pairs'),
        ({"train": GOOD["train"]}, 'the task has no list of "test" pairs'),
        ({**GOOD, "train": [{"input": [[1]]}]}, 'train[0] has no "output"'),
        ({**GOOD, "test": [{"output": [[1]]}]}, 'test[0] has no "input"'),
        ({**GOOD, "test": [[[1]]]}, 'test[0] has no "input"'),
        (
            {**GOOD, "train": [{"input": [[1]], "output": [[1, 2], [1]]}]},
            "train[0].output row 1 has 1 cells, but row 0 has 2",
        ),
        (
            {**GOOD, "test": [{"input": [[1]]}, {"input": [[1, 11]]}]},
            "test[1].input row 0 column 1 is not a colour from 0 to 9",
        ),
        ({**GOOD, "test": [{"input": [[1]], "output": None}]}, "test[0].output is null, not a list of rows"),
    ],
)
def test_a_malformed_task_fails_alone_and_the_others_load(tmp_path: Path, form, task: object, reason: str):
    loaded = load_tasks(form(tmp_path, {"a": GOOD, "bad": task, "c": GOOD}))
    assert [task.task_id for task in loaded.tasks] == ["a", "c"]
    assert loaded.failures == (TaskFailure("bad", reason),)


def test_a_task_that_is_not_an_object_fails_alone(tmp_path: Path):
    loaded = load_tasks(write_dict(tmp_path, {"a": GOOD, "bad": [1]}))
    assert loaded.failures == (TaskFailure("bad", 'the task is not an object with "train" and "test"'),)
    assert len(loaded.tasks) == 1


@pytest.mark.parametrize("form", [write_dict, write_jsonl])
@pytest.mark.parametrize(
    "task_id", ["", "../up", "a/b", ".hidden", "a b", "naïve", "a\n", "x" * 129, "-flag"]
)
def test_an_unsafe_task_id_fails_its_task(tmp_path: Path, form, task_id: str):
    loaded = load_tasks(form(tmp_path, {task_id: GOOD, "x" * 128: GOOD, "A.b_c-9": GOOD}))
    assert [task.task_id for task in loaded.tasks] == ["x" * 128, "A.b_c-9"]
    assert [failure.task_id for failure in loaded.failures] == [task_id]
    assert f"the task id {task_id!r} is not safe as a file name" in loaded.failures[0].reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "bad.json is not JSON: "),
        ('{"train": NaN}', "bad.json is not JSON: it contains NaN"),
        ('{"train": [], "train": []}', "bad.json has the key 'train' twice in one object"),
    ],
)
def test_in_a_directory_a_broken_file_fails_only_its_task(tmp_path: Path, text: str, reason: str):
    write_directory(tmp_path, {"a": GOOD, "c": GOOD})
    write(tmp_path / "bad.json", text)
    loaded = load_tasks(tmp_path)
    assert [task.task_id for task in loaded.tasks] == ["a", "c"]
    assert [failure.task_id for failure in loaded.failures] == ["bad"]
    assert loaded.failures[0].reason.startswith(reason)


ONE_LINE = json.dumps({"task_id": "a", **GOOD})


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("t.json", "", "is not JSON: "),
        ("t.json", "{'a': 1}", "is not JSON: "),
        ("t.json", f"{ONE_LINE}\n{ONE_LINE}", "is not JSON: Extra data"),
        ("t.json", '{"a": {"train": [NaN]}}', "is not JSON: it contains NaN"),
        ("t.json", '{"a": {"train": [-Infinity]}}', "is not JSON: it contains -Infinity"),
        ("t.json", '{"a": ' + "9" * 5000 + "}", "is not JSON: "),
        ("t.json", "[" * 200_000, "is not JSON: "),
        ("t.json", '{"a": {}, "b": {}, "a": {}}', "has the key 'a' twice in one object"),
        ("t.json", '{"a": {"test": [{"input": 1, "input": 2}]}}', "has the key 'input' twice in one object"),
        ("t.json", "{}", "has no tasks in it"),
        ("t.json", "[]", "is not a JSON object of the form {task_id: task}"),
        ("t.json", '"tasks"', "is not a JSON object of the form {task_id: task}"),
        ("t.json", json.dumps(GOOD), "is a single task; name its directory, or write {task_id: task}"),
        ("t.jsonl", "\n", "has no tasks in it"),
        ("t.jsonl", f"{ONE_LINE}\n\n[1]", 't.jsonl line 3 is not an object with a text "task_id"'),
        ("t.jsonl", json.dumps(GOOD), 't.jsonl line 1 is not an object with a text "task_id"'),
        ("t.jsonl", '{"task_id": 7}', 't.jsonl line 1 is not an object with a text "task_id"'),
        ("t.jsonl", f"{ONE_LINE}\n{{", "t.jsonl line 2 is not JSON: "),
        ("t.jsonl", f"{ONE_LINE}\n\n{ONE_LINE}", "has the task 'a' twice, on lines 1 and 3"),
        ("t.jsonl", '{"task_id": "a", "task_id": "b"}', "t.jsonl line 1 has the key 'task_id' twice"),
    ],
)
def test_an_ambiguous_or_malformed_data_set_is_refused(tmp_path: Path, name: str, text: str, problem: str):
    path = write(tmp_path / name, text)
    with pytest.raises(ArcFormatError, match=re.escape(problem)) as refused:
        load_tasks(path)
    assert str(path) in str(refused.value)


def test_a_missing_an_empty_and_a_non_utf8_data_set_are_refused(tmp_path: Path):
    with pytest.raises(ArcFormatError, match=r"cannot read .*nowhere.json: No such file"):
        load_tasks(tmp_path / "nowhere.json")
    with pytest.raises(ArcFormatError, match="has no tasks in it"):
        load_tasks(tmp_path)
    (tmp_path / "t.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(ArcFormatError, match="is not JSON: byte 2 is not UTF-8"):
        load_tasks(tmp_path / "t.json")


# --- Augmented tasks ----------------------------------------------------------------------------------------


def test_augmenting_a_task_augments_every_grid_and_the_inverse_restores_it():
    augmentation = Augmentation.parse("rot90/c0213456789")
    augmented = GOOD_TASK.augmented(augmentation)
    assert augmented == ArcTask(
        "good",
        train=(Pair(((2,), (1,)), ((1,), (2,))),),
        test=(Pair(((3,), (4,)), ((4,), (3,))), Pair(((5,),), None)),
    )
    for augmentation in choose_augmentations(20, seed=1):
        assert GOOD_TASK.augmented(augmentation).augmented(augmentation.inverse()) == GOOD_TASK
