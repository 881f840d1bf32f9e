"""What one commit leaves on disk, in which order, and what is refused before it gets there."""

import dataclasses
import hashlib
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from activation_fakes import EOS, SETTINGS, batch, read_index, sequence, settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    SequenceId,
    StoreError,
    StoreSettings,
    StoreWriteError,
    local_files,
    sequence_key,
)
from activation_store.format import DTYPES

SHARD = "host-00000/shard-000000.safetensors"


def write(
    directory: Path, *batches: list[FinishedSequence], of: StoreSettings = SETTINGS, host: int = 0
) -> ActivationWriter:
    with ActivationWriter(directory, of, host_index=host, provenance={"made": "by a test"}) as writer:
        for one in batches:
            writer.submit(one)
    return writer


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_safetensors_library_reads_a_shard_as_it_was_submitted(tmp_path: Path, dtype: str):
    of = settings(dtype=dtype)
    submitted = batch("a", "bb", of=of)
    write(tmp_path, submitted, of=of)
    tensors = safetensors.numpy.load_file(tmp_path / SHARD)
    for layer, hook in enumerate(of.hook_names):
        expected = np.concatenate([one.rows[layer] for one in submitted if one.rows is not None])
        assert tensors[hook].dtype == DTYPES[dtype]
        np.testing.assert_array_equal(tensors[hook], expected)
    start = 0
    for order, one in enumerate(submitted):
        prompt, generated = one.id.prompt_token_ids, one.token_ids
        prompt_rows = len(prompt) if one.id.sample_index == 0 else 0
        rows = slice(start, start + prompt_rows + len(generated))
        start = rows.stop
        np.testing.assert_array_equal(
            tensors["token_ids"][rows], np.concatenate([prompt[:prompt_rows], generated])
        )
        first = len(prompt) - prompt_rows
        np.testing.assert_array_equal(
            tensors["positions"][rows], np.arange(first, len(prompt) + len(generated))
        )
        assert (tensors["sequence_index"][rows] == order).all()
        assert tensors["is_generated"][rows].tolist() == [0] * prompt_rows + [1] * len(generated)
        np.testing.assert_array_equal(
            tensors["logprobs"][rows],
            np.concatenate([np.full(prompt_rows, np.nan, np.float32), one.logprobs]),
        )
    assert start == len(tensors["token_ids"])
    np.testing.assert_array_equal(
        tensors["prompt_token_ids"], np.concatenate([one.id.prompt_token_ids for one in submitted])
    )


def test_the_index_says_where_each_sequence_lies(tmp_path: Path):
    submitted = batch("a", "bb")
    write(tmp_path, submitted)
    data = (tmp_path / SHARD).read_bytes()
    row_start = prompt_start = 0
    for line, one in zip(read_index(tmp_path), submitted, strict=True):
        assert one.rows is not None
        assert line["key"] == sequence_key(SETTINGS, one.id)
        assert (line["task_id"], line["test_index"], line["sample_index"], line["augmentation"]) == (
            one.id.task_id,
            0,
            one.id.sample_index,
            "identity",
        )
        assert (line["row_start"], line["n_rows"]) == (row_start, one.rows.shape[1])
        assert (line["prompt_start"], line["prompt_length"]) == (prompt_start, len(one.id.prompt_token_ids))
        assert line["generated_length"] == len(one.token_ids)
        assert line["finish_reason"] == one.finish_reason
        assert line["seed"] == SETTINGS.seed
        assert line["shard"] == "shard-000000.safetensors"
        assert line["shard_bytes"] == len(data)
        assert line["shard_sha256"] == hashlib.sha256(data).hexdigest()
        row_start += line["n_rows"]
        prompt_start += line["prompt_length"]


