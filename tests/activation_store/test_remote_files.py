"""A store behind an fsspec URL: the same store, in objects that are created once and never changed."""

import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from activation_fakes import SETTINGS, batch, settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    RetryPolicy,
    RowFilter,
    ShuffledBatches,
    StoreError,
    StoreWriteError,
    sequence_key,
    verify_store,
    write_outcomes,
)

MEMORY = fsspec.filesystem("memory")


@pytest.fixture
def url() -> Iterator[str]:
    location = f"memory://bucket-{uuid.uuid4().hex}/run"
    yield location
    MEMORY.rm(location.removeprefix("memory:/").removesuffix("/run"), recursive=True)


def objects(url: str) -> list[str]:
    root = url.removeprefix("memory:/")
    return sorted(path.removeprefix(root + "/") for path in MEMORY.find(root))


def work(url: str, *tasks: str, host: int = 0) -> ActivationWriter:
    with ActivationWriter(url, SETTINGS, host_index=host, provenance={}) as writer:
        for task in tasks:
            writer.submit(
                [one for one in batch(task) if sequence_key(SETTINGS, one.id) not in writer.committed]
            )
    return writer


def test_one_object_a_shard_and_one_an_index_commit(url: str):
    work(url, "a", "bb")
    assert objects(url) == [
        "host-00000.json",
        "host-00000/index/000000.jsonl",
        "host-00000/index/000001.jsonl",
        "host-00000/shard-000000.safetensors",
        "host-00000/shard-000001.safetensors",
        "manifest.json",
    ]


def test_the_sequences_are_those_of_a_local_store(url: str, tmp_path: Path):
    work(url, "a", "bb")
    work(str(tmp_path), "a", "bb")
    remote, local = ActivationStore(url), ActivationStore(tmp_path)
    assert [remote.sequence_digest(r) for r in remote.sequences()] == [
        local.sequence_digest(r) for r in local.sequences()
    ]
    for (rows, _, _), (expected, _, _) in zip(remote.iterate(11), local.iterate(11), strict=True):
        np.testing.assert_array_equal(rows, expected)
    assert list(verify_store(remote)) == []
    np.testing.assert_array_equal(remote.statistics(11).mean, local.statistics(11).mean)
    batches = (ShuffledBatches(store, 11, 8, rows=RowFilter(prompt=False)) for store in (remote, local))
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)


def test_a_run_is_continued_and_other_settings_are_refused(url: str):
    work(url, "a")
    assert work(url, "a", "bb").sequences_written == 2
    with pytest.raises(StoreError, match="seed is 7 there and 8 here"):
        ActivationWriter(url, settings(seed=8), provenance={})


def test_every_host_sees_what_the_others_committed(url: str):
    work(url, "a", host=1)
    with ActivationWriter(url, SETTINGS, host_index=0, provenance={}) as writer:
        assert len(writer.committed) == 2
        work(url, "bb", host=1)
        assert writer.refresh() == 2


def test_listings_that_a_filesystem_keeps_are_asked_for_anew(url: str, monkeypatch: pytest.MonkeyPatch):
    """As gcsfs and s3fs do: a directory is listed once and the answer kept until it is invalidated."""
    kept: dict[str, Any] = {}
    real = type(MEMORY).ls

    def ls(self: Any, path: str, detail: bool = True, **options: Any) -> Any:
        if path not in kept:
            kept[path] = real(self, path, detail=detail, **options)
        return kept[path]

    work(url, "a")

    def invalidate_cache(self: Any, path: str) -> None:
        kept.pop(path, None)

    monkeypatch.setattr(type(MEMORY), "ls", ls)
    monkeypatch.setattr(type(MEMORY), "invalidate_cache", invalidate_cache)
    store = ActivationStore(url)
    work(url, "bb", host=1)
    assert store.index.refresh() == 2


