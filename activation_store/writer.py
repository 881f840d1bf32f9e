"""Writing a store: one batch is one shard is one commit, on a thread beside the computation.

Order of a commit: temp file, fsync, rename, fsync of the folder, then the batch's index lines in one write
and their fsync. A crash at any moment leaves at most a temp file, a shard that no index line names, or a
torn last index line; the next start clears each of them away and the batch is computed again.
"""

import contextlib
import hashlib
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from activation_store.format import (
    MANIFEST,
    FinishedSequence,
    SequenceRecord,
    StoreError,
    StoreSettings,
    decode_line,
    decode_manifest,
    encode_line,
    encode_manifest,
    host_name,
    sequence_key,
    shard_name,
    shard_number,
)
from activation_store.index import SequenceIndex, index_lines
from activation_store.packing import PackedBatch, pack_batch
from activation_store.remote_files import open_files
from activation_store.retry import Patience, at_once
from activation_store.store_files import FileStatus, StoredFile, StoreFiles, writing

BATCHES_IN_FLIGHT = 2
Batch = Sequence[FinishedSequence] | Callable[[], Sequence[FinishedSequence]]


class ActivationWriter:
    """Appends sequences to a store as one of its hosts; a context manager.

    `directory` is a path or an fsspec URL. Opening it takes the host's lock, clears away what a crash left,
    drops sequences whose shard is missing or changed, and compares the settings with the manifest's
    (StoreError naming each difference). `committed` then maps the keys that need no work, of all hosts, to
    their records; `refresh` adds what other hosts have committed since. With `patiently` a commit waits for a
    store that is away; without, its first error is the last one.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: StoreSettings,
        *,
        host_index: int = 0,
        provenance: Mapping[str, Any],
        patiently: Patience | None = None,
    ) -> None:
        self._settings = settings
        self._host = host_index
        self._patiently = patiently or at_once
        self._files = open_files(directory)
        had_manifest = _check_manifest(self._files, settings)
        self._release = self._files.open_host(host_index)
        try:
            if not had_manifest:
                _create_manifest(self._files, settings, host_index, provenance)
            self._next_number, self.dropped = recover_host(self._files, host_index)
            self.committed = SequenceIndex(self._files)
        except OSError as error:
            self._release()
            raise StoreError(f"cannot open {self._files.location}: {error.strerror or error}") from error
        except BaseException:
            self._release()
            raise
        self.bytes_written = 0
        self.sequences_written = 0
        self._error: BaseException | None = None
        self._free = threading.Semaphore(BATCHES_IN_FLIGHT)
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(
            target=self._work, name="activation-writer", daemon=True
        )
        self._thread.start()

    def submit(self, batch: Batch) -> None:
        """Queue a batch; returns at once unless two are in flight already.

        A callable is run on the writer's thread: that is where a device-to-host copy belongs. When an earlier
        batch could not be written, its error is raised here and nothing more is written.
        """
        if self._thread is None:
            raise StoreError("the activation writer is closed")
        self._free.acquire()
        if self._error is not None:
            self._free.release()
            raise self._error
        self._batches.put(batch)

    def refresh(self) -> int:
        """Learn what other hosts have committed; how many sequences are new."""
        return self.committed.refresh()

    def close(self) -> None:
        """Wait for what is in flight, let go of the directory, and raise the background error if any."""
        if self._thread is not None:
            self._batches.put(None)
            self._thread.join()
            self._thread = None
            self._release()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # finish what is in flight, but let the error that ended the run be the one that is seen
            with contextlib.suppress(Exception):
                self.close()

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None:
            try:
                if self._error is None:
                    self._commit(batch() if callable(batch) else batch)
            except BaseException as error:
                self._error = error
            finally:
                batch = None  # let go of its arrays before waiting for the next
                self._free.release()

    def _commit(self, batch: Sequence[FinishedSequence]) -> None:
        if not batch:
            return
        keys = [sequence_key(self._settings, sequence.id) for sequence in batch]
        others = self._patiently(lambda: self._made_by_others(keys))
        if others:  # two hosts made them, when one was thought dead; they are the same
            batch = [sequence for key, sequence in zip(keys, batch, strict=True) if key not in others]
            keys = [key for key in keys if key not in others]
            if not batch:
                return
        if len(set(keys)) != len(keys) or any(key in self.committed for key in keys):
            raise StoreError(
                "a sequence was submitted that is already committed; skip the keys in `committed`"
            )
        packed = pack_batch(self._settings, batch)
        number, stored = self._next_number, StoredFile(0, "", 0)
        name = shard_name(number)
        if packed.tensors:
            path = f"{host_name(self._host)}/{name}"
            stored = self._patiently(lambda: self._files.commit(path, packed.chunks()))
        lines = _index_lines(self._settings, self._host, name, batch, keys, packed, stored)
        self._patiently(lambda: self._files.append_index(self._host, number, lines))
        self._next_number += 1
        self._patiently(lambda: self._reread(self._host))
        self.bytes_written += stored.size
        self.sequences_written += len(packed.placements)

    def _made_by_others(self, keys: Sequence[str]) -> set[str]:
        self._reread()
        return {key for key in keys if key in self.committed and self.committed[key].host != self._host}

    def _reread(self, host: int | None = None) -> None:
        with writing(self._files.location, host_name(self._host)):
            self.committed.refresh(host)


def _index_lines(
    settings: StoreSettings,
    host: int,
    shard: str,
    batch: Sequence[FinishedSequence],
    keys: Sequence[str],
    packed: PackedBatch,
    stored: StoredFile,
) -> bytes:
    """The lines of a batch: failed sequences, which have no shard, then those of the shard, in its order."""
    lines = []
    for place in [*packed.failures, *packed.placements]:
        sequence, placement = batch[place], packed.placements.get(place)
        lines.append(
            encode_line(
                SequenceRecord(
                    key=keys[place],
                    shard=shard if placement else "",
                    task_id=sequence.id.task_id,
                    test_index=sequence.id.test_index,
                    sample_index=sequence.id.sample_index,
                    augmentation=sequence.id.augmentation,
                    seed=settings.seed,
                    row_start=placement.row_start if placement else 0,
                    n_rows=placement.n_rows if placement else 0,
                    prompt_start=placement.prompt_start if placement else 0,
                    prompt_length=len(sequence.id.prompt_token_ids),
                    generated_length=len(sequence.token_ids),
                    finish_reason=sequence.finish_reason if placement else "failed",
                    shard_bytes=stored.size if placement else 0,
                    shard_sha256=stored.sha256 if placement else "",
                    shard_sequences=len(packed.placements) if placement else 0,
                    shard_mtime_ns=stored.mtime_ns if placement else 0,
                    failure=packed.failures.get(place),
                    host=host,
                )
            )
        )
    return b"".join(lines)


def _check_manifest(files: StoreFiles, settings: StoreSettings) -> bool:
    """Whether the store has a manifest; StoreError when it is one of other settings."""
    try:
        data = files.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StoreError(f"cannot read {files.location}/{MANIFEST}: {error.strerror or error}") from error
    there, _ = decode_manifest(data, f"{files.location}/{MANIFEST}")
    check_settings(there, settings, files.location)
    return True


def check_settings(there: StoreSettings, asked: StoreSettings, location: str) -> None:
    """StoreError naming each difference between a store's settings and those that are asked for."""
    if differences := there.differences(asked):
        raise StoreError(
            f"{location} was made with other settings ({'; '.join(differences)}); "
            "choose another directory or the same settings"
        )


