"""Places, layers and devices that a run cannot have are refused before the weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from runner_cases import (
    LAYERS,
    Outcome,
    assert_refused,
    copy_small,
    puzzle,
    run_main,
    run_python,
    write_tasks,
)

from arc_runner import preflight
from arc_runner.options import RunOptions

DONE, TASKS_FAILED, RESUMABLE = 0, 1, 75


# --- What to read -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
def test_a_data_set_that_is_misspelt_brings_the_one_that_is_there(tmp_path: Path):
    (tmp_path / "data").mkdir()
    write_tasks(tmp_path / "data" / "training.json", task=puzzle(1, 2))
    for name in ("data/trainin.json", "date/training.json", "Data/Training.jsonl"):
        outcome = run_main(tmp_path, dataset_path=tmp_path / name)
        assert_refused(outcome, f"did you mean {tmp_path}/data/training.json?")
        assert f"cannot read {tmp_path / name}: No such file or directory" in outcome.err
    merged = {"dataset_path": tmp_path / "data" / "training.json", "merge": True}
    assert_refused(run_main(tmp_path, activations_dir=tmp_path / "dat", **merged), f"mean {tmp_path}/data?")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse


def a_full_folder(path: Path) -> None:
    path.mkdir()
    for number in range(4):
        (path / f"{number}.txt").touch()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (a_pipe, "is a device or pipe"),
        (a_link_to_zeros, "is a device or pipe"),
        (a_link_to_itself, "Too many levels of symbolic links"),
        (a_huge_file, "has 1099511627776 bytes, more than 1073741824"),
        (a_full_folder, "has more than 3 files; is it of tasks?"),
    ],
)
def test_what_cannot_be_read_to_its_end_is_no_data_set(
    make: Callable[[Path], None], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preflight, "_MOST_FILES", 3)
    make(tmp_path / "tasks.json")
    assert_refused(run_main(tmp_path), f"--dataset_path: {'cannot read ' if 'levels' in sentence else ''}")
    assert sentence in run_main(tmp_path).err


# --- Places to write ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("output_filepath", "--output_filepath: cannot write in {folder}/file/sub: Not a directory"),
        ("activations_dir", "--activations_dir: {folder}/file is a file; name a directory"),
    ],
)
def test_a_place_below_a_regular_file_is_refused(flag: str, sentence: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    (tmp_path / "file").touch()
    outcome = run_main(tmp_path, **{flag: tmp_path / "file" / "sub" / "x"})
    assert_refused(outcome, sentence.format(folder=tmp_path))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "name",
    ["submission.json", "submission.predictions.json", "submission.report.json", "submission.metrics.jsonl"],
)
def test_an_answer_file_that_is_a_directory_is_refused(name: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    (tmp_path / name).mkdir()
    assert_refused(run_main(tmp_path), f"{tmp_path / name} is a directory; name a file to write")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["tasks.json", "submission.predictions.json", "submission.report.json"])
def test_a_data_set_is_never_written_over(name: str, tmp_path: Path):
    data = write_tasks(tmp_path / name, task=puzzle(1, 2))
    before = data.read_bytes()
    output = data if name == "tasks.json" else tmp_path / "submission.json"
    (tmp_path / "link").symlink_to(data)
    for dataset in (data, tmp_path / "link"):
        outcome = run_main(tmp_path, dataset_path=dataset, output_filepath=output)
        assert_refused(outcome, f"--output_filepath: {data} is the data set; name another file")
    assert data.read_bytes() == before


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("output_filepath", "tasks/submission.json"),
        ("output_filepath", "tasks/deep/down/submission.json"),
        ("activations_dir", "tasks"),
    ],
)
def test_nothing_is_written_into_a_directory_of_tasks(flag: str, name: str, tmp_path: Path):
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks" / "one.json", **puzzle(1, 2))
    outcome = run_main(tmp_path, dataset_path=tmp_path / "tasks", **{flag: tmp_path / name})
    assert_refused(outcome, f"--{flag}: in {tmp_path}/tasks, the data set, every .json file is a task")
    assert [file.name for file in (tmp_path / "tasks").iterdir()] == ["one.json"]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("activations/manifest.json", "activations/manifest.json lies in the store {folder}/activations"),
        (
            "activations/host-00000/index.jsonl",
            "lies in the store {folder}/activations; name a place",
        ),
        ("activations/new/deep.json", "lies in the store {folder}/activations"),
        ("x/../activations/outcomes.json", "lies in the store {folder}/activations"),
        ("link/manifest.json", "lies in the store {folder}/activations"),
        ("linked.json", "{folder}/linked.json lies in the store {folder}/activations"),
        ("activations", "--output_filepath and --activations_dir are both {folder}/activations"),
        ("model/config.json", "lies in the model's directory; name another directory"),
        ("model/sub/s.json", "lies in the model's directory"),
        ("s_solutions.json", "s_solutions.json is the file of the solutions; name another file"),
        ("hard.json", "hard.json is the data set; name another file"),
        ("pipe.json", "pipe.json is not a regular file; name another"),
        ("s_challenges.json", "s_challenges.json is the data set; name another file"),
    ],
)
def test_an_answer_is_never_written_over_the_store_or_an_input(output: str, sentence: str, tmp_path: Path):
    tasks = write_tasks(tmp_path / "s_challenges.json", task=puzzle(1, 2))
    write_tasks(tmp_path / "s_solutions.json", task=[[[2, 1]]])
    store = tmp_path / "activations"
    (store / "host-00000").mkdir(parents=True)
    (store / "manifest.json").write_text("{}")
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(store)
    (tmp_path / "linked.json").symlink_to(store / "manifest.json")
    (tmp_path / "hard.json").hardlink_to(tasks)
    os.mkfifo(tmp_path / "pipe.json")
    model = copy_small(tmp_path / "model")
    flags = {"dataset_path": tasks, "model_path": model, "output_filepath": tmp_path / output}
    before = sorted(path for path in tmp_path.rglob("*"))
    assert_refused(run_main(tmp_path, **flags), sentence.format(folder=tmp_path))
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (store / "manifest.json").read_text() == "{}"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["s.predictions.json", "s.report.json"])
def test_the_files_beside_the_submission_replace_no_input_either(name: str, tmp_path: Path):
    write_tasks(tmp_path / name, task=[[[2, 1]]])
    tasks = write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    flags = {"dataset_path": tasks, "solutions_path": tmp_path / name, "output_filepath": tmp_path / "s.json"}
    assert_refused(run_main(tmp_path, **flags), f"{tmp_path / name} is the file of the solutions")
    flags = {
        "dataset_path": tasks,
        "activations_dir": tmp_path / name,
        "output_filepath": tmp_path / "s.json",
    }
    assert_refused(run_main(tmp_path, **flags), f"{tmp_path / name} lies in the store")


UNPRIVILEGED = """
import json, sys
from file_modes import obey_file_modes
from runner_cases import run_main
obey_file_modes()
print(json.dumps([run_main(**flags) for flags in json.loads(sys.argv[1])]))
"""


def test_a_place_without_the_needed_permission_is_refused(tmp_path: Path):
    data = write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    model, unreadable = copy_small(tmp_path / "model"), copy_small(tmp_path / "unreadable")
    secret, locked = write_tasks(tmp_path / "secret.json"), tmp_path / "locked"
    for path in (unreadable / "model.safetensors", secret):
        path.chmod(0)
    locked.mkdir(mode=0o555)
    cases = [
        ({"activations_dir": "/proc/x"}, "cannot write to /proc/x/host-00000"),
        ({"output_filepath": locked / "s.json"}, f"cannot write in {locked}: Permission denied"),
        ({"activations_dir": locked}, f"cannot write to {locked}/host-00000: Permission denied"),
        ({"activations_dir": locked / "a", "dry_run": True}, "--activations_dir: cannot write in"),
        ({"dataset_path": secret}, f"cannot read {secret}: Permission denied"),
        ({"model_path": unreadable}, "model.safetensors cannot be read: Permission denied"),
    ]
    usual = {
        "folder": tmp_path,
        "dataset_path": data,
        "model_path": model,
        "output_filepath": tmp_path / "x.json",
    }
    calls = json.dumps([usual | flags for flags, _ in cases], default=str)
    outcomes = json.loads(run_python(UNPRIVILEGED, calls))
    for outcome, (_, sentence) in zip(outcomes, cases, strict=True):
        assert_refused(Outcome(*outcome), sentence)


# --- Options that only the model can refuse -----------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (
            None,
            "--layers_to_extract: by default the layers 10 to 23 are captured, and this model has 2, 0 to 1: "
            "name those that you want.",
        ),
        ([1, LAYERS], "--layers_to_extract: extract_layers [2] are out of range: the model has 2 layers"),
        ([-1], "--layers_to_extract must be at least 0, not -1"),
        ([1, 1], "must name at least one layer and none twice, not [1, 1]"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(
    layers: list[int] | None, sentence: str, tmp_path: Path
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    assert_refused(run_main(tmp_path, layers_to_extract=layers), sentence)


@pytest.mark.usefixtures("no_weights")
def test_answers_longer_than_the_models_context_are_refused(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    sentence = "--max_output_tokens 32768 leaves no room for a prompt: the model's context is 32768"
    assert_refused(run_main(tmp_path, max_output_tokens=32768), sentence)


# --- Devices ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'tpu'"), AssertionError()])
def test_a_platform_without_devices_is_refused(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))

    def local_devices() -> None:
        raise error

    monkeypatch.setattr(jax, "local_devices", local_devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert_refused(run_main(tmp_path), "jax finds no device for JAX_PLATFORMS='tpu'")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about CPUs")
def test_layers_are_scanned_unless_the_old_loop_runs_them():
    """It would compile the scan anew for each token."""
    assert preflight.load_config(RunOptions()).scan_layers
    assert not preflight.load_config(RunOptions(generation="python")).scan_layers
