"""Which data sets load, which errors fail one task and which the whole data set."""

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from puzzle_cases import GOOD, GOOD_TASK, write

from arc_puzzles import data_files
from arc_puzzles.data_sets import load_tasks
from arc_puzzles.grids import ArcFormatError
from arc_puzzles.tasks import TaskFailure

CUT_GZIP = gzip.compress(json.dumps({"a": GOOD}).encode(), mtime=0)[:-9].decode("latin-1")


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
        (
            {**GOOD, "train": [{"input": [[1]], "output": None}]},
            "train[0].output is null, not a list of rows",
        ),
        (
            {**GOOD, "train": [{"input": [[1]], "output": []}]},
            "train[0].output has 0 rows; a grid has 1 to 30",
        ),
    ],
)
def test_a_malformed_task_fails_alone_and_the_others_load(tmp_path: Path, form, task: object, reason: str):
    loaded = load_tasks(form(tmp_path, {"a": GOOD, "bad": task, "c": GOOD}))
    assert [task.task_id for task in loaded.tasks] == ["a", "c"]
    assert [(failure.task_id, failure.reason) for failure in loaded.failures] == [("bad", reason)]


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


# --- Forms in which data sets are published -----------------------------------------------------------------


def ids(path: Path) -> list[str]:
    loaded = load_tasks(path)
    assert loaded.failures == ()
    assert [task_id for task_id, _ in loaded.outline] == [task.task_id for task in loaded.tasks]
    return [task.task_id for task in loaded.tasks]


def named(*names: str, key: str = "id") -> list[dict[str, Any]]:
    return [{key: name, **GOOD} for name in names]


def lines(*tasks: Any) -> str:
    return "\r\n".join(map(json.dumps, tasks)) + "\r\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.jsonl", lines(*named("b", "a")), ["b", "a"]),
        ("t.ndjson", lines(*named("b", "a", key="name")), ["b", "a"]),
        ("t.JSONL", lines({"task_id": "x", "id": "y", "name": "z", **GOOD}), ["x"]),
        ("t.jsonl", lines({"id": 3, "name": "z", **GOOD}), ["z"]),
        ("t.json", named("b", "a"), ["b", "a"]),
        ("t.json", {"features": [], "rows": [{"row_idx": 0, "row": named("r")[0]}], "partial": False}, ["r"]),
        ("t.json", {"rows": named("r", "s")}, ["r", "s"]),
        ("0d87d2a6.json", GOOD, ["0d87d2a6"]),
        ("0d87d2a6.json", [*GOOD["train"], *GOOD["train"]], ["0d87d2a6"]),
        ("v1.2.json", GOOD, ["v1.2"]),
        ("t.json", {"a": {"name": "x", "source": "y", **GOOD}}, ["a"]),
        ("t.json", {"train": GOOD, "test": GOOD}, ["train", "test"]),
        ("t.json", {"a": [*GOOD["train"], *GOOD["train"]], "b": GOOD}, ["a", "b"]),
    ],
)
def test_a_file_of_tasks_loads_in_every_published_form(
    tmp_path: Path, name: str, content: object, expected: list[str]
):
    assert ids(write(tmp_path / name, content)) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_encoding_and_packing_of_a_file_make_no_difference(tmp_path: Path, encoding: str, packed: bool):
    text = json.dumps({"a": {"name": "é", **GOOD}}, indent=1, ensure_ascii=False).replace("\n", "\r\n")
    line = json.dumps({"id": "a", **GOOD})
    for name, content in (("t.json", text), ("t.jsonl", line)):
        data = content.encode(encoding)
        file = tmp_path / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(data) if packed else data)
        assert ids(file) == ["a"]


def test_folders_within_a_directory_are_read_and_equal_names_told_apart_by_their_path(tmp_path: Path):
    for name in ("corpus/Copy/Copy1", "corpus/Count/Count1", "corpus/Count/Min", "minimal/Min", "top"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / f"{name}.json", GOOD)
    assert ids(tmp_path) == ["Copy1", "Count1", "corpus.Count.Min", "minimal.Min", "top"]


