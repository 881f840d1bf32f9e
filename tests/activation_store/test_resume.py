"""Continuing a store: what was committed is skipped, what is damaged is dropped and made again."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from activation_fakes import SETTINGS, batch, read_index, write_index

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    StoreError,
    repair_store,
    sequence_key,
    verify_store,
)

TASKS = ("a", "bb", "ccc")


def work(directory: Path, host: int = 0) -> ActivationWriter:
    """What a runner does: everything that is not committed, one task a batch."""
    with ActivationWriter(directory, SETTINGS, host_index=host, provenance={}) as writer:
        for task in TASKS:
            todo = [one for one in batch(task) if sequence_key(SETTINGS, one.id) not in writer.committed]
            writer.submit(todo)
    return writer


def digests(directory: Path) -> dict[str, str]:
    store = ActivationStore(directory)
    return {record.key: store.sequence_digest(record) for record in store.sequences()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, str]:
    """The digests of an uninterrupted run."""
    work(tmp_path / "whole")
    return digests(tmp_path / "whole")


def shard(directory: Path, number: int) -> Path:
    return directory / "host-00000" / f"shard-{number:06d}.safetensors"


def index(directory: Path) -> Path:
    return directory / "host-00000" / "index.jsonl"


def truncate(directory: Path) -> None:
    path = shard(directory, 1)
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(directory: Path) -> None:
    path = shard(directory, 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(directory: Path) -> None:
    shard(directory, 1).unlink()


def lengthen(directory: Path) -> None:
    with shard(directory, 1).open("ab") as file:
        file.write(b"\0")


def tear_the_last_line(directory: Path) -> None:
    text = index(directory).read_bytes()
    index(directory).write_bytes(text[: -len(text.splitlines(keepends=True)[-1]) // 2])


def tear_a_line_in_the_middle(directory: Path) -> None:
    lines = index(directory).read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][: len(lines[2]) // 2] + b"\n"
    index(directory).write_bytes(b"".join(lines))


def fill_a_line_with_zeros(directory: Path) -> None:
    lines = index(directory).read_bytes().splitlines(keepends=True)
    lines[3] = bytes(len(lines[3]) - 1) + b"\n"
    index(directory).write_bytes(b"".join(lines))


def stop_between_the_lines_of_a_batch(directory: Path) -> None:
    write_index(directory, read_index(directory)[:-1])


def stop_before_the_index_line(directory: Path) -> None:
    write_index(directory, read_index(directory)[:-2])


def stop_before_the_rename(directory: Path) -> None:
    stop_before_the_index_line(directory)
    path = shard(directory, 2)
    path.with_name(path.name + ".tmp").write_bytes(path.read_bytes()[:100])
    path.unlink()


def change_a_number(directory: Path) -> None:
    """So that the line is still an index line, but for its checksum."""
    text = index(directory).read_bytes()
    assert text.count(b'"row_start":0,') == 3
    index(directory).write_bytes(text.replace(b'"row_start":0,', b'"row_start":1,', 1))


@pytest.mark.parametrize(
    ("damage", "sequences"),
    [
        (truncate, 2),
        (flip_a_bit, 2),
        (remove, 2),
        (lengthen, 2),
        (tear_the_last_line, 1),
        (tear_a_line_in_the_middle, 1),
        (fill_a_line_with_zeros, 1),
        (change_a_number, 1),
        (stop_between_the_lines_of_a_batch, 1),
        (stop_before_the_index_line, 2),
        (stop_before_the_rename, 2),
    ],
)
def test_what_is_damaged_is_made_again_and_nothing_else(
    tmp_path: Path, whole: dict[str, str], damage: Callable[[Path], None], sequences: int
):
    work(tmp_path / "run")
    damage(tmp_path / "run")
    again = work(tmp_path / "run")
    assert again.sequences_written == sequences
    assert digests(tmp_path / "run") == whole
    assert list(verify_store(ActivationStore(tmp_path / "run"))) == []
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert work(tmp_path / "run").sequences_written == 0


def test_the_writer_names_what_it_dropped(tmp_path: Path):
    work(tmp_path)
    truncate(tmp_path)
    size = shard(tmp_path, 1).stat().st_size
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        assert writer.dropped == [
            f"host-00000/shard-000001.safetensors: the shard has {size} bytes, {size + 1} were written"
        ]
    assert shard(tmp_path, 1).with_name("shard-000001.safetensors.damaged").exists()


def test_a_copied_store_is_continued_though_its_time_stamps_are_new(tmp_path: Path, whole: dict[str, str]):
    work(tmp_path)
    for number in range(3):
        os.utime(shard(tmp_path, number))
    assert work(tmp_path).sequences_written == 0
    assert digests(tmp_path) | whole == whole


def test_shards_of_a_lost_index_are_not_overwritten(tmp_path: Path):
    """Two left-over shards are no crash: their index lines were lost, and somebody may find them again."""
    work(tmp_path)
    before = {number: shard(tmp_path, number).read_bytes() for number in (1, 2)}
    write_index(tmp_path, read_index(tmp_path)[:2])
    work(tmp_path)
    assert {number: shard(tmp_path, number).read_bytes() for number in (1, 2)} == before
    assert shard(tmp_path, 3).exists()


def test_the_one_shard_a_crash_can_leave_is_overwritten(tmp_path: Path):
    work(tmp_path)
    stop_before_the_index_line(tmp_path)
    work(tmp_path)
    assert len(list((tmp_path / "host-00000").glob("*.safetensors"))) == 3


# --- Several hosts --------------------------------------------------------------------------------------


def test_any_number_of_hosts_skips_what_any_host_committed(tmp_path: Path):
    for host, task in enumerate(TASKS):
        with ActivationWriter(tmp_path, SETTINGS, host_index=host, provenance={}) as writer:
            writer.submit(batch(task))
    for host in (0, 5):
        assert work(tmp_path, host).sequences_written == 0
    assert len(ActivationStore(tmp_path)) == 6


def test_refresh_learns_what_other_hosts_committed_since(tmp_path: Path):
    with (
        ActivationWriter(tmp_path, SETTINGS, host_index=0, provenance={}) as first,
        ActivationWriter(tmp_path, SETTINGS, host_index=1, provenance={}) as second,
    ):
        second.submit(batch("a"))
        second.close()
        key = sequence_key(SETTINGS, batch("a")[0].id)
        assert key not in first.committed
        assert first.refresh() == 2
        assert first.committed[key].host == 1
        assert first.refresh() == 0


def test_what_another_host_has_made_meanwhile_is_left_out(tmp_path: Path, whole: dict[str, str]):
    """As when this host was thought dead, and its work was taken over."""
    with ActivationWriter(tmp_path, SETTINGS, host_index=0, provenance={}) as slow:
        work(tmp_path, host=1)
        for task in (*TASKS, "dddd"):
            slow.submit(batch(task))
    assert slow.sequences_written == 2
    assert digests(tmp_path).items() > whole.items()
    assert list(verify_store(ActivationStore(tmp_path))) == []


def test_a_store_that_is_away_is_not_an_empty_one(tmp_path: Path):
    store = tmp_path / "store"
    work(store)
    reader = ActivationStore(store)
    store.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        reader.index.refresh()
    (tmp_path / "away").rename(store)
    assert reader.index.refresh() == 0
    assert len(reader) == 6


def test_refresh_reads_only_what_was_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work(tmp_path, host=1)
    with ActivationWriter(tmp_path, SETTINGS, host_index=0, provenance={}) as writer:
        size = (tmp_path / "host-00001" / "index.jsonl").stat().st_size
        reads: list[int] = []
        files = writer.committed._files
        real = files.read
        monkeypatch.setattr(
            files, "read", lambda name, start=0, stop=None: (reads.append(start), real(name, start, stop))[1]
        )
        with ActivationWriter(tmp_path, SETTINGS, host_index=1, provenance={}) as other:
            other.submit(batch("dddd"))
        assert writer.refresh() == 2
        assert reads == [size]


def test_a_half_written_line_is_read_once_it_is_whole(tmp_path: Path):
    work(tmp_path)
    text = index(tmp_path).read_bytes()
    index(tmp_path).write_bytes(text[:-100])
    store = ActivationStore(tmp_path)
    assert len(store) == 5
    with index(tmp_path).open("ab") as file:
        file.write(text[-100:])
    assert store.index.refresh() == 1
    assert len(list(store.sequences())) == 6


def test_a_reader_follows_an_index_that_a_resume_wrote_anew(tmp_path: Path, whole: dict[str, str]):
    work(tmp_path)
    store = ActivationStore(tmp_path)
    truncate(tmp_path)
    work(tmp_path)
    store.index.refresh()
    assert {record.key for record in store.sequences()} == set(whole)
    assert sorted(record.shard for record in store.sequences())[-1] == "shard-000003.safetensors"


def test_a_host_that_no_run_has_any_more_is_repaired_on_request(tmp_path: Path, whole: dict[str, str]):
    work(tmp_path, host=4)
    damaged = tmp_path / "host-00004" / "shard-000000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert repair_store(tmp_path)[0].startswith("host-00004/shard-000000.safetensors: has ")
    assert work(tmp_path, host=0).sequences_written == 2
    assert digests(tmp_path) == whole


def test_a_store_in_use_is_not_repaired(tmp_path: Path):
    with (
        ActivationWriter(tmp_path, SETTINGS, host_index=2, provenance={}),
        pytest.raises(StoreError, match="in use"),
    ):
        repair_store(tmp_path)


def test_stale_temp_files_are_swept_under_the_lock_only(tmp_path: Path):
    """Another host's temp file may be one that it is just writing."""
    work(tmp_path, host=0)
    work(tmp_path, host=1)
    stale = [tmp_path / f"host-0000{host}" / "shard-000009.safetensors.tmp" for host in (0, 1)]
    for path in stale:
        path.write_bytes(b"half")
    work(tmp_path, host=0)
    assert [path.exists() for path in stale] == [False, True]


def test_failed_sequences_are_not_tried_again(tmp_path: Path):
    bad: list[FinishedSequence] = batch("a", samples=1)
    assert bad[0].rows is not None
    bad[0].rows[0, 0, 0] = float("nan")
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit(bad)
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        assert writer.committed[sequence_key(SETTINGS, bad[0].id)].failed
        assert writer.dropped == []
