"""ARC tasks: what loads, what fails a task, what refuses a data set; prompts, answers, scores, submission."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from arc_puzzles import tasks as arc_tasks
from arc_puzzles.tasks import (
    PROMPT_VERSIONS,
    ArcFormatError,
    ArcTask,
    Augmentation,
    Pair,
    Score,
    TaskFailure,
    augmentations,
    build_messages,
    build_submission,
    create_grid_encoder,
    encode_prompt,
    load_tasks,
    parse_answer,
    score,
    write_json_atomic,
)
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS

ROOT = Path(__file__).parents[2]
TINY_MODEL = EXAMPLE_MODEL
PUBLIC_TASKS = Path(os.environ.get("ARC_TASKS", ROOT.parent / "shared" / "arc-agi" / "training.json"))

ENCODER_NAMES = [
    "MinimalGridEncoder()",
    "GridWithSeparationEncoder('|')",
    "RowNumberEncoder(MinimalGridEncoder())",
    "GridCodeBlockEncoder(MinimalGridEncoder())",
    "GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))",
]
SHAPE = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
MINIMAL = create_grid_encoder("MinimalGridEncoder()")
NUMBERED = create_grid_encoder("RowNumberEncoder(MinimalGridEncoder())")

GOOD: dict[str, Any] = {
    "train": [{"input": [[1, 2]], "output": [[2, 1]]}],
    "test": [{"input": [[3, 4]], "output": [[4, 3]]}, {"input": [[5]]}],
}
GOOD_TASK = ArcTask(
    "good",
    train=(Pair(((1, 2),), ((2, 1),)),),
    test=(Pair(((3, 4),), ((4, 3),)), Pair(((5,),), None)),
)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


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
def test_the_three_forms_give_the_same_tasks(tmp_path: Path, form):
    loaded = load_tasks(form(tmp_path, {"good": GOOD}))
    assert loaded.tasks == (GOOD_TASK,)
    assert loaded.failures == ()


@pytest.mark.parametrize(
    ("form", "order"),
    [(write_dict, ["b", "a", "c"]), (write_directory, ["a", "b", "c"]), (write_jsonl, ["b", "a", "c"])],
)
def test_the_order_is_the_files_or_for_a_directory_the_names(tmp_path: Path, form, order: list[str]):
    loaded = load_tasks(str(form(tmp_path, {"b": GOOD, "a": GOOD, "c": GOOD})))
    assert [task.task_id for task in loaded.tasks] == order


def test_a_directorys_other_files_and_a_jsonl_files_empty_lines_are_no_tasks(tmp_path: Path):
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
def test_bad_content_fails_its_task_and_the_others_load(tmp_path: Path, form, task: object, reason: str):
    loaded = load_tasks(form(tmp_path, {"a": GOOD, "bad": task, "c": GOOD}))
    assert [task.task_id for task in loaded.tasks] == ["a", "c"]
    assert loaded.failures == (TaskFailure("bad", reason),)


def test_a_task_that_is_no_object_fails_alone(tmp_path: Path):
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
def test_a_data_set_that_cannot_be_trusted_is_refused(tmp_path: Path, name: str, text: str, problem: str):
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


# --- Prompts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def example_tasks() -> tuple[ArcTask, ...]:
    return load_tasks(EXAMPLE_TASKS).tasks


def without_test_outputs(task: ArcTask) -> ArcTask:
    return ArcTask(task.task_id, task.train, tuple(Pair(pair.input, None) for pair in task.test))


def check_prompts(task: ArcTask, encoder, prompt_version: str) -> None:
    """Every grid that belongs in the prompt is there, in order, and test outputs have no influence on it."""
    for test_index, test in enumerate(task.test):
        messages = build_messages(task, test_index, encoder, prompt_version)
        assert [message["role"] for message in messages] == ["system", "user"]
        text = messages[-1]["content"]
        position = 0
        for number, pair in enumerate(task.train, start=1):
            assert pair.output is not None
            example = (
                f"### Example {number}\n\nInput:\n{encoder.encode(pair.input)}\n\n"
                f"Output:\n{encoder.encode(pair.output)}\n\n"
            )
            assert example in text[position:]
            position = text.index(example, position) + len(example)
        assert text[position:] == f"### Test\n\nInput:\n{encoder.encode(test.input)}"
        assert messages == build_messages(without_test_outputs(task), test_index, encoder, prompt_version)


@pytest.mark.parametrize("prompt_version", PROMPT_VERSIONS)
@pytest.mark.parametrize("encoder_name", ENCODER_NAMES)
def test_the_whole_puzzle_is_in_the_prompt_and_the_answer_is_not(example_tasks, encoder_name, prompt_version):
    for task in example_tasks:
        check_prompts(task, create_grid_encoder(encoder_name), prompt_version)


def test_the_largest_puzzle_is_not_cut(tokenizer):
    grid = tuple(tuple((row * 7 + column) % 10 for column in range(30)) for row in range(30))
    task = ArcTask("large", tuple(Pair(grid, grid) for _ in range(10)), (Pair(grid[::-1], None),))
    check_prompts(task, SHAPE, "output-from-examples-v0")
    messages = build_messages(task, 0, SHAPE, "output-from-examples-v0")
    prompt = encode_prompt(tokenizer, messages)
    assert len(prompt) > 21 * 900
    assert messages[1]["content"] in tokenizer.decode(prompt)


def test_the_prompt_tokens_are_the_chat_and_the_opening_of_the_answer(example_tasks, tokenizer):
    task = example_tasks[0]
    messages = build_messages(task, 0, SHAPE, "output-from-examples-v0")
    prompt = encode_prompt(tokenizer, messages)
    assert prompt.dtype == np.int32
    assert prompt.shape == (len(prompt),)
    assert tokenizer.decode(prompt) == (
        f"<|im_start|>system\n{messages[0]['content']}<|im_end|>\n"
        f"<|im_start|>user\n{messages[1]['content']}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_prompt_versions_differ(example_tasks):
    prompts = {json.dumps(build_messages(example_tasks[0], 0, SHAPE, version)) for version in PROMPT_VERSIONS}
    assert len(prompts) == len(PROMPT_VERSIONS) == 2


def test_an_unknown_prompt_version_or_test_is_refused():
    with pytest.raises(ValueError, match=r"unknown prompt version 'v9'; known are output-from-examples-v0, "):
        build_messages(GOOD_TASK, 0, SHAPE, "v9")
    with pytest.raises(ValueError, match="task good has 2 tests, there is no test 2"):
        build_messages(GOOD_TASK, 2, SHAPE, "output-from-examples-v0")
    with pytest.raises(ValueError, match="there is no test -1"):
        build_messages(GOOD_TASK, -1, SHAPE, "output-from-examples-v0")


def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY_MODEL / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    write(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(ValueError, match=f"the tokenizer '{tmp_path}' has no chat template"):
        encode_prompt(AutoTokenizer.from_pretrained(tmp_path), [{"role": "user", "content": "1"}])


# --- Augmented tasks ----------------------------------------------------------------------------------------


def test_every_grid_of_a_task_is_augmented_and_the_answer_comes_back():
    augmentation = Augmentation.parse("rot90/c0213456789")
    augmented = GOOD_TASK.augmented(augmentation)
    assert augmented == ArcTask(
        "good",
        train=(Pair(((2,), (1,)), ((1,), (2,))),),
        test=(Pair(((3,), (4,)), ((4,), (3,))), Pair(((5,),), None)),
    )
    for augmentation in augmentations(20, seed=1):
        assert GOOD_TASK.augmented(augmentation).augmented(augmentation.inverse()) == GOOD_TASK


# --- Answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "text", "grid"),
    [
        (MINIMAL, "12\n34", ((1, 2), (3, 4))),
        (MINIMAL, "\n 12\n34\n\n", ((1, 2), (3, 4))),
        (MINIMAL, "The rule is simple.\n\n12\n34\n\nThat was it.", ((1, 2), (3, 4))),
        (MINIMAL, "1\n\n2\n\nor rather\n\n34", ((3, 4),)),
        (MINIMAL, "123\n12\n34", None),  # ragged, and not cut to the two rows that fit
        (MINIMAL, "\n".join(["1"] * 31), None),
        (MINIMAL, "1" * 31, None),
        (MINIMAL, "the answer is 3", None),
        (MINIMAL, "", None),
        (NUMBERED, "Here:\n1 12\n2 34\n", ((1, 2), (3, 4))),
        (NUMBERED, "2 12\n3 34", None),
        (SHAPE, "```grid shape: 2x2\n1 12\n2 34\n```", ((1, 2), (3, 4))),
        (SHAPE, "I see.\n```grid shape: 1x1\n1 7\n```\nNo:\n```grid shape: 1x2\n1 89\n```\nDone.", ((8, 9),)),
        (SHAPE, "```grid shape: 1x1\n1 7\n```\n```grid shape: 1x2\n1 8", ((7,),)),  # ran out of tokens
        (SHAPE, "```grid shape: 1x2\n1\n```grid shape: 1x1\n1 7\n```", ((7,),)),
        (SHAPE, "```grid shape: 1x2\n1 89\n```\n```python\nprint()\n```", ((8, 9),)),
        (SHAPE, "```grid shape: 2x2\n1 89\n```", None),  # announced with another shape
        (SHAPE, "```grid shape: 2x2\n1 12\n2 34", None),  # never closed
        (SHAPE, "1 12\n2 34", None),
    ],
)
def test_answers_by_example(encoder, text: str, grid):
    assert parse_answer(text, encoder) == grid


@settings(derandomize=True, deadline=None, max_examples=300, database=None)
@given(st.sampled_from(ENCODER_NAMES), st.text("0123 |x:gridshape\n`", max_size=60) | st.text(max_size=30))
def test_parsing_never_raises_and_gives_only_what_the_text_says(name: str, text: str):
    encoder = create_grid_encoder(name)
    grid = parse_answer(text, encoder)
    assert grid is None or encoder.encode(grid) in text


# --- Scores and submissions ---------------------------------------------------------------------------------

RIGHT, WRONG = ((4, 3),), ((3, 4),)


def test_the_submission_by_example():
    submission = build_submission([GOOD_TASK], {("good", 0): [RIGHT, None], ("good", 1): [WRONG]})
    assert submission == {
        "good": [{"attempt_1": [[4, 3]], "attempt_2": []}, {"attempt_1": [[3, 4]]}],
    }


def test_a_test_without_attempts_is_in_the_submission_and_stray_attempts_are_refused():
    assert build_submission([GOOD_TASK], {}) == {"good": [{}, {}]}
    with pytest.raises(ValueError, match="attempts at test 2 of 'good', which is not in the tasks"):
        build_submission([GOOD_TASK], {("good", 2): [RIGHT]})


def solvable(task_id: str) -> ArcTask:
    return ArcTask(task_id, GOOD_TASK.train, (Pair(((1,),), ((1,),)), Pair(((2,),), ((2,),))))


@pytest.mark.parametrize(
    ("attempts", "tests_solved", "tasks_solved"),
    [
        ({("s", 0): [((1,),)], ("s", 1): [((2,),)]}, 2, 1),
        ({("s", 0): [None, ((9,),), ((1,),)], ("s", 1): [((2,),)]}, 2, 1),  # any attempt counts
        ({("s", 0): [((1,),)], ("s", 1): [((1,),)]}, 1, 0),  # all tests have to be solved
        ({("s", 0): [((1, 1),)], ("s", 1): [None]}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_a_test_needs_one_right_attempt_and_a_task_all_its_tests(attempts, tests_solved, tasks_solved):
    task = solvable("s")
    assert score([task], build_submission([task], attempts)) == Score(
        tasks_solved=tasks_solved,
        tasks_known=1,
        tasks_unknown=0,
        tests_solved=tests_solved,
        tests_known=2,
        tests_unknown=0,
    )


def test_unknown_outputs_are_counted_apart():
    tasks = [GOOD_TASK, without_test_outputs(solvable("u"))]
    submission = build_submission(tasks, {("good", 0): [RIGHT], ("good", 1): [((5,),)], ("u", 0): [None]})
    assert score(tasks, submission) == Score(
        tasks_solved=0, tasks_known=0, tasks_unknown=2, tests_solved=1, tests_known=1, tests_unknown=3
    )


def test_what_a_submission_lacks_is_not_solved():
    task = solvable("s")
    assert score([task], {}).tests_solved == 0
    assert score([task], {"s": [{"attempt_1": [[1]]}]}).tests_solved == 1


# --- Writing ------------------------------------------------------------------------------------------------


def test_json_is_written_with_the_umasks_mode_and_replaces_what_was_there(tmp_path: Path):
    path = tmp_path / "submission.json"
    write_json_atomic(path, {"b": [], "a": [[1, 2]]})
    assert path.read_text() == '{"b": [], "a": [[1, 2]]}\n'
    write_json_atomic(str(path), {})
    assert path.read_text() == "{}\n"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert {file.name for file in tmp_path.iterdir()} == {"submission.json", "plain"}


def test_the_umask_is_honoured(tmp_path: Path):
    old = os.umask(0o027)
    try:
        write_json_atomic(tmp_path / "x.json", 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    path = tmp_path / "x.json"
    write_json_atomic(path, "old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arc_tasks.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_json_atomic(path, "new")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, float("nan"))
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == '"old"\n'


# --- The public training set --------------------------------------------------------------------------------


@pytest.mark.skipif(not PUBLIC_TASKS.is_file(), reason="ARC_TASKS does not name the public training set")
def test_all_400_public_tasks_load_and_their_prompts_are_whole():
    loaded = load_tasks(PUBLIC_TASKS)
    assert len(loaded.tasks) == 400
    assert loaded.failures == ()
    attempts = {}
    for task in loaded.tasks:
        check_prompts(task, SHAPE, "output-from-examples-v0")
        for i, pair in enumerate(task.test):
            assert pair.output is not None
            attempts[task.task_id, i] = [parse_answer(f"Sure!\n{SHAPE.encode(pair.output)}", SHAPE)]
    result = score(loaded.tasks, build_submission(loaded.tasks, attempts))
    assert (result.tasks_solved, result.tests_solved) == (400, len(attempts))
    assert len(attempts) == 416
