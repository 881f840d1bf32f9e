"""What a start does first: see what a crash, a full disk or a lost file has damaged, and drop that."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping

from activation_store.format import SequenceRecord, StoreError, decode_line, host_name, shard_number
from activation_store.index import index_lines
from activation_store.remote_files import open_files
from activation_store.store_files import FileStatus, StoreFiles


def repair_store(directory: str | os.PathLike[str]) -> list[str]:
    """Drops the damaged sequences of every host of a store, so that a run makes them again.

    A run repairs its own host when it starts; this is for hosts that no run writes to any more.

    Returns:
        One phrase for each shard or index line that was dropped.

    Raises:
        StoreError: a run writes to the store, or it cannot be used.
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
    """Drops the sequences of a host whose shard is missing, incomplete or changed, and torn index lines.

    A shard whose time stamp is not the recorded one is read and its checksum compared. The caller has taken
    the host (`StoreFiles.open_host`).

    Returns:
        The number of the host's next commit, and one phrase for each shard or line that was dropped.
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
    if status.oddity:
        return f"the shard is {status.oddity}"
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
    """Returns the number of the next shard: no existing one, but for the one that a crash leaves.

    A crash between shard and index line leaves one shard numbered `expected`. It is overwritten where we are
    the host's only writer. Any further ones mean that index lines were lost, and are kept.
    """
    present = [number for name in shards if (number := shard_number(name)) is not None]
    left_over = [number for number in present if number >= expected]
    if not left_over or (left_over == [expected] and files.excludes_others):
        return expected
    return max(left_over) + 1