def test_a_shard_without_index_is_never_overwritten(url: str):
    """There is no lock that would tell a crash from another run which is just writing it."""
    work(url, "a", "bb")
    root = url.removeprefix("memory:/")
    MEMORY.rm(f"{root}/host-00000/index/000001.jsonl")
    left = MEMORY.cat(f"{root}/host-00000/shard-000001.safetensors")
    assert work(url, "a", "bb").sequences_written == 2
    assert MEMORY.cat(f"{root}/host-00000/shard-000001.safetensors") == left
    assert "host-00000/shard-000002.safetensors" in objects(url)
    assert len(list(ActivationStore(url).sequences())) == 4


def test_a_second_run_on_the_same_host_is_refused_when_it_writes(url: str):
    first = ActivationWriter(url, SETTINGS, provenance={})
    second = ActivationWriter(url, SETTINGS, provenance={})
    first.submit(batch("a"))
    first.close()
    second.submit(batch("bb"))
    with pytest.raises(StoreWriteError, match="under the same host index"):
        second.close()
    assert len(ActivationStore(url)) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"\0"])
def test_a_shard_of_the_wrong_size_is_made_again(url: str, damage: Any):
    work(url, "a", "bb")
    path = f"{url.removeprefix('memory:/')}/host-00000/shard-000000.safetensors"
    MEMORY.pipe_file(path, damage(MEMORY.cat(path)))
    assert work(url, "a", "bb").sequences_written == 2
    assert list(verify_store(ActivationStore(url))) == []


def test_an_upload_that_arrives_changed_is_an_error(url: str, monkeypatch: pytest.MonkeyPatch):
    writer = ActivationWriter(url, SETTINGS, provenance={})
    real = type(MEMORY).pipe_file

    def corrupting(self: Any, path: str, value: bytes, **options: Any) -> None:
        real(self, path, value[:-1] + bytes([value[-1] ^ 1]), **options)

    monkeypatch.setattr(type(MEMORY), "pipe_file", corrupting)
    writer.submit(batch("a"))
    with pytest.raises(StoreWriteError, match="another checksum"):
        writer.close()
    assert len(ActivationStore(url)) == 0


def test_an_upload_that_arrives_cut_is_an_error(url: str, monkeypatch: pytest.MonkeyPatch):
    writer = ActivationWriter(url, SETTINGS, provenance={})
    real = type(MEMORY).pipe_file
    monkeypatch.setattr(
        type(MEMORY),
        "pipe_file",
        lambda self, path, value, **options: real(self, path, value[:-1], **options),
    )
    writer.submit(batch("a"))
    with pytest.raises(StoreWriteError, match="bytes long after its upload"):
        writer.close()


def test_a_store_copied_to_disk_is_read_and_continued_there(url: str, tmp_path: Path):
    work(url, "a")
    MEMORY.get(url.removeprefix("memory:/"), str(tmp_path / "copy"), recursive=True)
    assert len(list(ActivationStore(tmp_path / "copy").sequences())) == 2
    assert work(str(tmp_path / "copy"), "a", "bb").sequences_written == 2
    assert list(verify_store(ActivationStore(tmp_path / "copy"))) == []


def test_a_local_store_copied_to_objects_is_read_there(url: str, tmp_path: Path):
    work(str(tmp_path), "a")
    MEMORY.put(str(tmp_path), url.removeprefix("memory:/"), recursive=True)
    assert len(list(ActivationStore(url).sequences())) == 2
    assert work(url, "a", "bb").sequences_written == 2


def test_outcomes_are_kept_as_an_object(url: str):
    work(url, "a")
    keys = list(ActivationStore(url).index)
    write_outcomes(url, {keys[0]: True})
    write_outcomes(url, {keys[1]: False})
    assert [r.key for r in ActivationStore(url).sequences(solved=True)] == keys[:1]