def test_a_key_that_a_sequence_brings_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    computed: list[str] = []

    def counting(of: StoreSettings, one: SequenceId) -> str:
        computed.append(one.task_id)
        return sequence_key(of, one)

    monkeypatch.setattr("activation_store.writer.sequence_key", counting)
    known = [dataclasses.replace(one, key=sequence_key(SETTINGS, one.id)) for one in batch("a")]
    write(tmp_path, [*known, *batch("bb")])
    assert computed == ["bb", "bb"]
    expected = [sequence_key(SETTINGS, one.id) for one in batch("a", "bb")]
    assert [line["key"] for line in read_index(tmp_path)] == expected


def test_rows_of_any_strides_are_stored_as_they_read(tmp_path: Path):
    """The runner hands over views of [layers, steps, batch, hidden]; safetensors would store wrong bytes."""
    buffer = np.arange(3 * 12 * 2 * 16, dtype=np.float32).reshape(3, 12, 2, 16)
    of = settings(dtype="float32", capture_prompt=False)
    view = buffer[:, :6, 1]
    reversed_columns = buffer[:, 2:8, 0, ::-1]
    assert not view.flags.c_contiguous
    one, two = sequence("a", of=of), sequence("b", of=of)
    write(
        tmp_path,
        [dataclasses.replace(one, rows=view), dataclasses.replace(two, rows=reversed_columns)],
        of=of,
    )
    tensors = safetensors.numpy.load_file(tmp_path / SHARD)
    for layer, hook in enumerate(of.hook_names):
        np.testing.assert_array_equal(tensors[hook], np.concatenate([view[layer], reversed_columns[layer]]))