def test_links_in_a_directory_are_followed_but_not_in_circles(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    write(tmp_path / "elsewhere" / "a.json", GOOD)
    (tmp_path / "data" / "training").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert ids(tmp_path / "data") == ["a"]


def test_two_files_of_one_name_are_refused(tmp_path: Path):
    write(tmp_path / "a.json", GOOD)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    with pytest.raises(ArcFormatError, match=r"a\.json\.gz and .*a\.json are the same task by name; rename"):
        load_tasks(tmp_path)


def test_a_path_that_is_also_another_files_name_is_refused(tmp_path: Path):
    (tmp_path / "a").mkdir()
    for name in ("a/b.json", "b.json", "a.b.json"):
        write(tmp_path / name, GOOD)
    with pytest.raises(ArcFormatError, match="are the same task by name; rename one"):
        load_tasks(tmp_path)


def test_what_is_no_task_in_a_directory_is_skipped_and_named_once(tmp_path: Path):
    write(tmp_path / "a.json", GOOD)
    for name in ("dataset_info.json", "README.json", "empty.json"):
        write(tmp_path / name, {"splits": {"train": {"num_examples": 400}}, "homepage": "x"})
    write(tmp_path / "list.json", [1, 2])
    write(tmp_path / "number.json", "3")
    (tmp_path / "._a.json").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "notes.txt").touch()
    for folder in (".git", ".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.json", GOOD)
    loaded = load_tasks(tmp_path)
    assert ([task.task_id for task in loaded.tasks], loaded.failures) == (["a"], ())
    assert loaded.notices == (
        "skipped 6 files of the data set that are no tasks: ._a.json, README.json, dataset_info.json, "
        "empty.json, list.json, number.json",
    )


def test_a_file_that_is_meant_as_a_task_is_never_skipped(tmp_path: Path):
    bad = {
        "cut-off": json.dumps(GOOD)[:-9],
        "empty": "",
        "no-test": {"train": "see below"},
        "no-train": {"test": GOOD["test"]},
        "one-pair": GOOD["train"],
        "zeros": "\0" * 64,
    }
    for name, content in bad.items():
        write(tmp_path / f"{name}.json", content)
    loaded = load_tasks(tmp_path)
    assert [failure.task_id for failure in loaded.failures] == list(bad)
    assert not any("skipped" in notice for notice in loaded.notices)
    assert dict(loaded.outline)["no-train"] == 2


def test_values_beside_the_tasks_of_an_object_are_skipped_and_named(tmp_path: Path):
    path = write(tmp_path / "t.json", {"version": 1.5, "a": GOOD, "source\x1b[31m": "x", "final": True})
    assert ids(path) == ["a"]
    assert load_tasks(path).notices == (
        r"skipped 3 keys of the data set that are no tasks: final, source\x1b[31m, version",
    )


def test_metadata_beside_the_tasks_of_an_object_is_skipped_and_named(tmp_path: Path):
    meta = {"_meta": {"v": 1}, "note": None, "splits": {"all": ["a"]}, "a": GOOD, "b": GOOD}
    path = write(tmp_path / "t.json", meta)
    assert ids(path) == ["a", "b"]
    assert load_tasks(path).notices == (
        "skipped 3 keys of the data set that are no tasks: _meta, note, splits",
    )
    bad = {"a": GOOD, "no-test": {"train": None}, "empty": {}, "list": [], "note": None}
    loaded = load_tasks(write(tmp_path / "bad.json", bad))
    assert [failure.task_id for failure in loaded.failures] == ["no-test", "empty", "list"]
    assert loaded.notices == ("skipped 1 key of the data set that is no task: note",)


def test_a_page_of_rows_that_is_not_the_whole_data_set_is_said(tmp_path: Path):
    rows = [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(named("a", "b"))]
    page = {"features": [], "rows": rows, "num_rows_total": 400, "num_rows_per_page": 100}
    path = write(tmp_path / "page.json", page)
    assert ids(path) == ["a", "b"]
    (notice,) = load_tasks(path).notices
    assert notice == f"{path} has 2 of the data set's 400 rows; ask for the others with offset= and length="
    for total in (2, None, "400"):
        assert load_tasks(write(path, page | {"num_rows_total": total})).notices == ()


def test_rows_that_the_server_cut_off_are_failures(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"row": row} for row in named("a", "b", "c")]
    rows[1]["truncated_cells"] = ["train", "te\x1bst"]
    loaded = load_tasks(write(tmp_path / "page.json", {"rows": rows}))
    assert [task.task_id for task in loaded.tasks] == ["a", "c"]
    (failure,) = loaded.failures
    assert (failure.task_id, failure.reason) == ("b", r"the server cut off its train, te\x1bst")


