"""Finding a sequence by its key among the index lines of all hosts.

Only each line's key and its position in the file are held, about 150 bytes a sequence. Lines are parsed when
they are asked for, so that a million of them open in seconds.
"""

import re
import threading
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from activation_store.format import MANIFEST, SequenceRecord, StoreError, decode_line, line_key
from activation_store.store_files import FileStatus, StoreFiles

_KEY = re.compile("[0-9a-f]{32}")
_WINDOW = 1 << 24  # bytes of an index held at a time


def index_lines(files: StoreFiles, name: str, size: int) -> Iterator[bytes]:
    """Yields the lines in the first `size` bytes of an index, newlines included; the last one may be torn."""
    rest = b""
    for offset in range(0, size, _WINDOW):
        data = files.read(name, offset, min(size, offset + _WINDOW))
        *lines, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _is_key(key: object) -> TypeGuard[str]:
    return isinstance(key, str) and _KEY.fullmatch(key) is not None


@dataclass
class _Segment:
    """One index file and how far it has been read."""

    number: int
    host: int
    name: str
    status: FileStatus
    consumed: int = 0


class SequenceIndex(Mapping[str, SequenceRecord]):
    """A mapping from key to record of every committed sequence, failed ones included.

    Its order is that of hosts and commits. Of two lines with one key the first found counts. A half-written
    last line is not read until it is whole. One thread may read it while another calls `refresh`.
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
        self.damaged: list[str] = []  # "host-00003/index.jsonl, byte 1234" for each line that cannot be read

    def refresh(self, host: int | None = None) -> int:
        """Reads what one host, or all, appended since the last call; returns how many sequences are new.

        Raises:
            OSError: the store is away (FileNotFoundError) or cannot be read; nothing is forgotten then.
        """
        with self._lock:
            before = len(self._ordinals)
            hosts = self._files.hosts() if host is None else [host]
            found = {name: (of, status) for of in hosts for name, status in self._files.indexes(of).items()}
            if host is None and not (found and self._segments.keys() <= found.keys()):
                self._files.read(MANIFEST)  # raises FileNotFoundError where the whole store is away
            if host is None and self._was_rewritten({name: status for name, (_, status) in found.items()}):
                self._clear()
                before = 0
            for name, (of, status) in found.items():
                if name not in self._segments:
                    self._segments[name] = _Segment(len(self._segments), of, name, status)
                    self._segment_names.append(name)
                self._read_appended(self._segments[name], status.size)
            return len(self._ordinals) - before

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
            if not lines:
                return
            for line in lines:
                key = line_key(line)
                if key is None:
                    self.damaged.append(f"{segment.name}, byte {offset}")
                elif self._ordinals.setdefault(key, len(self._offset_of)) == len(self._offset_of):
                    self._segment_of.append(segment.number)
                    self._offset_of.append(offset)
                    self._length_of.append(len(line))
                offset += len(line) + 1
            segment.consumed = offset

    def __len__(self) -> int:
        return len(self._ordinals)

    def __contains__(self, key: object) -> bool:
        with self._lock:  # another thread may be reading all of it anew
            return _is_key(key) and bytes.fromhex(key) in self._ordinals

    def __iter__(self) -> Iterator[str]:
        return (key.hex() for key in list(self._ordinals))

    def __getitem__(self, key: str) -> SequenceRecord:
        with self._lock:
            if not _is_key(key):
                raise KeyError(key)
            record = self._record(self._ordinals[bytes.fromhex(key)])
        if record.key != key:
            raise StoreError(
                f"the index was written anew, by a repair or a resume: open it again to read {key}"
            )
        return record

    def at(self, number: int) -> SequenceRecord:
        """Returns the sequence with this number, from 0 in the mapping's order; IndexError without it."""
        with self._lock:
            return self._record(number)

    def _record(self, ordinal: int) -> SequenceRecord:
        segment = self._segments[self._segment_names[self._segment_of[ordinal]]]
        start = self._offset_of[ordinal]
        return decode_line(
            self._files.read(segment.name, start, start + self._length_of[ordinal]), segment.host
        )

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
            yield decode_line(window[start : start + length], segments[current].host)
