"""The exit code and the answers of a run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runner_cases import (
    Outcome,
    assert_refused,
    book,
    copy_small,
    puzzle,
    report,
    run_main,
    run_python,
    small_checkpoint,
    store_of,
    submission,
    write_tasks,
)
from spoil import (
    tensors,
)

from activation_store.checked_json import unseal
from arc_runner.report import FIGURES

DONE, TASKS_FAILED, RESUMABLE = 0, 1, 75


def test_sequences_with_values_that_are_not_finite_fail_and_are_listed(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model = copy_small(tmp_path / "model")
    tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * np.nan}))(model)
    for _ in range(2):  # the second time it is known from the store
        outcome = run_main(tmp_path, model_path=model)
        assert outcome.code == TASKS_FAILED
        assert "failed sequence   task test 0 identity sample 0: the log-probability is not" in outcome.out
    assert len(report(tmp_path)["sequences_failed"]) == 2


UNPRIVILEGED = """
import json, sys
from activation_store import ActivationStore, ShuffledBatches
from activation_store.__main__ import main as look_after
from file_modes import obey_file_modes
from runner_cases import run_main
flags = json.loads(sys.argv[1])
obey_file_modes()
outcome = run_main(**flags)
store = ActivationStore(flags["activations_dir"])
rows = sum(len(store.rows(one, 0)) for one in store.sequences())
batches = sum(1 for _ in ShuffledBatches(store, layer=0, batch_size=4))
print(json.dumps([outcome, rows, batches, look_after(["verify", flags["activations_dir"]])]))
"""


@pytest.mark.slow
def test_merge_answers_from_a_store_that_cannot_be_written(finished: Path, tmp_path: Path):
    store = tmp_path / "read-only"
    shutil.copytree(finished / "activations", store)
    (store / "outcomes.json").unlink()
    flags = {
        "folder": str(tmp_path),
        "model_path": str(small_checkpoint()),
        "dataset_path": str(finished / "tasks.json"),
        "activations_dir": str(store),
        "output_filepath": str(tmp_path / "submission.json"),
        "merge": True,
    }
    for path in (store, *store.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))
    *_, printed = run_python(UNPRIVILEGED, json.dumps(flags)).splitlines()
    answers = json.loads(submission(tmp_path))
    after = sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))
    outcome, rows, batches, verified = json.loads(printed)
    code, _, err = Outcome(*outcome)
    assert (code, err) == (
        DONE,
        "which sequences solve their puzzle is not noted in the store: cannot write outcomes.json in "
        f"{store}: Permission denied; what was committed before is safe\n",
    )
    assert answers == json.loads((finished / "submission.json").read_text())
    assert rows > 0
    assert batches > 0
    assert verified == 0
    assert after == before


# --- Kaggle's files -----------------------------------------------------------------------------------------


def challenge(*rows: list[int]) -> dict[str, Any]:
    """A task whose tests have no outputs."""
    return puzzle(1, 2) | {"test": [{"input": [row]} for row in rows]}


CHALLENGES = {
    "00576224": challenge([3, 2]),
    "12997ef3": challenge([1, 2], [4, 5]),
    "too-long": challenge([7, 8]) | {"train": puzzle(1)["train"] * 4000},
    "malformed": challenge([7, 8], [8, 9]) | {"train": []},
}
SOLUTIONS = {
    "00576224": [[[2, 3]]],
    "12997ef3": [[[2, 1]], [[5, 4]]],
    "too-long": [[[8, 7]]],
    "malformed": [[[8, 7]], [[9, 8]]],
}


def kaggle(folder: Path) -> dict[str, Any]:
    write_tasks(folder / "arc_challenges.json", **CHALLENGES)
    write_tasks(folder / "arc_solutions.json", **SOLUTIONS)
    return {"dataset_path": folder / "arc_challenges.json"}


def assert_taken_by_kaggle(folder: Path) -> None:
    """Reads the submission as the competition does: all ids, a list as long as the tests, two grids each."""
    answers = json.loads(submission(folder))
    assert list(answers) == list(CHALLENGES)
    for task_id, tests in answers.items():
        assert len(tests) == len(CHALLENGES[task_id]["test"])
        for test in tests:
            assert list(test) == ["attempt_1", "attempt_2"]
            for grid in test.values():
                assert 1 <= len(grid) <= 30
                assert {len(row) for row in grid} <= set(range(1, 31))
                assert len({len(row) for row in grid}) == 1
                assert all(type(cell) is int and 0 <= cell <= 9 for row in grid for cell in row)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kaggle")
    outcome = run_main(folder, **kaggle(folder))
    assert (outcome.code, outcome.err) == (TASKS_FAILED, "")
    assert f"right answers from {folder}/arc_solutions.json\n" in outcome.out
    return folder


def test_kaggles_challenges_and_solutions_are_answered_and_scored(answered: Path):
    assert_taken_by_kaggle(answered)
    figures = report(answered)
    assert [one["task_id"] for one in figures["tasks_failed"]] == ["too-long", "malformed"]
    assert (figures["tasks"], figures["sequences"]) == (4, 6)
    assert (figures["tasks_known"], figures["tests_known"]) == (3, 4)
    assert len(store_of(answered).outcomes()) == 6
    content, intact = unseal(figures)
    assert intact
    for name, digest in content["sha256"].items():
        assert hashlib.sha256((answered / name).read_bytes()).hexdigest() == digest
    grids = [one.grid for _, _, one in book(answered).predictions()]
    assert figures["grids_parsed"] == sum(grid is not None for grid in grids)


@pytest.mark.parametrize(
    "flags", [{"n_tasks": 1}, {"predictions_per_task": 1}, {"n_tasks": 1, "merge": True}]
)
def test_asking_for_less_of_the_same_store_shrinks_nothing(
    answered: Path, no_weights: None, flags: dict[str, Any]
):
    before, figures = submission(answered), report(answered)
    outcome = run_main(answered, **kaggle(answered), **flags)
    assert outcome.code == (DONE if "n_tasks" in flags else TASKS_FAILED)
    assert submission(answered) == before
    assert "kept from earlier runs of this store: " in outcome.out
    assert f"tokens/s (run of {figures['made_at'][:19]} UTC)" in outcome.out
    now = report(answered)
    assert {name: now[name] for name in FIGURES} == {name: figures[name] for name in FIGURES}
    for name in ("tasks", "sequences", "tasks_failed", "tests_solved", "tests_known", "grids_parsed"):
        assert now[name] == figures[name]
    assert not list(answered.glob("submission.1*"))


@pytest.mark.parametrize("merge", [None, True])
@pytest.mark.parametrize("damage", ["cut off", "a folder", "a list"])
def test_damaged_outcomes_are_made_again_by_a_run_and_by_a_merge(
    answered: Path, no_weights: None, merge: bool | None, damage: str
):
    path = answered / "activations" / "outcomes.json"
    before, content = store_of(answered).outcomes(), path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(content[:100] if damage == "cut off" else b"[1, 2]")
    outcome = run_main(answered, **kaggle(answered), merge=merge)
    assert outcome.code == TASKS_FAILED
    assert "outcomes.json was damaged; it is made anew" in outcome.err
    assert outcome.err.count("\n") == 1
    assert store_of(answered).outcomes() == before


def test_a_submission_of_something_else_is_set_aside(answered: Path, tmp_path: Path, no_weights: None):
    (tmp_path / "submission.json").write_text('{"precious": []}')
    outcome = run_main(tmp_path, **kaggle(answered), activations_dir=answered / "activations")
    assert f"what was in {tmp_path}/submission.json is now in submission.1.json and beside it" in outcome.out
    assert (tmp_path / "submission.1.json").read_text() == '{"precious": []}'
    assert submission(tmp_path) == submission(answered)


def test_solutions_of_another_data_set_are_refused_before_the_weights_are_read(
    tmp_path: Path, no_weights: None
):
    flags = kaggle(tmp_path)
    other = write_tasks(tmp_path / "other.json", other=[[[1]]])
    outcome = run_main(tmp_path, **flags, solutions_path=other)
    assert_refused(
        outcome, f"{other} has no solution of task 00576224 and 2 other tasks; it belongs to another"
    )
    solutions = {"dataset_path": tmp_path / "arc_solutions.json"}
    assert_refused(
        run_main(tmp_path, **solutions), "holds solutions, not tasks; name the file of the challenges"
    )
    assert_refused(run_main(tmp_path, **flags, solutions_path=""), "--solutions_path is empty")


# --- Data as it lies about ----------------------------------------------------------------------------------


def test_files_that_are_no_tasks_leave_the_exit_code_alone(answered: Path, tmp_path: Path, no_weights: None):
    data = tmp_path / "data"
    (data / "training").mkdir(parents=True)
    for task_id in ("00576224", "12997ef3"):
        (data / "training" / f"{task_id}.json").write_text(json.dumps(CHALLENGES[task_id]))
    (data / "training" / "._00576224.json").write_bytes(b"\0\5\x16\7")
    (data / "dataset_info.json").write_text('{"splits": {}}')
    (data / ".DS_Store").touch()
    outcome = run_main(tmp_path, dataset_path=data, activations_dir=answered / "activations")
    assert (outcome.code, outcome.err) == (DONE, "")
    names = "dataset_info.json, training/._00576224.json"
    assert outcome.out.count(f"skipped 2 files of the data set that are no tasks: {names}\n") == 1
    assert list(json.loads(submission(tmp_path))) == ["00576224", "12997ef3"]


def test_hostile_ids_are_escaped_for_a_person_and_whole_in_the_submission(
    answered: Path, tmp_path: Path, no_weights: None
):
    ids = ["\ud800", "\x1b[2J", "a\nb", "../../etc", "x" * 100_000, "\u202e"]
    tasks = {"00576224": CHALLENGES["00576224"]} | {task_id: puzzle(1, 2) for task_id in ids}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    outcome = run_main(tmp_path, activations_dir=answered / "activations")
    assert (outcome.code, outcome.err) == (TASKS_FAILED, "")
    assert all(line.isprintable() and len(line) < 3000 for line in outcome.out.split("\n"))
    assert list(json.loads(submission(tmp_path))) == ["00576224", *ids]
    assert [one["task_id"] for one in report(tmp_path)["tasks_failed"]] == ids