def test_of_re_arc_only_four_pairs_of_a_task_are_used_and_it_is_said(tmp_path: Path):
    (tmp_path / "tasks").mkdir()
    pairs = [{"input": [[i % 10]], "output": [[i % 9]]} for i in range(50)]
    for name in ("007bbfb7", "00d62c1b"):
        write(tmp_path / "tasks" / f"{name}.json", pairs)
    write(tmp_path / "metadata.json", {"007bbfb7": {"n_generated": 50}, "00d62c1b": {"n_generated": 50}})
    loaded = load_tasks(tmp_path)
    assert [(len(task.train), task.test[0].input) for task in loaded.tasks] == [(3, ((3,),))] * 2
    assert loaded.outline == (("007bbfb7", 1), ("00d62c1b", 1))
    assert loaded.notices == (
        "skipped 1 file of the data set that is no task: metadata.json",
        "2 tasks are lists of pairs: of each, the first 3 show the rule, the next is the test, "
        "the rest is not used",
    )


def test_the_outline_names_every_task_with_its_number_of_tests(tmp_path: Path):
    bad = {"train": [], "test": [{"input": [[1]]}] * 3}
    path = write_dict(tmp_path, {"a": GOOD, "../up": GOOD, "bad": bad, "worse": {}, "b": GOOD})
    loaded = load_tasks(path)
    assert loaded.outline == (("a", 2), ("../up", 2), ("bad", 3), ("worse", 1), ("b", 2))
    assert [(f.task_id, f.n_tests) for f in loaded.failures] == [("../up", 2), ("bad", 3), ("worse", 1)]
    assert load_tasks(path, limit=2).outline == (("a", 2), ("../up", 2))
    assert load_tasks(path, limit=10**23) == loaded


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.json", {"a": [[[1]]], "b": [[[1]], [[2]]]}, "holds solutions, not tasks; name the file of the"),
        ("t.json", {"a": [{"attempt_1": [[1]], "attempt_2": [[1]]}]}, "holds answers, not tasks; name"),
        ("t.json", {"splits": {"a": 1}, "features": {}}, 'holds no tasks: no value in it has "train" and'),
        ("t.json", [GOOD], 'item 0 is not an object with a text "task_id", "id" or "name"'),
        ("t.json", named("a", "b", "a"), "has the task 'a' twice, on items 0 and 2"),
        ("t.json", {"rows": [{"row": GOOD}]}, 'row 0 is not an object with a text "task_id", "id" or "name"'),
        ("t.json", lines(*named("a", "b")), "if it has one task a line, name it *.jsonl"),
        ("t.zip", "PK\3\4rest", "is a zip archive, not JSON; unpack it"),
        ("t.parquet", "PAR1rest", "is a Parquet file, not JSON; write it as JSON Lines"),
        ("t.json.gz", "\x1f\x8brest", "cannot read"),
        ("t.json.gz", CUT_GZIP, "cannot read"),
        ("t.jsonl", '{"' + "x" * 10**6 + '": 1, "' + "x" * 10**6 + '": 2}', "twice in one object"),
    ],
)
def test_a_file_that_is_something_else_is_refused_with_what_to_do(
    tmp_path: Path, name: str, content: object, problem: str
):
    path = tmp_path / name
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode("latin-1"))
    with pytest.raises(ArcFormatError, match=re.escape(problem)) as refused:
        load_tasks(path)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 700


def test_a_directory_of_data_sets_is_refused_by_their_names(tmp_path: Path):
    write(tmp_path / "arc-agi_training_challenges.json", {"a": GOOD})
    write(tmp_path / "arc-agi_training_solutions.json", {"a": [[[1]], [[2]]]})
    write(tmp_path / "more.jsonl", ONE_LINE)
    with pytest.raises(ArcFormatError, match="has no tasks in it; what is there are no single") as refused:
        load_tasks(tmp_path)
    assert "arc-agi_training_challenges.json" in str(refused.value)
    assert "more.jsonl" in str(refused.value)


def test_only_regular_files_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "t.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for path in (tmp_path / "t.json", tmp_path / "zero.json", Path("/dev/zero")):
        with pytest.raises(ArcFormatError, match="it is not a regular file"):
            load_tasks(path)
    assert [failure.task_id for failure in load_tasks(tmp_path).failures] == ["t", "zero"]


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_files, "MAX_BYTES", 1000)
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(b" " * 100_000))
    write(tmp_path / "t.json", " " * 1001)
    for name in ("t.json.gz", "t.json"):
        with pytest.raises(ArcFormatError, match="it has more than"):
            load_tasks(tmp_path / name)


def test_file_names_that_cannot_be_printed_are_escaped(tmp_path: Path):
    write(tmp_path / "\x1b[31mred.json", "{")
    (tmp_path / "\udcff.json").write_text("{")
    loaded = load_tasks(tmp_path)
    assert len(loaded.failures) == 2
    assert all(failure.reason.isprintable() for failure in loaded.failures)