@pytest.mark.parametrize("tasks", [("a",), ("a", "bb"), ("ccc", "dddd", "eeeee")])
def test_layers_begin_at_a_multiple_of_64_bytes(tmp_path: Path, tasks: tuple[str, ...]):
    """The kernel copies rows from odd addresses at half the speed; 32 columns of bfloat16 are 64 bytes."""
    of = settings(hidden_size=32)
    write(tmp_path, batch(*tasks, of=of), of=of)
    data = (tmp_path / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert [(8 + length + header[hook]["data_offsets"][0]) % 64 for hook in of.hook_names] == [0, 0, 0]


def test_the_bytes_of_a_shard_follow_from_its_sequences_alone(tmp_path: Path):
    write(tmp_path / "one", batch("a", "bb"))
    write(tmp_path / "two", batch("a", "bb"))
    assert (tmp_path / "one" / SHARD).read_bytes() == (tmp_path / "two" / SHARD).read_bytes()


def test_files_honour_the_umask(tmp_path: Path):
    old = os.umask(0o027)
    try:
        write(tmp_path / "store", batch("a"))
    finally:
        os.umask(old)
    for name in ("manifest.json", SHARD, "host-00000/index.jsonl"):
        assert stat.S_IMODE((tmp_path / "store" / name).stat().st_mode) == 0o640, name


def test_nothing_but_the_store_is_left(tmp_path: Path):
    write(tmp_path, batch("a"))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    expected = [
        "host-00000.json",
        "host-00000/index.jsonl",
        SHARD,
        "host-00000/writer.lock",
        "manifest.json",
    ]
    assert found == expected


def test_a_commit_is_synced_before_it_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """temp file, fsync, rename, fsync of the folder, then the index line, fsync."""
    write(tmp_path, batch("a"))
    calls: list[str] = []
    paths: dict[int, str] = {}
    real_open, real_write, real_fsync, real_replace = os.open, os.write, os.fsync, Path.replace

    def name(path: Any) -> str:
        return str(Path(path).relative_to(tmp_path))

    def fake_open(path: Any, *args: Any) -> int:
        descriptor = real_open(path, *args)
        paths[descriptor] = name(path)
        return descriptor

    def fake_write(descriptor: int, data: Any) -> int:
        if not calls or calls[-1] != f"write {paths[descriptor]}":
            calls.append(f"write {paths[descriptor]}")
        return real_write(descriptor, data)

    def fake_fsync(descriptor: int) -> None:
        calls.append(f"fsync {paths[descriptor]}")
        real_fsync(descriptor)

    def fake_replace(self: Path, target: Path) -> Path:
        calls.append(f"rename {name(self)} to {name(target)}")
        return real_replace(self, target)

    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        monkeypatch.setattr(local_files.os, "open", fake_open)
        monkeypatch.setattr(local_files.os, "write", fake_write)
        monkeypatch.setattr(local_files.os, "fsync", fake_fsync)
        monkeypatch.setattr(Path, "replace", fake_replace)
        writer.submit(batch("b"))
        writer.close()
        monkeypatch.undo()
    shard = "host-00000/shard-000001.safetensors"
    assert calls == [
        f"write {shard}.tmp",
        f"fsync {shard}.tmp",
        f"rename {shard}.tmp to {shard}",
        "fsync host-00000",
        "write host-00000/index.jsonl",
        "fsync host-00000/index.jsonl",
    ]


def test_new_folders_and_the_manifest_are_durable_before_the_first_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: list[str] = []
    real = local_files._sync_folder
    monkeypatch.setattr(
        local_files,
        "_sync_folder",
        lambda path: (synced.append(str(path.relative_to(tmp_path))), real(path)),
    )
    write(tmp_path / "new" / "store", batch("a"))
    assert synced[:4] == [".", "new", "new/store", "new/store"]  # new, store, host-00000, manifest.json


def test_statistics_and_norms_are_those_of_the_rows(tmp_path: Path):
    submitted = batch("a", "bb")
    write(tmp_path, submitted)
    tensors = safetensors.numpy.load_file(tmp_path / SHARD)
    generated = tensors["is_generated"].astype(bool)
    for layer, hook in enumerate(SETTINGS.hook_names):
        rows = tensors[hook].astype(np.float64)
        np.testing.assert_allclose(tensors["norms"][layer], np.linalg.norm(rows, axis=1), rtol=1e-5)
        for group, mask in (("generated", generated), ("prompt", ~generated)):
            np.testing.assert_allclose(
                tensors[f"statistics.{group}.mean"][layer], rows[mask].mean(axis=0), atol=1e-6
            )
            np.testing.assert_allclose(
                tensors[f"statistics.{group}.variance"][layer], rows[mask].var(axis=0), rtol=1e-5
            )
            expected = np.linalg.norm(rows[mask], axis=1).mean()
            np.testing.assert_allclose(tensors[f"statistics.{group}.norm"][layer], expected, rtol=1e-5)


def test_without_capture_tokens_and_logprobs_are_stored_alone(tmp_path: Path):
    of = settings(hook_names=())
    submitted = batch("a", "bb", of=of)
    write(tmp_path, submitted, of=of)
    store = ActivationStore(tmp_path)
    for record, one in zip(store.sequences(), submitted, strict=True):
        assert record.n_rows == len(one.token_ids)
        np.testing.assert_array_equal(store.generated_tokens(record), one.token_ids)
        np.testing.assert_array_equal(store.generated_logprobs(record), one.logprobs)
        np.testing.assert_array_equal(store.prompt_token_ids(record), one.id.prompt_token_ids)


# --- Sequences that failed ------------------------------------------------------------------------------


def spoiled(task: str, layer: int, row: int, value: float) -> FinishedSequence:
    one = sequence(task)
    assert one.rows is not None
    one.rows[layer, row, 3] = value
    return one


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sequence_that_is_not_finite_is_recorded_as_failed_and_not_stored(tmp_path: Path, value: float):
    bad = spoiled("bad", layer=1, row=6, value=value)
    writer = write(tmp_path, [sequence("a"), bad, sequence("b")])
    assert writer.sequences_written == 2
    record = ActivationStore(tmp_path)[sequence_key(SETTINGS, bad.id)]
    assert (record.finish_reason, record.n_rows, record.shard) == ("failed", 0, "")
    assert record.failure == "blocks.11.hook_resid_post is not finite at position 6"
    assert (record.prompt_length, record.generated_length) == (4, 6)
    tensors = safetensors.numpy.load_file(tmp_path / SHARD)
    assert all(np.isfinite(tensors[hook].astype(np.float32)).all() for hook in SETTINGS.hook_names)
    assert len(tensors["token_ids"]) == 20


def test_the_position_of_a_failure_counts_the_prompt_where_its_rows_are_not_stored(tmp_path: Path):
    bad = sequence("a", sample=1)
    assert bad.rows is not None
    bad.rows[0, 2, 0] = np.nan
    write(tmp_path, [bad])
    failure = next(ActivationStore(tmp_path).sequences(failed=True)).failure
    assert failure == "blocks.10.hook_resid_post is not finite at position 6"  # 4 prompt tokens, row 2


def test_a_log_probability_that_is_not_finite_fails_its_sequence(tmp_path: Path):
    bad = sequence("a")
    bad.logprobs[2] = np.nan
    write(tmp_path, [bad])
    failure = next(ActivationStore(tmp_path).sequences(failed=True)).failure
    assert failure == "the log-probability is not finite at position 6"


def test_a_batch_of_failures_makes_no_shard_and_is_committed(tmp_path: Path):
    bad = spoiled("bad", layer=0, row=0, value=np.nan)
    write(tmp_path, [bad], [sequence("a")])
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        assert sequence_key(SETTINGS, bad.id) in writer.committed
        assert len(writer.committed) == 2
    assert not (tmp_path / SHARD).exists()


def test_huge_finite_values_do_not_fail(tmp_path: Path):
    """Attention sinks are large; only NaN and infinity are failures, not squares that overflow float32."""
    of = settings(dtype="float32")
    large = sequence("a", of=of)
    assert large.rows is not None
    large.rows[:, 0, 0] = 1e30
    assert write(tmp_path, [large], of=of).sequences_written == 1


# --- What is refused ------------------------------------------------------------------------------------


def with_rows(shape: tuple[int, ...], dtype: Any = ml_dtypes.bfloat16) -> FinishedSequence:
    return dataclasses.replace(sequence("a"), rows=np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (with_rows((3, 10, 8)), "8 wide, the model's hidden size is 16"),
        (with_rows((2, 10, 16)), "rows of 2 layers, expected 3"),
        (with_rows((3, 11, 16)), "11 rows for 4 prompt and 6 generated tokens"),
        (with_rows((3, 10, 16), np.float32), "rows are float32, the store holds bfloat16"),
        (dataclasses.replace(sequence("a"), rows=None), "no activation rows"),
        (dataclasses.replace(sequence("a"), logprobs=np.zeros(5, np.float32)), "log-probabilities"),
        (dataclasses.replace(sequence("a"), finish_reason="done"), "finish_reason 'done'"),
        (sequence("a", generated=13), "13 generated tokens, expected 1 to 12"),
        (sequence("a", generated=1, prompt=4, of=settings(hook_names=())), "no activation rows"),
    ],
)
def test_rows_that_are_not_what_the_settings_promise_stop_the_run(
    tmp_path: Path, bad: FinishedSequence, message: str
):
    writer = ActivationWriter(tmp_path, SETTINGS, provenance={})
    writer.submit([bad])
    with pytest.raises(StoreError, match=message):
        writer.close()
    assert not (tmp_path / SHARD).exists()