def _create_manifest(
    files: StoreFiles, settings: StoreSettings, host: int, provenance: Mapping[str, Any]
) -> None:
    if any(files.indexes(other) for other in files.hosts()):
        raise StoreError(
            f"{files.location} has sequences but no {MANIFEST}: restore it or choose another directory"
        )
    try:
        files.create(host, MANIFEST, encode_manifest(settings, provenance))
    except FileExistsError:  # another host was quicker; it must have been asked for the same
        _check_manifest(files, settings)


def repair_store(directory: str | os.PathLike[str]) -> list[str]:
    """`recover_host` for every host of a store; what was dropped. StoreError while a run writes to it.

    A run repairs its own host when it starts; this is for hosts that no run has any more.
    """
    files = open_files(directory)
    dropped = []
    for host in files.hosts():
        release = files.open_host(host)
        try:
            dropped += recover_host(files, host)[1]
        finally:
            release()
    return dropped


def recover_host(files: StoreFiles, host: int) -> tuple[int, list[str]]:
    """Drop the sequences of a host whose shard is missing, incomplete or changed, and torn index lines.

    The caller holds the host. Returns (number of the next commit, one phrase per shard or line dropped).
    A shard whose time stamp is not the recorded one is read and its checksum compared.
    """
    shards = files.shards(host)
    dropped: list[str] = []
    expected = 0  # the number after that of every shard that is kept
    for name, status in files.indexes(host).items():
        counts: Counter[str] = Counter()
        firsts: dict[str, SequenceRecord] = {}
        damaged: set[str] = set()
        has_bad_lines = False
        for line in index_lines(files, name, status.size):
            record = _whole_record(line, host)
            if record is None:
                dropped.append(f"{name}: a torn or damaged line of {len(line)} bytes")
                has_bad_lines = True
            else:
                counts[record.shard] += 1
                firsts.setdefault(record.shard, record)
        firsts.pop("", None)  # failed sequences have no shard that could be damaged
        for shard, record in firsts.items():
            problem = _shard_problem(files, record, counts[shard], shards.get(shard))
            if problem is None:
                expected = max(expected, (shard_number(shard) or 0) + 1)
            else:
                dropped.append(f"{host_name(host)}/{shard}: {problem}")
                files.set_aside(f"{host_name(host)}/{shard}")
                damaged.add(shard)
        if has_bad_lines or damaged:
            kept = (
                line
                for line in index_lines(files, name, status.size)
                if (record := _whole_record(line, host)) is not None and record.shard not in damaged
            )
            files.replace(name, b"".join(kept))
    return _next_number(files, expected, shards), dropped


