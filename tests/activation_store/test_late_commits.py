"""A sequence is in the store once, whoever makes it again and however late."""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from activation_fakes import SETTINGS, batch, read_index, write_index

from activation_store import (
    ActivationStore,
    ActivationWriter,
    ShuffledBatches,
    local_files,
    repair_store,
    sequence_key,
    verify_store,
    writer,
)

TASKS = ("a", "bb", "ccc")
KEYS = {sequence_key(SETTINGS, one.id) for one in batch(*TASKS)}


def open_writer(directory: Path, host: int) -> ActivationWriter:
    return ActivationWriter(directory, SETTINGS, host_index=host, provenance={})


def work(directory: Path, host: int, *tasks: str) -> ActivationWriter:
    with open_writer(directory, host) as one:
        todo = [s for s in batch(*tasks) if sequence_key(SETTINGS, s.id) not in one.committed]
        one.submit(todo)
    return one


def keys(directory: Path, *hosts: int) -> list[str]:
    return [line["key"] for host in hosts for line in read_index(directory, host)]


@contextlib.contextmanager
def before(monkeypatch: pytest.MonkeyPatch, step: str, action: Callable[[], Any]) -> Iterator[None]:
    """Does something as the next writer comes to a step of its commit, as while it is stopped there."""
    real = getattr(local_files.LocalFiles, step)
    done: list[bool] = []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(True)
            action()
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(local_files.LocalFiles, step, stopped)
        yield
    assert done


@pytest.mark.parametrize("step", ["commit", "begin_commit", "append_index"])
@pytest.mark.parametrize(("late", "other"), [(0, 1), (1, 0)])
def test_a_host_that_was_stopped_in_its_commit_stores_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, late: int, other: int
):
    """At `append_index` the stopped host has locked the others out: they go on after a while."""
    monkeypatch.setattr(local_files, "COMMIT_SECONDS", 0.1)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.1)
    work(tmp_path, late, "dddd")
    with open_writer(tmp_path, late) as stopped:
        with before(monkeypatch, step, lambda: work(tmp_path, other, "a", "bb")):
            stopped.submit(batch(*TASKS))
            stopped.close()
        assert stopped.sequences_written == 2
        assert stopped.tokens_written == sum(len(one.token_ids) for one in batch("ccc"))
    found = keys(tmp_path, 0, 1)
    assert len(set(found)) == len(found) == 8
    assert set(keys(tmp_path, other)) < KEYS  # those who came first have it
    assert list(verify_store(ActivationStore(tmp_path))) == []
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("step", ["commit", "append_index"])
def test_a_stopped_host_whose_work_was_all_done_leaves_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    monkeypatch.setattr(local_files, "COMMIT_SECONDS", 0.1)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.1)
    with open_writer(tmp_path, 0) as stopped, before(monkeypatch, step, lambda: work(tmp_path, 1, *TASKS)):
        stopped.submit(batch(*TASKS))
        stopped.close()
    assert (stopped.sequences_written, stopped.tokens_written, stopped.bytes_written) == (0, 0, 0)
    assert not list((tmp_path / "host-00000").glob("*.safetensors"))
    assert len(ActivationStore(tmp_path)) == 6
    assert list(verify_store(ActivationStore(tmp_path))) == []
    assert work(tmp_path, 0, *TASKS, "dddd").sequences_written == 2