def test_an_empty_generation_is_refused(tmp_path: Path):
    empty = FinishedSequence(
        SequenceId("a", 0, 0, "identity", np.zeros(4, np.int32)),
        np.zeros(0, np.int32),
        np.zeros(0, np.float32),
        "stop",
        np.zeros((3, 4, 16), ml_dtypes.bfloat16),
    )
    writer = ActivationWriter(tmp_path, SETTINGS, provenance={})
    writer.submit([empty])
    with pytest.raises(StoreError, match="0 generated tokens"):
        writer.close()


@pytest.mark.parametrize("again", [batch("a"), [*batch("b"), *batch("b")]])
def test_a_sequence_is_never_stored_twice(tmp_path: Path, again: list[FinishedSequence]):
    write(tmp_path, batch("a"))
    writer = ActivationWriter(tmp_path, SETTINGS, provenance={})
    writer.submit(again)
    with pytest.raises(StoreError, match="already committed"):
        writer.close()
    assert len(read_index(tmp_path)) == 2


def test_other_settings_are_refused_with_each_difference_named(tmp_path: Path):
    write(tmp_path, batch("a"))
    both = r"\(max_output_tokens is 12 there and 99 here; seed is 7 there and 8 here\)"
    with pytest.raises(StoreError, match=both):
        ActivationWriter(tmp_path, settings(seed=8, max_output_tokens=99), host_index=3, provenance={})
    assert not (tmp_path / "host-00003").exists()