def _whole_record(line: bytes, host: int) -> SequenceRecord | None:
    try:
        return decode_line(line, host) if line.endswith(b"\n") else None
    except StoreError:
        return None


def _shard_problem(
    files: StoreFiles, record: SequenceRecord, lines: int, status: FileStatus | None
) -> str | None:
    if lines != record.shard_sequences:
        return f"{lines} of its {record.shard_sequences} index lines are there"
    if status is None:
        return "the shard is missing"
    if status.size != record.shard_bytes:
        return f"the shard has {status.size} bytes, {record.shard_bytes} were written"
    if (
        status.mtime_ns != record.shard_mtime_ns
        and _sha256(files, record, status.size) != record.shard_sha256
    ):
        return "the shard's bytes have changed"
    return None


def _sha256(files: StoreFiles, record: SequenceRecord, size: int) -> str:
    return hashlib.sha256(files.open_file(record.path).view(0, size).data).hexdigest()


def _next_number(files: StoreFiles, expected: int, shards: Mapping[str, FileStatus]) -> int:
    """The number of the next shard: never that of one which somebody may still want.

    A crash between shard and index line leaves one shard numbered `expected`: it is written anew, where we
    can be sure that nobody is just writing it. Any further ones mean that index lines were lost.
    """
    present = [number for name in shards if (number := shard_number(name)) is not None]
    left_over = [number for number in present if number >= expected]
    if not left_over or (left_over == [expected] and files.excludes_others):
        return expected
    return max(left_over) + 1
