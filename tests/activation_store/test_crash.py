"""Real processes, really killed; a real limit on file sizes; a directory that is really read-only."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from activation_crash_writer import SETTINGS, TASKS
from activation_fakes import batch

from activation_store import ActivationStore, ActivationWriter, StoreError, sequence_key, verify_store

pytestmark = pytest.mark.slow

KILLS = 15
TESTS = Path(__file__).parents[1] / "support"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parents[1]), str(TESTS)])}


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TESTS / "activation_crash_writer.py"), str(directory), *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(directory: Path, *arguments: str) -> tuple[int, str]:
    process = start(directory, *arguments)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors


def digests(directory: Path) -> dict[str, str]:
    store = ActivationStore(directory)
    return {record.key: store.sequence_digest(record) for record in store.sequences()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """The digests of an uninterrupted run, and the seconds it takes once it is open."""
    directory = tmp_path_factory.mktemp("whole")
    process = start(directory)
    assert process.stdout is not None
    process.stdout.readline()
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 0
    return digests(directory), time.monotonic() - began


def test_killed_again_and_again_a_run_ends_with_the_same_bytes(
    tmp_path: Path, whole: tuple[dict[str, str], float]
):
    expected, seconds = whole
    assert len(expected) == 2 * len(TASKS)
    rng = random.Random(0)
    interrupted, progress = 0, []
    for _ in range(KILLS):
        process = start(tmp_path)
        assert process.stdout is not None
        process.stdout.readline()  # it is open: what comes now is committing
        time.sleep(rng.uniform(0, 3 * seconds / KILLS))
        process.kill()
        process.communicate(timeout=60)
        interrupted += process.returncode == -9
        progress.append(len(ActivationStore(tmp_path)))
    assert interrupted >= KILLS // 2  # most were killed before they were done
    assert progress == sorted(progress)  # nothing committed is ever lost
    assert finish(tmp_path) == (0, "")
    assert digests(tmp_path) == expected
    assert len(list(ActivationStore(tmp_path).sequences())) == len(expected)
    assert list(verify_store(ActivationStore(tmp_path))) == []


def test_a_disk_that_is_full_at_the_first_shard_ends_the_run_in_one_sentence(
    tmp_path: Path, whole: tuple[dict[str, str], float]
):
    code, errors = finish(tmp_path, "4000")
    assert code == 3
    assert "shard-000000.safetensors" in errors
    assert "File too large; what was committed before is safe" in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.rglob("*.tmp"))
    assert finish(tmp_path) == (0, "")
    assert digests(tmp_path) == whole[0]


def test_a_disk_that_is_full_within_an_index_line_loses_no_earlier_batch(
    tmp_path: Path, whole: tuple[dict[str, str], float]
):
    code, errors = finish(tmp_path, "20000")
    assert (code, "index.jsonl" in errors, errors.count("\n")) == (3, True, 1)
    index = tmp_path / "host-00000" / "index.jsonl"
    assert index.stat().st_size == 20000
    assert not index.read_bytes().endswith(b"\n")
    assert 0 < len(ActivationStore(tmp_path)) < len(whole[0])
    assert finish(tmp_path) == (0, "")
    assert digests(tmp_path) == whole[0]
    assert list(verify_store(ActivationStore(tmp_path))) == []


def test_a_read_only_directory_is_found_before_any_work(tmp_path: Path):
    program = (
        "import os\n"
        "from activation_fakes import SETTINGS\n"
        "from activation_store import ActivationWriter, StoreError\n"
        "from file_modes import obey_file_modes\n"
        "obey_file_modes()\n"
        "try: ActivationWriter(os.environ['STORE'], SETTINGS, provenance={})\n"
        "except StoreError as error: print(error)\n"
    )
    tmp_path.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=ENVIRONMENT | {"STORE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"cannot write to {tmp_path}/host-00000: Permission denied\n"


def test_a_directory_that_turns_read_only_keeps_what_it_has(tmp_path: Path):
    """A file in the place of the host folder stops every writer, root or not."""
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit(batch("task0", of=SETTINGS))
    (tmp_path / "host-00000").rename(tmp_path / "host-00001")
    (tmp_path / "host-00000").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write to"):
        ActivationWriter(tmp_path, SETTINGS, provenance={})
    with ActivationWriter(tmp_path, SETTINGS, host_index=2, provenance={}) as writer:
        assert sequence_key(SETTINGS, batch("task0", of=SETTINGS)[0].id) in writer.committed
