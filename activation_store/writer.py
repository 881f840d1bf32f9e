"""Writing a store: each batch is one shard and one commit, made on a thread beside the computation.

Order of a commit: temp file, fsync, rename, fsync of the folder, then the batch's index lines in one write
and their fsync. A crash at any moment leaves at most a temp file, a shard that no index line names, or a
torn last index line; the next start clears each of them away and the batch is computed again.

Another host may have made a sequence meanwhile, as when this one was stopped for so long that it was thought
dead. So the last thing before the index lines is to look for their keys in all hosts' indexes, while no other
host commits. A host that was stopped even between these two looks again afterwards, and drops its own lines.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from activation_store.format import (
    MANIFEST,
    FinishedSequence,
    SequenceRecord,
    StoreError,
    StoreSettings,
    encode_line,
    host_name,
    sequence_key,
    shard_name,
)
from activation_store.host_files import (
    known_numerics,
    numerics_id,
    read_host_file,
    read_host_files,
    write_host_file,
)
from activation_store.index import SequenceIndex
from activation_store.interventions import keep_interventions
from activation_store.manifest import (
    MANIFEST_BYTES,
    SCHEMA_VERSION,
    decode_manifest,
    encode_manifest,
    manifest_problem,
    manifest_version,
)
from activation_store.packing import PackedBatch, pack_batch
from activation_store.recovery import drop_places, recover_host
from activation_store.remote_files import open_files
from activation_store.retry import RetryPolicy, at_once
from activation_store.store_files import COMMIT_SECONDS, StoredFile, StoreFiles, cannot, writing

BATCHES_IN_FLIGHT = 2
Batch = Sequence[FinishedSequence] | Callable[[], Sequence[FinishedSequence]]
_Made = tuple[str, FinishedSequence]  # with its key


class ActivationWriter:
    """Appends sequences to a store as one of its hosts; a context manager.

    Opening it takes the host's lock, clears away what a crash left, and drops sequences whose shard is
    missing or changed, and those that another host had committed before (`dropped` says which).

    Args:
        directory: a path or an fsspec URL; made where it is not there.
        settings: what decides the stored bytes; a store made with others is refused.
        host_index: which host folder is written to; one writer each at any time.
        provenance: JSON values kept in the manifest of a new store, for people to read.
        numerics: JSON values that decide the last bits of what this writer is given, beside the settings;
            each index line says which it was made with. None: that is not known.
        patiently: how a commit waits for a store that is away; by default its first error is the last one.
        interventions: the file of what is written into the model, where the settings name one by its sha256;
            None: it is in the store already.

    Attributes:
        committed: the keys that need no work, of all hosts, and their records; `refresh` adds what other
            hosts have committed since.
        dropped: one phrase for each shard or index line of this host that was damaged or came late.
        earlier_numerics: those of the sequences that the store had when it was opened.
        bytes_written, sequences_written, tokens_written: what this writer has committed; tokens are generated
            ones, of sequences that failed too.

    Raises:
        StoreError: the settings differ from the store's (each difference is named), its manifest has changed,
            another run writes as this host, or the directory cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: StoreSettings,
        *,
        host_index: int = 0,
        provenance: Mapping[str, Any],
        numerics: Mapping[str, Any] | None = None,
        patiently: RetryPolicy | None = None,
        interventions: bytes | None = None,
    ) -> None:
        self._settings = settings
        self._numerics = None if numerics is None else dict(numerics)
        self._numerics_id = "" if numerics is None else numerics_id(numerics)
        self._has_begun = False
        self._host = host_index
        self._patiently = patiently or at_once
        self._files = open_files(directory)
        had_manifest = _check_manifest(self._files, settings)
        self._release = self._files.open_host(host_index)
        try:
            keep_interventions(self._files, settings, host_index, interventions, had_manifest)
            if not had_manifest:
                _create_manifest(self._files, settings, host_index, provenance)
            self._next_number, self.dropped = recover_host(self._files, host_index)
            self.committed = SequenceIndex(self._files)
            if late := [line for line in self.committed.repeated if line.host == host_index]:
                drop_places(self._files, host_index, late)
                self.dropped += [
                    f"{one.name}: sequence {one.key[:8]}, which is stored already" for one in late
                ]
                self.committed.refresh()
            self.earlier_numerics = list(known_numerics(read_host_files(self._files)[0]).values())
        except OSError as error:
            self._release()
            raise cannot(f"open {self._files.location}", error) from error
        except BaseException:
            self._release()
            raise
        self.bytes_written = 0
        self.sequences_written = 0
        self.tokens_written = 0
        self._error: BaseException | None = None
        self._free = threading.Semaphore(BATCHES_IN_FLIGHT)
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(
            target=self._work, name="activation-writer", daemon=True
        )
        self._thread.start()

    def submit(self, batch: Batch) -> None:
        """Queues a batch; waits only while two others are in flight.

        Args:
            batch: the sequences, or a callable that returns them. It is run on the writer's thread, which is
                where a device-to-host copy belongs.

        Raises:
            StoreError: the writer is closed.
            Exception: what kept an earlier batch from being written; nothing is written after it.
        """
        if self._thread is None:
            raise StoreError("the activation writer is closed")
        self._free.acquire()
        try:
            self.raise_pending()
        except BaseException:
            self._free.release()
            raise
        self._batches.put(batch)

    def raise_pending(self) -> None:
        """Raises the error with which an earlier batch could not be written, if there is one; never waits."""
        if self._error is not None:
            raise self._error

    def refresh(self) -> int:
        """Learns what other hosts have committed; returns how many sequences are new."""
        return self.committed.refresh()

    def close(self) -> None:
        """Waits for what is in flight, releases the directory, and raises an earlier batch's error if any."""
        if self._thread is not None:
            self._batches.put(None)
            self._thread.join()
            self._thread = None
            self._release()
        self.raise_pending()

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
        made = [(sequence_key(self._settings, one.id) if one.key is None else one.key, one) for one in batch]
        keys = [key for key, _ in made]
        if len(set(keys)) != len(keys) or any(self._host in self.committed.hosts_of(key) for key in keys):
            raise StoreError(
                "a sequence was submitted that is already committed; skip the keys in `committed`"
            )
        path = f"{host_name(self._host)}/{shard_name(self._next_number)}"
        while made := [(key, one) for key, one in made if key not in self.committed]:
            packed = pack_batch(self._settings, [one for _, one in made])
            stored = StoredFile(0, "", 0)
            if packed.tensors:
                stored = self._patiently(lambda packed=packed: self._files.commit(path, packed.chunks()))
            if self._announce(made, packed, stored):
                return
            self._patiently(lambda: self._files.discard(path))  # others have made some of it meanwhile

    def _announce(self, made: list[_Made], packed: PackedBatch, stored: StoredFile) -> bool:
        """Writes the index lines of a shard; False, and nothing is written, if a key is there already."""
        keys = [key for key, _ in made]
        number = self._next_number
        lines = self._index_lines(made, packed, stored)
        is_alone, let_others = self._patiently(self._files.begin_commit)
        try:
            began = time.monotonic()
            self._patiently(self._reread)
            if any(key in self.committed for key in keys):
                return False
            self._begin()
            self._patiently(lambda: self._files.append_index(self._host, number, lines))
            is_alone &= (
                time.monotonic() - began < COMMIT_SECONDS
            )  # else others may have stopped waiting for us
        finally:
            let_others()
        self._next_number += 1
        self._patiently(lambda: self._reread(self._host if is_alone else None))
        late = set() if is_alone else {key for key in keys if self.committed.hosts_of(key) != {self._host}}
        if late:
            self._drop_late(late)
        self.bytes_written += stored.size if len(late) < len(keys) else 0
        self.sequences_written += sum(keys[place] not in late for place in packed.placements)
        self.tokens_written += sum(len(one.token_ids) for key, one in made if key not in late)
        return True

    def _drop_late(self, keys: set[str]) -> None:
        """Drops index lines of ours that came after another host's: nothing must be stored twice."""
        own = self.committed.lines_of(self._host, keys)
        self._patiently(lambda: drop_places(self._files, self._host, own))
        self._patiently(self._reread)

    def _begin(self) -> None:
        """Leaves this host's file before its first index line, with the numerics of what it is to write."""
        if self._has_begun:
            return
        there = self._patiently(lambda: read_host_file(self._files, self._host))
        now = dict(there or {})
        if self._numerics is not None:
            now[self._numerics_id] = self._numerics
        if now != there:
            self._patiently(lambda: write_host_file(self._files, self._host, now))
        self._has_begun = True

    def _reread(self, host: int | None = None) -> None:
        with writing(self._files.location, host_name(self._host)):
            self.committed.refresh(host)

    def _index_lines(self, made: list[_Made], packed: PackedBatch, stored: StoredFile) -> bytes:
        """Returns a batch's index lines: first failed sequences, which have no shard, then the others."""
        lines = []
        for place in [*packed.failures, *packed.placements]:
            (key, sequence), placement = made[place], packed.placements.get(place)
            lines.append(
                encode_line(
                    SequenceRecord(
                        host=self._host,
                        key=key,
                        shard=shard_name(self._next_number) if placement else "",
                        task_id=sequence.id.task_id,
                        test_index=sequence.id.test_index,
                        sample_index=sequence.id.sample_index,
                        augmentation=sequence.id.augmentation,
                        seed=self._settings.seed,
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
                        numerics=self._numerics_id,
                        strengths=tuple(map(float, sequence.id.strengths)),
                    )
                )
            )
        return b"".join(lines)


def _check_manifest(files: StoreFiles, settings: StoreSettings) -> bool:
    """Returns whether the store has a manifest; StoreError when it is one of other settings."""
    try:
        data = files.read(MANIFEST, 0, MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise cannot(f"read {files.location}/{MANIFEST}", error) from error
    where = f"{files.location}/{MANIFEST}"
    there, provenance = decode_manifest(data, where)
    if problem := manifest_problem(data):
        raise StoreError(
            f"{where} cannot be relied on: {problem}; restore it, or see what `python -m activation_store "
            f"verify {files.location} --repair` says"
        )
    check_settings(there, settings, files.location)
    if manifest_version(data) < SCHEMA_VERSION:  # or earlier programs would take our index lines for damaged
        files.replace(MANIFEST, encode_manifest(there, provenance))
    return True


def check_settings(there: StoreSettings, asked: StoreSettings, location: str) -> None:
    """Raises StoreError naming each difference between a store's settings and those that are asked for."""
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