def test_a_file_url_is_a_local_directory(tmp_path: Path):
    work(f"file://{tmp_path}/store", "a")
    assert (tmp_path / "store" / "host-00000" / "index.jsonl").exists()


def test_an_unknown_kind_of_url_is_one_sentence():
    with pytest.raises(StoreError, match=r"nosuch://x cannot be opened"):
        ActivationStore("nosuch://x")


# --- Paths and URLs -----------------------------------------------------------------------------------------


def test_home_is_expanded_for_writer_and_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with ActivationWriter("~/acts", SETTINGS, provenance={}) as writer:
        writer.submit(batch("a"))
    assert (tmp_path / "acts" / "manifest.json").is_file()
    assert not (tmp_path / "~").exists()
    assert len(ActivationStore("~/acts")) == len(ActivationStore(Path("~/acts"))) == 2
    write_outcomes("~/acts", {})
    assert list(verify_store(ActivationStore("~/acts"))) == []


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "memory://a\0b"])
def test_what_is_no_path_is_refused(path: str):
    for call in (ActivationStore, lambda path: ActivationWriter(path, SETTINGS, provenance={})):
        with pytest.raises(StoreError, match="is no path: it has a NUL byte or half of a character in it"):
            call(path)


def test_no_message_shows_a_password_of_the_url():
    for url in ("nosuch://key:secret@bucket/run", "memory://key:secret@bucket/run"):
        with pytest.raises(StoreError) as raised:
            ActivationStore(url)
        assert "secret" not in str(raised.value)
        assert "***@bucket/run" in str(raised.value)
    policy = RetryPolicy("s3://key:secret@bucket/run")

    def forbidden() -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(StoreWriteError, match=r"s3://\*\*\*@bucket/run cannot be used"):
        policy(forbidden)


@pytest.mark.parametrize(
    "name", ["../../victim.txt", "../manifest.json", "victim.txt", "shard-1.safetensors"]
)
def test_an_object_that_a_store_does_not_write_is_never_read_or_removed(url: str, name: str):
    work(url, "a")
    root = url.removeprefix("memory:/")
    victims = [f"{root.removesuffix('/run')}/victim.txt", f"{root}/host-00000/victim.txt"]
    for victim in victims:
        MEMORY.pipe_file(victim, b"mine")
    index = f"{root}/host-00000/index/000000.jsonl"
    MEMORY.pipe_file(index, MEMORY.cat(index).replace(b"shard-000000.safetensors", name.encode()))
    MEMORY.pipe_file(f"{root}/host-00000/index/000000.jsonl.orig", b"{")
    with pytest.raises(StoreError, match="not an index line"):
        list(ActivationStore(url).sequences())
    assert len(work(url, "a").dropped) >= 2
    assert [MEMORY.cat(victim) for victim in victims] == [b"mine", b"mine"]
    assert len(list(ActivationStore(url).sequences())) == 2


def test_a_url_that_names_local_files_is_a_local_directory(tmp_path: Path):
    work(f"local://{tmp_path}/store", "a")
    assert (tmp_path / "store" / "host-00000" / "index.jsonl").exists()


def test_a_store_opened_by_a_relative_path_outlives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    work("acts", "a")
    store = ActivationStore("acts")
    with ActivationWriter("acts", SETTINGS, provenance={}) as writer:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        writer.submit(batch("bb"))
    assert store.files.location == "acts"
    assert store.index.refresh() == 2
    expected = [store.rows(record, 11) for record in store]
    other = pickle.loads(pickle.dumps(store))
    for record, rows in zip(other, expected, strict=True):
        np.testing.assert_array_equal(other.rows(record, 11), rows)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("no\nhost"), TypeError("bad option"), KeyError("x"), OSError(5, "no")]
)
def test_whatever_a_file_system_raises_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(url: str) -> None:
        raise error

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(StoreError, match="memory://x cannot be opened: ") as raised:
        ActivationStore("memory://x")
    assert "\n" not in str(raised.value)