def test_hosts_that_commit_at_once_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second comes while the first has looked and not yet written."""
    second = open_writer(tmp_path, 1)

    def come() -> None:
        second.submit(batch(*TASKS))
        threading.Event().wait(0.2)
        assert second.sequences_written == 0

    with open_writer(tmp_path, 0) as first, before(monkeypatch, "append_index", come):
        first.submit(batch(*TASKS))
        first.close()
    second.close()
    assert (first.sequences_written, second.sequences_written) == (6, 0)
    assert set(keys(tmp_path, 0)) == KEYS
    assert list(verify_store(ActivationStore(tmp_path))) == []


def test_many_hosts_on_the_same_sequences_store_each_once(tmp_path: Path):
    writers = [open_writer(tmp_path, host) for host in range(5)]
    for task in [f"task{number}" for number in range(6)]:
        for one in writers:
            one.submit(batch(task))
    for one in writers:
        one.close()
    assert sum(one.sequences_written for one in writers) == len(ActivationStore(tmp_path)) == 12
    found = [
        key
        for host in range(5)
        if (tmp_path / f"host-{host:05d}/index.jsonl").exists()
        for key in keys(tmp_path, host)
    ]
    assert len(found) == 12
    assert list(verify_store(ActivationStore(tmp_path))) == []


# --- Stores in which it has happened ------------------------------------------------------------------------


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """Hosts 0 and 2 have task bb; host 0 was the first to be asked, host 2 the first to be done."""
    work(tmp_path / "store", 0, "a")
    work(tmp_path / "store", 2, "bb", "ccc")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "store", other)
    for path in (other / "host-00002", other / "host-00002.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    work(other, 0, "bb")
    shutil.rmtree(tmp_path / "store" / "host-00000")
    shutil.copytree(other / "host-00000", tmp_path / "store" / "host-00000")
    return tmp_path / "store"


def test_every_reader_counts_a_sequence_once_and_all_count_the_same(twice: Path):
    store = ActivationStore(twice)
    assert len(store) == 6
    records = list(store.sequences())
    assert [record.host for record in records] == [0, 0, 0, 0, 2, 2]
    assert {record.key: record for record in records} == {key: store[key] for key in store.index}
    rows = sum(record.n_rows for record in records)
    assert sum(len(data) for data, _, _ in store.iterate(11)) == rows
    assert sum(len(one.rows) for one in ShuffledBatches(store, 11, 8)) == rows
    count = sum(store.statistics(11, group).count for group in ("generated", "prompt"))
    assert count == rows
    generated = np.concatenate([d[c.is_generated].astype(np.float64) for d, c, _ in store.iterate(11)])
    np.testing.assert_allclose(store.statistics(11).mean, generated.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(store.statistics(11).variance, generated.var(axis=0), rtol=1e-4)


def test_a_reader_that_learns_of_the_earlier_line_last_ends_with_the_same(twice: Path):
    lines = read_index(twice, 0)
    write_index(twice, lines[:2], 0)
    follower = ActivationStore(twice)
    assert [record.host for record in follower.sequences()] == [0, 0, 2, 2, 2, 2]
    with (twice / "host-00000" / "index.jsonl").open("ab") as file:
        file.write(b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines[2:]))
    assert follower.index.refresh() == 0
    assert list(follower.sequences()) == list(ActivationStore(twice).sequences())


def test_the_second_line_is_a_finding_and_repair_drops_it_alone(twice: Path):
    store = ActivationStore(twice)
    before_it = {record.key: store.sequence_digest(record) for record in store.sequences()}
    found = list(verify_store(store))
    assert len(found) == 2
    assert all("host-00002/index.jsonl" in line and "occurs twice" in line for line in found)
    assert len(repair_store(twice)) == 2
    store = ActivationStore(twice)
    assert list(verify_store(store)) == []
    assert {record.key: store.sequence_digest(record) for record in store.sequences()} == before_it
    assert work(twice, 0, *TASKS).sequences_written == 0


def test_a_host_drops_its_own_late_lines_when_it_starts(twice: Path):
    assert work(twice, 0, *TASKS).dropped == []  # it was the earlier one
    late = work(twice, 2, *TASKS)
    assert len(late.dropped) == 2
    assert all("which is stored already" in line for line in late.dropped)
    assert late.sequences_written == 0
    assert list(verify_store(ActivationStore(twice))) == []
    assert work(twice, 2, *TASKS).dropped == []


def test_a_line_that_is_there_twice_counts_once_and_the_second_is_dropped(tmp_path: Path):
    work(tmp_path, 0, "a", "bb")
    lines = read_index(tmp_path)
    write_index(tmp_path, [*lines, lines[1]])
    assert len(ActivationStore(tmp_path)) == 4
    assert [line.split(", line ")[1][:1] for line in verify_store(ActivationStore(tmp_path))] == ["5"]
    assert work(tmp_path, 0, "a").dropped[-1].endswith("which is stored already")
    assert read_index(tmp_path) == lines
    assert list(verify_store(ActivationStore(tmp_path))) == []


def test_repair_keeps_the_later_line_where_the_earlier_one_is_damaged(twice: Path):
    shard = twice / "host-00000" / "shard-000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    repair_store(twice)
    store = ActivationStore(twice)
    assert [record.host for record in store.sequences()] == [0, 0, 2, 2, 2, 2]
    assert list(verify_store(store)) == []
