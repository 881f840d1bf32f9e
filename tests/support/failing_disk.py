"""A disk that fails at the n-th thing that is done to it, and counts what is done."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OPERATIONS = ("write", "fsync", "open", "replace", "rename", "link", "mkdir")


class FailingDisk:
    """Counts what would change a disk. Number `first` fails, and so do the ones after it if `lasting`."""

    def __init__(self, first: int | None = None, code: int = errno.ENOSPC, lasting: bool = False) -> None:
        self.count = 0
        self._first, self._code, self._lasting = first, code, lasting

    def _wrap(self, real: Callable[..., Any], is_open: bool) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if is_open and not (arguments[1] if len(arguments) > 1 else 0) & _WRITES:
                return real(*arguments, **options)
            number, self.count = self.count, self.count + 1
            if self._first is not None and (
                number == self._first or (self._lasting and number > self._first)
            ):
                raise OSError(self._code, os.strerror(self._code))
            return real(*arguments, **options)

        return operation

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """Puts the disk in the place of the real one."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _OPERATIONS:
                patch.setattr(os, name, self._wrap(getattr(os, name), name == "open"))
            yield


def places(action: Callable[[], Any]) -> int:
    """Returns at how many places an action could fail, by doing it once."""
    disk = FailingDisk()
    with disk.mounted():
        action()
    return disk.count


def faults(count: int) -> Iterator[FailingDisk]:
    """Yields two disks for each of `count` places: one that stays full, one that fails once."""
    for first in range(count):
        yield FailingDisk(first, errno.ENOSPC, lasting=True)
        yield FailingDisk(first, errno.EIO)