def test_provenance_may_differ(tmp_path: Path):
    write(tmp_path, batch("a"))
    with ActivationWriter(tmp_path, SETTINGS, provenance={"jax": "another"}) as writer:
        assert len(writer.committed) == 2
    assert ActivationStore(tmp_path).provenance == {"made": "by a test"}


def test_a_second_writer_on_the_same_host_index_is_refused_at_once(tmp_path: Path):
    with ActivationWriter(tmp_path, SETTINGS, provenance={}):
        with pytest.raises(StoreError, match=r"is in use: another run writes to this directory as host 0"):
            ActivationWriter(tmp_path, SETTINGS, provenance={})
        with ActivationWriter(tmp_path, SETTINGS, host_index=1, provenance={}):
            pass
    write(tmp_path, batch("a"))


def test_sequences_without_a_manifest_are_not_continued(tmp_path: Path):
    write(tmp_path, batch("a"))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"has sequences but no manifest\.json"):
        ActivationWriter(tmp_path, SETTINGS, provenance={})


def test_of_two_hosts_that_create_the_manifest_one_wins_and_the_other_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Host 1 looks for a manifest, finds none, and host 0 creates it before host 1 does."""
    real = local_files.LocalFiles.create

    def create_late(self: local_files.LocalFiles, host: int, name: str, data: bytes) -> None:
        monkeypatch.undo()
        write(tmp_path, batch("a"))
        real(self, host, name, data)

    monkeypatch.setattr(local_files.LocalFiles, "create", create_late)
    with pytest.raises(StoreError, match="seed is 7 there and 8 here"):
        ActivationWriter(tmp_path, settings(seed=8), host_index=1, provenance={})
    assert ActivationStore(tmp_path).settings == SETTINGS
    monkeypatch.setattr(local_files.LocalFiles, "create", create_late)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "host-00000" / "index.jsonl").unlink()
    with ActivationWriter(tmp_path, SETTINGS, host_index=1, provenance={}) as writer:
        assert len(writer.committed) == 2


# --- The background thread ------------------------------------------------------------------------------


def test_a_callable_is_run_on_the_writers_thread(tmp_path: Path):
    threads: list[str] = []

    def late() -> list[FinishedSequence]:
        threads.append(threading.current_thread().name)
        return batch("a")

    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit(late)
    assert threads == ["activation-writer"]
    assert len(ActivationStore(tmp_path)) == 2


def test_at_most_two_batches_are_in_flight(tmp_path: Path):
    go, third_was_taken = threading.Event(), threading.Event()

    def held(task: str) -> Any:
        return lambda: (go.wait(10), batch(task))[1]

    def submit_third() -> None:
        writer.submit(held("c"))
        third_was_taken.set()

    writer = ActivationWriter(tmp_path, SETTINGS, provenance={})
    writer.submit(held("a"))
    writer.submit(held("b"))  # returns at once: two are in flight
    third = threading.Thread(target=submit_third)
    third.start()
    assert not third_was_taken.wait(0.2)
    go.set()
    assert third_was_taken.wait(10)
    third.join()
    writer.close()
    assert len(ActivationStore(tmp_path)) == 6


def test_a_background_error_stops_the_run_at_the_next_submit_and_at_close(tmp_path: Path):
    class DeviceLostError(Exception):
        pass

    def failing() -> list[FinishedSequence]:
        raise DeviceLostError("copy failed")

    failed = threading.Event()
    writer = ActivationWriter(tmp_path, SETTINGS, provenance={})
    writer.submit(batch("a"))
    writer.submit(failing)
    while writer._error is None:
        failed.wait(0.01)
    for _ in range(3):  # however often it is tried
        with pytest.raises(DeviceLostError):
            writer.submit(batch("b"))
    with pytest.raises(DeviceLostError):
        writer.close()
    assert len(ActivationStore(tmp_path)) == 2  # the batch before it is safe
    write(tmp_path, batch("b"))  # and the lock is free


def test_an_earlier_error_can_be_asked_for_without_a_batch(tmp_path: Path):
    def failing() -> list[FinishedSequence]:
        raise MemoryError("copy failed")

    writer = ActivationWriter(tmp_path, SETTINGS, provenance={})
    writer.raise_pending()  # there is none
    writer.submit(failing)
    while writer._error is None:
        threading.Event().wait(0.01)
    for _ in range(2):
        with pytest.raises(MemoryError, match="copy failed"):
            writer.raise_pending()
    with pytest.raises(MemoryError):
        writer.close()


def test_asking_for_an_earlier_error_does_not_wait_for_what_is_in_flight(tmp_path: Path):
    go = threading.Event()
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        for task in ("a", "b"):
            writer.submit(lambda task=task: (go.wait(10), batch(task))[1])
        writer.raise_pending()
        assert writer.sequences_written == 0
        go.set()
    assert writer.sequences_written == 4


def test_after_an_error_what_was_in_flight_already_is_not_written(tmp_path: Path):
    """It may rest on what failed; the next run makes both again."""
    go = threading.Event()

    def failing() -> list[FinishedSequence]:
        go.wait(10)
        raise MemoryError("copy failed")

    writer = ActivationWriter(tmp_path, SETTINGS, provenance={})
    writer.submit(failing)
    writer.submit(batch("b"))
    go.set()
    with pytest.raises(MemoryError):
        writer.close()
    assert len(ActivationStore(tmp_path)) == 0


def test_an_error_of_the_run_still_commits_what_is_in_flight_and_is_the_one_seen(tmp_path: Path):
    def run() -> None:
        with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
            writer.submit(batch("a"))
            writer.submit([sequence("b", generated=13)])  # refused in the background
            raise KeyError("the run broke")

    with pytest.raises(KeyError):
        run()
    assert len(ActivationStore(tmp_path)) == 2


def test_a_closed_writer_takes_nothing(tmp_path: Path):
    writer = write(tmp_path, batch("a"))
    with pytest.raises(StoreError, match="closed"):
        writer.submit(batch("b"))


def test_an_empty_batch_writes_nothing(tmp_path: Path):
    assert write(tmp_path, []).bytes_written == 0
    assert not (tmp_path / "host-00000" / "index.jsonl").exists()


def test_bytes_and_sequences_are_counted(tmp_path: Path):
    writer = write(tmp_path, batch("a"), batch("b", "c"))
    shards = (tmp_path / "host-00000").glob("*.safetensors")
    assert writer.bytes_written == sum(path.stat().st_size for path in shards)
    assert writer.sequences_written == 6


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot"):
        ActivationWriter(tmp_path / "file" / "store", SETTINGS, provenance={})


def test_a_write_error_says_that_earlier_batches_are_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    writer = ActivationWriter(tmp_path, SETTINGS, provenance={})
    monkeypatch.setattr(local_files.os, "write", full)
    writer.submit(batch("a"))
    with pytest.raises(StoreWriteError, match=r"No space left on device; what was committed before is safe"):
        writer.close()
    assert not list((tmp_path / "host-00000").glob("*.tmp"))


def test_the_eos_of_the_fakes_is_that_of_the_settings():
    assert SETTINGS.eos_token_ids == (EOS,)
