"""Finding a sequence by its key among the index lines of all hosts.

Only each line's key and its position in the file are held, about 150 bytes a sequence. Lines are parsed when
they are asked for, so that a million of them open in seconds.
"""

import threading
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from activation_store.format import MANIFEST, SequenceRecord, StoreError, decode_line, line_key
from activation_store.store_files import FileStatus, StoreFiles

_WINDOW = 1 << 24  # bytes of an index held at a time


def index_lines(files: StoreFiles, name: str, size: int) -> Iterator[bytes]:
    """Yields the lines in the first `size` bytes of an index, newlines included; the last one may be torn.

    Where no line ends for 16 MiB it is taken for torn there, and nothing after it is read.
    """
    rest = b""
    for offset in range(0, size, _WINDOW):
        data = files.read(name, offset, min(size, offset + _WINDOW))
        *lines, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(rest) >= _WINDOW:
            break
    if rest:
        yield rest


@dataclass
class _Segment:
    """One index file and how far it has been read."""

    number: int
    host: int
    name: str
    status: FileStatus
    consumed: int = 0


class LinePlace(NamedTuple):
    """Where a line of a key lies."""

    key: str
    host: int
    name: str  # of the index file
    offset: int  # in bytes


class SequenceIndex(Mapping[str, SequenceRecord]):
    """A mapping from key to record of every committed sequence, failed ones included.

    Its order is that of hosts and commits. Of two lines with one key the first in this order counts, whenever
    it was found; the others are in `repeated`. A half-written last line is not read until it is whole. One
    thread may read it while another calls `refresh`.
    """

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._clear()
        self.refresh()

    def _clear(self) -> None:
        self._ordinals: dict[bytes, int] = {}
        self._segments: dict[str, _Segment] = {}
        self._segment_names: list[str] = []
        self._segment_of = array("I")
        self._offset_of = array("Q")
        self._length_of = array("I")
        self.repeated: list[LinePlace] = []
        self._is_disordered = False  # of two lines with one key the later one was found first
        self.damaged: list[str] = []  # "host-00003/index.jsonl, byte 1234" for each line that cannot be read

    def refresh(self, host: int | None = None) -> int:
        """Reads what one host, or all, appended since the last call; returns how many sequences are new.

        Raises:
            OSError: the store is away (FileNotFoundError) or cannot be read; nothing is forgotten then.
        """
        with self._lock:
            before = len(self._ordinals)
            found = self._listing(self._files.hosts() if host is None else [host])
            if host is None and not (found and self._segments.keys() <= found.keys()):
                self._files.read(MANIFEST, 0, 1)  # raises FileNotFoundError where the whole store is away
            if host is None and self._was_rewritten({name: status for name, (_, status) in found.items()}):
                self._clear()
                before = 0
            self._read(found)
            if self._is_disordered:
                self._clear()
                self._read(self._listing(self._files.hosts()))
            return len(self._ordinals) - before

    def hosts_of(self, key: str) -> set[int]:
        """Returns the hosts that have a line of this key."""
        with self._lock:
            ordinal = self._ordinals.get(bytes.fromhex(key))
            hosts = {line.host for line in self.repeated if line.key == key}
            return hosts if ordinal is None else {self._segment(ordinal).host, *hosts}

    def lines_of(self, host: int, keys: Collection[str]) -> list[LinePlace]:
        """Returns the lines that a host has of some keys."""
        with self._lock:
            found = [line for line in self.repeated if line.host == host and line.key in keys]
            for key in keys:
                ordinal = self._ordinals.get(bytes.fromhex(key))
                if ordinal is not None and (segment := self._segment(ordinal)).host == host:
                    found.append(LinePlace(key, host, segment.name, self._offset_of[ordinal]))
            return found

    def _listing(self, hosts: Iterable[int]) -> dict[str, tuple[int, FileStatus]]:
        return {name: (host, status) for host in hosts for name, status in self._files.indexes(host).items()}

    def _segment(self, ordinal: int) -> _Segment:
        return self._segments[self._segment_names[self._segment_of[ordinal]]]

    def _read(self, found: Mapping[str, tuple[int, FileStatus]]) -> None:
        for name, (host, status) in found.items():
            if name not in self._segments:
                self._segments[name] = _Segment(len(self._segments), host, name, status)
                self._segment_names.append(name)
            self._read_appended(self._segments[name], status.size)

    def _was_rewritten(self, found: Mapping[str, FileStatus]) -> bool:
        """Returns whether a resume has dropped damaged sequences and written an index anew."""
        return any(
            name not in found
            or found[name].inode != segment.status.inode
            or found[name].size < segment.consumed
            for name, segment in self._segments.items()
        )

    def _read_appended(self, segment: _Segment, size: int) -> None:
        while segment.consumed < size:
            offset = segment.consumed
            data = self._files.read(segment.name, offset, min(size, offset + _WINDOW))
            lines = data.split(b"\n")
            lines.pop()  # what follows the last newline is not whole yet
            if not lines and len(data) == _WINDOW:
                self.damaged.append(f"{segment.name}, byte {offset}")
                segment.consumed = size  # no line is that long: what is there is no index
            if not lines:
                return
            for line in lines:
                key = line_key(line)
                if key is None:
                    self.damaged.append(f"{segment.name}, byte {offset}")
                elif (there := self._ordinals.setdefault(key, len(self._offset_of))) == len(self._offset_of):
                    self._segment_of.append(segment.number)
                    self._offset_of.append(offset)
                    self._length_of.append(len(line))
                else:
                    self.repeated.append(LinePlace(key.hex(), segment.host, segment.name, offset))
                    self._is_disordered |= self._segment(there).host > segment.host
                offset += len(line) + 1
            segment.consumed = offset

    def __len__(self) -> int:
        return len(self._ordinals)

    def __contains__(self, key: object) -> bool:
        with self._lock:  # another thread may be reading all of it anew
            return _key_bytes(key) in self._ordinals

    def __iter__(self) -> Iterator[str]:
        return (key.hex() for key in list(self._ordinals))

    def __getitem__(self, key: str) -> SequenceRecord:
        with self._lock:
            ordinal = self._ordinals.get(_key_bytes(key), -1)
            if ordinal < 0:
                raise KeyError(key)
            segment = self._segment(ordinal)
            start = self._offset_of[ordinal]
            line = self._files.read(segment.name, start, start + self._length_of[ordinal])
        return _record(line, segment, start)

    def records(self) -> Iterator[SequenceRecord]:
        """Yields all records in order, reading index files in large pieces: much quicker than key by key."""
        with self._lock:  # the arrays are only ever appended to, or replaced as a whole
            segments = [self._segments[name] for name in self._segment_names]
            segment_of, offset_of, length_of = self._segment_of, self._offset_of, self._length_of
            count = len(offset_of)
        window, window_start, current = b"", 0, -1
        for ordinal in range(count):
            offset, length = offset_of[ordinal], length_of[ordinal]
            start = offset - window_start
            if segment_of[ordinal] != current or start + length > len(window):
                current, window_start, start = segment_of[ordinal], offset, 0
                window = self._files.read(segments[current].name, offset, offset + _WINDOW)
            yield _record(window[start : start + length], segments[current], offset)


def _record(line: bytes, segment: _Segment, offset: int) -> SequenceRecord:
    try:
        return decode_line(line, segment.host)
    except StoreError as error:
        raise StoreError(f"{segment.name} is damaged at byte {offset}: {error}") from error


def _key_bytes(key: object) -> bytes:
    """Returns a key's 16 bytes; b"", which is no sequence's, for what is no key."""
    try:
        return bytes.fromhex(key) if isinstance(key, str) else b""
    except ValueError:
        return b""
