"""What a start does first: see what a crash, a full disk or a lost file has damaged, and drop that."""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from activation_store.format import (
    SequenceRecord,
    StoreError,
    decode_line,
    encode_line,
    host_name,
    shard_number,
)
from activation_store.host_files import host_file_name
from activation_store.index import LinePlace, index_lines
from activation_store.store_files import FileStatus, StoreFiles


def recover_host(files: StoreFiles, host: int) -> tuple[int, list[str]]:
    """Drops the sequences of a host whose shard is missing, incomplete or changed, and damaged index lines.

    Nothing else is dropped: the other sequences of a shard stay. A shard whose time stamp is not the recorded
    one, or of which lines are missing, is read and its checksum compared. The shard that a crash leaves
    without an index line is removed. The caller has taken the host (`StoreFiles.open_host`).

    Returns:
        The number of the host's next commit, and one phrase for everything that was damaged.
    """
    shards = files.shards(host)
    dropped: list[str] = []
    expected = 0  # the number after that of every shard that is kept
    for name, status in files.indexes(host).items():
        claims: dict[str, Counter[_Claim]] = {}
        bad: set[int] = set()
        for number, line in enumerate(index_lines(files, name, status.size), start=1):
            record = _whole_record(line, host)
            if record is None:
                dropped.append(f"{name}: a torn or damaged line of {len(line)} bytes")
                bad.add(number)
            elif record.shard:  # failed sequences have none that could be damaged
                claims.setdefault(record.shard, Counter())[_Claim.of(record)] += 1
        kept: dict[str, Collection[_Claim]] = {}
        for shard, of_shard in claims.items():
            path = f"{host_name(host)}/{shard}"
            problem, kept[shard] = _judge(files, path, of_shard, shards.get(shard))
            if problem is not None:
                dropped.append(f"{path}: {problem}")
            if kept[shard]:
                expected = max(expected, (shard_number(shard) or 0) + 1)
        if bad or any(_needs_rewriting(of_shard, kept[shard]) for shard, of_shard in claims.items()):
            for number, line in enumerate(index_lines(files, name, status.size), start=1):
                record = _whole_record(line, host)
                if record and record.shard and _Claim.of(record) not in kept[record.shard]:
                    bad.add(number)
            drop_lines(files, name, host, bad)
    number = _next_number(files, host, expected, shards)
    if not files.indexes(host):  # it was killed before its first index line, or begins anew
        files.discard(host_file_name(host))
    return number, dropped


def drop_places(files: StoreFiles, host: int, places: Collection[LinePlace]) -> None:
    """Drops index lines of a host that the caller has taken, as `drop_lines` does."""
    for name in sorted({place.name for place in places}):
        offsets = {place.offset for place in places if place.name == name}
        numbers, offset = set(), 0
        for number, line in enumerate(index_lines(files, name, files.indexes(host)[name].size), start=1):
            if offset in offsets:
                numbers.add(number)
            offset += len(line)
        drop_lines(files, name, host, numbers)


def drop_lines(files: StoreFiles, name: str, host: int, numbers: Collection[int]) -> None:
    """Writes an index anew without the lines of these numbers, counted from 1, and those that are damaged.

    How many sequences of a shard are there is counted again. The rows of dropped ones stay in it, and nothing
    names them; a shard of which no line is left is set aside. The caller has taken the host.
    """
    kept: list[bytes] = []
    records: list[SequenceRecord] = []
    named: set[str] = set()
    for number, line in enumerate(index_lines(files, name, files.indexes(host)[name].size), start=1):
        if (record := _whole_record(line, host)) is None:
            continue
        named.add(record.shard)
        if number not in numbers:
            kept.append(line)
            records.append(record)
    counts = Counter(record.shard for record in records if record.shard)
    for place, record in enumerate(records):
        if record.shard and record.shard_sequences != counts[record.shard]:
            kept[place] = encode_line(record._replace(shard_sequences=counts[record.shard]))
    files.replace(name, b"".join(kept))
    for shard in sorted(named - counts.keys() - {""}):
        files.set_aside(f"{host_name(host)}/{shard}")


def shard_sha256(files: StoreFiles, path: str, size: int) -> str:
    """Returns the checksum of a shard of `size` bytes; raises OSError where it cannot be read."""
    data = files.open_file(path).view(0, size).data if size else b""  # nothing cannot be mapped
    return hashlib.sha256(data).hexdigest()


class _Claim(NamedTuple):
    """What an index line says of its whole shard: all lines of a shard say the same."""

    size: int
    sha256: str
    mtime_ns: int
    sequences: int

    @classmethod
    def of(cls, record: SequenceRecord) -> "_Claim":
        return cls(record.shard_bytes, record.shard_sha256, record.shard_mtime_ns, record.shard_sequences)


def _whole_record(line: bytes, host: int) -> SequenceRecord | None:
    try:
        return decode_line(line, host) if line.endswith(b"\n") else None
    except StoreError:
        return None


def _judge(
    files: StoreFiles, path: str, claims: Counter[_Claim], status: FileStatus | None
) -> tuple[str | None, Collection[_Claim]]:
    """Returns what is wrong with a shard or its lines, and the claims that are true of it."""
    if status is None:
        return "the shard is missing", ()
    if status.oddity:
        return f"the shard is {status.oddity}", ()
    of_size = [claim for claim in claims if claim.size == status.size]
    if not of_size:
        written = claims.most_common(1)[0][0].size
        return f"the shard has {status.size} bytes, {written} were written", ()
    first = of_size[0]
    there = claims.total()
    if len(claims) == 1 and there == first.sequences and first.mtime_ns == status.mtime_ns:
        return None, of_size
    sha256 = shard_sha256(files, path, status.size)
    true = [claim for claim in of_size if claim.sha256 == sha256]
    if not true:
        return "the shard's bytes have changed", ()
    if len({(claim.size, claim.sha256) for claim in claims}) > 1:
        return "its index lines name different sizes or checksums", true
    if len({claim.sequences for claim in true} | {there}) > 1:
        return f"{there} of its {max(claim.sequences for claim in true)} index lines are there", true
    return None, true


def _needs_rewriting(claims: Counter[_Claim], kept: Collection[_Claim]) -> bool:
    return any(claim not in kept or claim.sequences != claims.total() for claim in claims)


def _next_number(files: StoreFiles, host: int, expected: int, shards: Mapping[str, FileStatus]) -> int:
    """Returns the number of the next shard: no existing one, but for the one that a crash leaves.

    A crash between shard and index line leaves one shard numbered `expected`. It is removed where we are the
    host's only writer. Any further ones mean that index lines were lost, and are kept.
    """
    left_over = {number: name for name in shards if (number := shard_number(name) or 0) >= expected}
    if list(left_over) == [expected] and files.excludes_others:
        files.discard(f"{host_name(host)}/{left_over[expected]}")
        return expected
    return max(left_over, default=expected - 1) + 1
