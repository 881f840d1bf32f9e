"""Which sequences a store has: all of them in stored order, one by key or number, or those of some kind."""

import logging
import operator
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, SupportsIndex, cast, overload

import numpy as np

from activation_store.format import (
    DTYPES,
    MANIFEST,
    ROW_BYTES,
    SequenceRecord,
    StoreError,
)
from activation_store.hook_labels import hook_label, hooks_text
from activation_store.index import SequenceIndex
from activation_store.interventions import read_interventions
from activation_store.local_files import LocalFiles
from activation_store.manifest import MANIFEST_BYTES, decode_manifest, manifest_problem
from activation_store.open_shards import OpenShards
from activation_store.outcomes import read_outcomes, truth
from activation_store.remote_files import open_files
from activation_store.shard import Shard
from activation_store.store_files import FileStatus
from qwen2_core.messages import did_you_mean

_logger = logging.getLogger(__name__)


class SequenceCatalogue:
    """The sequences of a store: a sequence of their records, failed ones included, in stored order."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)
        self.files = open_files(directory)
        try:
            manifest = self.files.read(MANIFEST, 0, MANIFEST_BYTES + 1)
        except FileNotFoundError as error:
            hint = did_you_mean(self.directory)
            raise StoreError(
                f"{self.files.location} is not an activation store: it has no {MANIFEST}{hint}"
            ) from error
        except OSError as error:
            raise StoreError(f"cannot read {self.files.location}: {error.strerror or error}") from error
        self.settings, self.provenance = decode_manifest(manifest, f"{self.files.location}/{MANIFEST}")
        if problem := manifest_problem(manifest):  # what is stored can still be read, and verified
            _logger.warning("%s/%s cannot be relied on: %s", self.files.location, MANIFEST, problem)
        labels = map(hook_label, self.settings.hook_names)
        self.layers = tuple(layer for layer in labels if isinstance(layer, int))  # of hook_resid_post
        self.index = SequenceIndex(self.files)
        self._shards = OpenShards(self.files, self.settings)
        self._listed: dict[int, dict[str, FileStatus]] = {}  # the shards of hosts
        self._checksums: dict[str, str] = {}  # of shards, by path, as the index has them

    def __reduce__(self) -> tuple[Any, ...]:
        # Memory maps and open files do not travel. The reader may be in another directory.
        if isinstance(self.files, LocalFiles) and "://" not in self.directory:
            return type(self), (str(self.files.root),)
        return type(self), (self.directory,)

    def __repr__(self) -> str:
        """Says in a line what there is."""
        width = "" if self.settings.widths else f" of width {self.settings.hidden_size}"
        return (
            f"{type(self).__name__}({self.files.location!r}: {len(self)} sequences, "
            f"{hooks_text(self.settings.hook_names)}{width}, stored as {self.settings.dtype})"
        )

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the stored rows."""
        return DTYPES[self.settings.dtype]

    def __len__(self) -> int:
        """Returns how many sequences there are, failed ones included."""
        return len(self.index)

    def __iter__(self) -> Iterator[SequenceRecord]:
        return map(self._noted, self.index.records())

    def __contains__(self, item: object) -> bool:
        """Returns whether a key, or just this record, is of this store."""
        if isinstance(item, SequenceRecord):
            return item == self.index.get(item.key)
        return item in self.index

    @overload
    def __getitem__(self, which: str | SupportsIndex) -> SequenceRecord: ...

    @overload
    def __getitem__(self, which: slice) -> list[SequenceRecord]: ...

    def __getitem__(self, which: str | SupportsIndex | slice) -> SequenceRecord | list[SequenceRecord]:
        """Returns the record of a key, or of a number in stored order, or those of a slice of numbers.

        Raises:
            KeyError: no sequence has this key.
            IndexError: there are fewer sequences.
        """
        if isinstance(which, slice):
            return [self._noted(self.index.at(number)) for number in range(len(self))[which]]
        if isinstance(which, str | bool) or not hasattr(which, "__index__"):
            if which in self.index:
                return self._noted(self.index[cast(str, which)])
            raise KeyError(
                f"no sequence of {self.files.location} has the key {which!r}; those of a task are "
                'store.sequences(task_ids=["..."])'
            )
        number, count = operator.index(which), len(self)
        if not -count <= number < count:
            raise IndexError(
                f"{self.files.location} has {count} sequences, counted from 0: there is no {number}"
            )
        return self._noted(self.index.at(number % count))

    def tasks(self) -> list[str]:
        """Returns the ids of the tasks that have sequences, failed ones included, in stored order."""
        return list(dict.fromkeys(record.task_id for record in self))

    def sequences(
        self,
        *,
        task_ids: Collection[str] | str | None = None,
        augmentations: Collection[str] | str | None = None,
        solved: bool | None = None,
        where: Callable[[SequenceRecord], bool] | None = None,
        failed: bool = False,
    ) -> Iterator[SequenceRecord]:
        """Yields the sequences that pass every filter given, in stored order.

        Args:
            task_ids: keeps these tasks, or this one.
            augmentations: keeps these augmentations, or this one.
            solved: keeps those known, from `write_outcomes`, to be right (True) or wrong (False).
            where: keeps those for which it returns True.
            failed: yields only the sequences that failed, which have no rows, instead of the others.
        """
        failed = truth(failed, "failed")
        solved = None if solved is None else truth(solved, "solved")
        outcomes = self.outcomes() if solved is not None else {}
        tasks, kept_augmentations = _names(task_ids, "task_ids"), _names(augmentations, "augmentations")
        if where is not None and not callable(where):
            raise StoreError(f"where must be a function of a record, not {where!r:.100}")
        for record in self:
            if (
                record.failed == failed
                and (tasks is None or record.task_id in tasks)
                and (kept_augmentations is None or record.augmentation in kept_augmentations)
                and (solved is None or outcomes.get(record.key) is solved)
                and (where is None or where(record))
            ):
                yield record

    def outcomes(self) -> dict[str, bool]:
        """Returns whether each sequence solved its puzzle, by key, as far as `write_outcomes` was told.

        Raises:
            StoreError: the file of the outcomes is damaged.
        """
        return read_outcomes(self.files)

    def interventions(self) -> bytes | None:
        """Returns the file of what was written into the model, None where nothing was.

        Raises:
            StoreError: it is missing, or not the one that the manifest names.
        """
        return read_interventions(self.files, self.settings) if self.settings.interventions else None

    def own(self, record: SequenceRecord) -> SequenceRecord:
        """Returns the record; raises StoreError unless it is one of this store.

        Of another store's record the shard would hold other rows. The records that this store gave are known
        by their shard's checksum; others are compared with the index.
        """
        if not isinstance(record, SequenceRecord):
            raise StoreError(f"{record!r} is no record: give store[0] or one that store.sequences() yields")
        if record.key not in self.index or self._checksums.get(record.path) != record.shard_sha256:
            if record not in self:
                raise StoreError(
                    f"{record.label} is no record of {self.files.location}, or was replaced there"
                )
            return self._noted(record)
        return record

    def _noted(self, record: SequenceRecord) -> SequenceRecord:
        """Notes which file the index has at the record's path; another one may have been there before."""
        path = record.path
        if self._checksums.get(path) != record.shard_sha256:
            self._checksums[path] = record.shard_sha256
            self._shards.forget(path)
        return record

    def open_shard(self, path: str, size: int) -> Shard:
        """Opens the shard at `SequenceRecord.path`, of `shard_bytes` bytes; the last few stay open."""
        return self._shards.get(path, size)

    def require_shard(self, record: SequenceRecord) -> None:
        """Raises StoreError unless a record's shard is there, as long as written, with room for its rows.

        The shards of a host are listed once, and none is opened.
        """
        listed = self._listed.get(record.host, {})
        if record.shard not in listed:
            listed = self._listed[record.host] = self.files.shards(record.host)
        where = f"{self.files.location}/{record.path}"
        if record.shard not in listed:
            raise StoreError(f"{where} is missing")
        size, oddity = listed[record.shard].size, listed[record.shard].oddity
        if oddity or size != record.shard_bytes:
            raise StoreError(
                f"{where} is {oddity or f'{size} bytes long'}, {record.shard_bytes} were written"
            )
        row_bytes = ROW_BYTES + sum(self.settings.hook_widths.values()) * self.dtype.itemsize
        if (record.row_start + record.n_rows) * row_bytes > size:
            raise StoreError(f"{record.label}: its rows end outside {where}")


def _names(names: Collection[str] | str | None, argument: str) -> frozenset[str] | None:
    """Returns a set of names; one that stands alone is not taken for its letters."""
    if names is None:
        return None
    try:
        found = frozenset([names] if isinstance(names, str) else names)
    except TypeError:
        found = None
    if found is None or not all(isinstance(name, str) for name in found):
        raise StoreError(f"{argument} must be a text or several, not {names!r:.100}")
    return found
