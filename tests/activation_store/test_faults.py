"""A disk that fails at each single thing that is done to it: nothing is lost, the next start goes on."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from activation_fakes import SETTINGS, batch
from failing_disk import faults, places

from activation_store import (
    ActivationStore,
    ActivationWriter,
    StoreWriteError,
    repair_store,
    sequence_key,
    verify_store,
)

TASKS = ("a", "bb")


def work(directory: Path) -> None:
    """Makes what is missing, one commit a task."""
    with ActivationWriter(directory, SETTINGS, provenance={}) as writer:
        for task in TASKS:
            writer.submit(
                [one for one in batch(task) if sequence_key(SETTINGS, one.id) not in writer.committed]
            )


def digests(directory: Path) -> dict[str, str]:
    if not (directory / "manifest.json").exists():
        return {}
    store = ActivationStore(directory)
    return {record.key: store.sequence_digest(record) for record in store.sequences()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("whole")
    work(directory)
    return digests(directory)


def nothing(directory: Path) -> None:
    """A directory that is not there yet."""


def damaged(directory: Path) -> None:
    """Two shards are broken, a line is torn, and a crash has left a temporary file."""
    work(directory)
    host = directory / "host-00000"
    for number in (0, 1):
        path = host / f"shard-{number:06d}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with (host / "index.jsonl").open("ab") as index:
        index.write(b'{"key":"')
    (host / "shard-000007.safetensors.tmp").write_bytes(b"half")


def started(directory: Path) -> None:
    with ActivationWriter(directory, SETTINGS, provenance={}) as writer:
        writer.submit(batch("a"))


@pytest.mark.parametrize(
    ("before", "action"),
    [
        pytest.param(nothing, work, id="a new store", marks=pytest.mark.slow),
        pytest.param(started, work, id="a store that is continued", marks=pytest.mark.slow),
        pytest.param(damaged, work, id="a damaged store that is continued", marks=pytest.mark.slow),
        pytest.param(damaged, repair_store, id="a damaged store that is repaired"),
    ],
)
def test_whatever_fails_is_one_sentence_and_the_next_start_ends_with_the_same_bytes(
    tmp_path: Path, whole: dict[str, str], before: Callable[[Path], None], action: Callable[[Path], Any]
):
    before(tmp_path / "before")

    def fresh(name: str) -> Path:
        if (tmp_path / "before").exists():
            shutil.copytree(tmp_path / "before", tmp_path / name)
        return tmp_path / name

    counted = fresh("counted")
    kept = digests_of_sound(tmp_path / "before") if before is not nothing else {}
    count = places(lambda: action(counted))
    assert count > 5
    failed = 0
    for number, disk in enumerate(faults(count)):
        directory = fresh(f"run{number}")
        with disk.mounted():
            said = failure_of(action, directory)
        failed += said is not None
        assert said is None or re.fullmatch(r".+(No space left on device|Input/output error).*", said)
        assert digests_of_sound(directory).items() >= kept.items()
        action(directory)
        if action is not work:
            assert digests_of_sound(directory).items() >= kept.items()
            work(directory)
        assert digests(directory) == whole
        assert not list(directory.rglob("*.tmp"))
        shutil.rmtree(directory)
    assert failed > 1.5 * count
    assert list(verify_store(ActivationStore(counted))) == []


def failure_of(action: Callable[[Path], Any], directory: Path) -> str | None:
    try:
        action(directory)
    except StoreWriteError as error:
        return str(error)
    return None


def digests_of_sound(directory: Path) -> dict[str, str]:
    """Returns the digests of what was sound before: the sequences whose shard is as long as its lines say."""
    if not (directory / "manifest.json").exists():
        return {}
    store = ActivationStore(directory)
    return {
        record.key: store.sequence_digest(record)
        for record in store.sequences()
        if (directory / record.path).exists()
        and (directory / record.path).stat().st_size == record.shard_bytes
    }
