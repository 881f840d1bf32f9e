"""Where a run writes: places that it may not have, other runs' directories, its own input, full disks."""

from __future__ import annotations

import contextlib
import json
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from runner_cases import (
    Outcome,
    assert_refused,
    copy_small,
    digests,
    puzzle,
    run_main,
    run_python,
    write_tasks,
)

import distributed_kv_cached_inference

DONE, RESUMABLE = 0, 75


# --- Places to write ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("output_filepath", "--output_filepath: cannot write in {folder}/file/sub: Not a directory"),
        ("activations_dir", "--activations_dir: {folder}/file is a file; name a directory"),
    ],
)
def test_a_place_below_a_regular_file(flag: str, sentence: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    (tmp_path / "file").touch()
    outcome = run_main(tmp_path, **{flag: tmp_path / "file" / "sub" / "x"})
    assert_refused(outcome, sentence.format(folder=tmp_path))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["submission.json", "submission.report.json"])
def test_an_answer_file_that_is_a_directory(name: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    (tmp_path / name).mkdir()
    assert_refused(run_main(tmp_path), f"{tmp_path / name} is a directory; name a file to write")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["tasks.json", "submission.report.json"])
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
    ("flag", "name"), [("output_filepath", "tasks/submission.json"), ("activations_dir", "tasks")]
)
def test_a_directory_of_tasks_gets_no_files_that_would_be_tasks(flag: str, name: str, tmp_path: Path):
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks" / "one.json", **puzzle(1, 2))
    outcome = run_main(tmp_path, dataset_path=tmp_path / "tasks", **{flag: tmp_path / name})
    assert_refused(outcome, f"--{flag}: in {tmp_path}/tasks, the data set, every .json file is a task")
    assert [file.name for file in (tmp_path / "tasks").iterdir()] == ["one.json"]


# Each command line is run as nobody where root runs the tests. The first one is run as root: it gets as far
# as to open the store and so imports what lies in root's home.
AS_NOBODY = """
import json, os, sys
from runner_cases import run_main
first, *others = json.loads(sys.argv[1])
outcomes = [run_main(**first)]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
print(json.dumps(outcomes + [run_main(**flags) for flags in others]))
"""


def test_a_place_that_one_may_not_use():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        data = write_tasks(folder / "tasks.json", task=puzzle(1, 2))
        model, unreadable = copy_small(folder / "model"), copy_small(folder / "unreadable")
        secret, locked = write_tasks(folder / "secret.json"), folder / "locked"
        for path in (unreadable / "model.safetensors", secret):
            path.chmod(0)
        locked.mkdir(mode=0o555)
        cases = [
            ({"activations_dir": "/proc/x"}, "cannot write to /proc/x/host-00000"),
            ({"output_filepath": locked / "s.json"}, f"cannot write in {locked}: Permission denied"),
            ({"activations_dir": locked}, f"cannot write to {locked}/host-00000: Permission denied"),
            ({"dataset_path": secret}, f"cannot read {secret}: Permission denied"),
            ({"model_path": unreadable}, "model.safetensors cannot be read: Permission denied"),
        ]
        usual = {
            "folder": folder,
            "dataset_path": data,
            "model_path": model,
            "output_filepath": "/tmp/x.json",
        }
        calls = json.dumps([usual | flags for flags, _ in cases], default=str)
        printed = run_python(AS_NOBODY, calls)
    for outcome, (_, sentence) in zip(json.loads(printed), cases, strict=True):
        assert_refused(Outcome(*outcome), sentence)


@contextlib.contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_the_run_and_the_same_command_continues(tmp_path: Path):
    write_tasks(tmp_path / "tasks.json", **{f"task-{i}": puzzle(i, i) for i in range(3)})
    with files_up_to(8_192):  # a shard has 14 KB
        outcome = run_main(tmp_path)
    assert outcome.code == RESUMABLE
    assert outcome.err.startswith("error: cannot write host-00000/shard-000000.safetensors in ")
    assert outcome.err.endswith("; the same command continues\n")
    assert outcome.err.count("\n") == 1
    assert run_main(tmp_path).code == DONE
    assert len(digests(tmp_path)) == 6


# --- Directories in use or of another run -------------------------------------------------------------------


def test_a_directory_made_under_other_settings_is_refused_and_untouched(
    tmp_path: Path, request: pytest.FixtureRequest
):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    assert run_main(tmp_path).code == DONE
    request.getfixturevalue("no_weights")
    before = digests(tmp_path), (tmp_path / "submission.json").read_bytes()
    for flag, value, difference in [
        ("max_output_tokens", 9, "max_output_tokens is 8 there and 9 here"),
        ("random_seed", 1, "seed is 0 there and 1 here"),
        ("layers_to_extract", [0], "hook_names is"),
        ("prompt_version", "output-from-examples-v1", "output-from-examples-v1"),
        ("dtype", "bfloat16", 'dtype is "float32" there and "bfloat16" here'),
    ]:
        outcome = run_main(tmp_path, **{flag: value})
        assert_refused(outcome, difference)
        assert "choose another directory or the same settings" in outcome.err
    assert (digests(tmp_path), (tmp_path / "submission.json").read_bytes()) == before


@pytest.mark.usefixtures("no_weights")
def test_a_directory_that_another_run_writes_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tasks(tmp_path / "tasks.json", task=puzzle(1, 2))
    second: list[Outcome] = []

    def make_calls(*_: object) -> None:  # in the middle of the first run
        second.append(run_main(tmp_path, output_filepath=tmp_path / "second.json"))

    monkeypatch.setattr(distributed_kv_cached_inference, "_generate", make_calls)
    run_main(tmp_path)
    assert_refused(second[0], "is in use: another run writes to this directory")
