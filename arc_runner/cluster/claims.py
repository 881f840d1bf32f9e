"""Leases on units of work: several processes share the work, and those of a dead process are taken over.

A lease is a file that only one process can create. It names its owner but no time. Instead each process
writes one heartbeat file anew every few seconds, so that keeping a lease costs nothing. A process whose
heartbeat is older than ``LEASE_SECONDS`` by the file system's clock counts as dead, and so does one that has
been started again. Its lease is taken over by creating the next generation of the lease, which again only one
process can. No process ever removes a file of another one.

Leases save work, they do not protect data: a process that was only slow finds its sequences committed by
another one, and leaves them out.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from types import TracebackType
from typing import NamedTuple, Self

from activation_store import StoreWriteError
from arc_runner.cluster.shared_files import SharedFiles

HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 60.0
STALL_SECONDS = 1800.0  # without progress for so long, no heartbeat: a hung device does not stop its thread
_LIFE = "process-"


class Owner(NamedTuple):
    """Identifies one start of one process."""

    process: int
    token: str  # a new one at every start

    def encode(self) -> bytes:
        return f"{self.process} {self.token}".encode()

    @classmethod
    def decode(cls, data: bytes) -> Owner | None:
        """Returns the owner written in a file; None if the file is not whole yet."""
        index, _, token = data.decode().partition(" ")
        return cls(int(index), token) if token else None


class Claims:
    """Holds this process's leases in a store. Within its context it writes the heartbeat."""

    def __init__(self, files: SharedFiles, index: int) -> None:
        """Writes the first heartbeat of the process ``index``, of which there must be only one."""
        self.files = files
        self._ending = threading.Event()
        self._me = Owner(index, uuid.uuid4().hex)
        self.progress()
        self._held: dict[str, str] = {}  # the lease's file by what is claimed
        self._beat()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives up what is still held: without a heartbeat a lease is free."""
        self._ending.set()
        self.files.patiently.give_up()
        self._thread.join()
        with contextlib.suppress(StoreWriteError):  # then it expires
            self.files.remove(_life_name(self._me.process))

    def progress(self) -> None:
        """Notes progress of the device; after ``STALL_SECONDS`` without any the heartbeat stops."""
        self._got_on = time.monotonic()

    def sees_others(self) -> bool:
        """Tells whether there is a heartbeat of another process, which has not ended in good order since."""
        mine = _life_name(self._me.process)
        return any(name.startswith(_LIFE) and name != mine for name in self.files.names())

    def acquire(self, name: str) -> bool:
        """Claims ``name``; False if a live process holds it, this one included."""
        self.progress()
        if name in self._held:
            return False
        generation = 0
        while not self.files.create(lease := f"{name}.{generation}", self._me.encode()):
            found = self.files.read(lease)
            if found is None:  # it was released at this moment
                continue
            if Owner.decode(found[0]) == self._me:  # we made it, though the file system reported a failure
                break
            if self._holder_lives(*found):
                return False
            generation += 1
        self._held[name] = lease
        return True

    def release(self, name: str) -> None:
        """Releases ``name``, which is done: a process that claims it later has to look whether it is."""
        self.files.remove(self._held[name])
        del self._held[name]

    def holder(self, name: str) -> str | None:
        """Returns the index of the live process that holds ``name``, "?" if not known yet, or None."""
        self.progress()
        generation = 0
        while (found := self.files.read(f"{name}.{generation}")) is not None:
            if self._holder_lives(*found):
                owner = Owner.decode(found[0])
                return "?" if owner is None else str(owner.process)
            generation += 1
        return None

    def _holder_lives(self, data: bytes, written: float) -> bool:
        owner = Owner.decode(data)
        if owner is None:  # being made, or left so by a crash
            return self._is_fresh(written)
        life = self.files.read(_life_name(owner.process))
        if life is None:
            return False
        return self._is_fresh(life[1]) and Owner.decode(life[0]) == owner

    def _is_fresh(self, written: float) -> bool:
        """Tells whether a heartbeat written at ``written``, by the file system's clock, is young enough.

        No machine's clock is compared with another: the file system has dated our own heartbeat, and its
        clock has gone on since then as ours has.
        """
        there, here = self._beaten
        return there + time.monotonic() - here - written < LEASE_SECONDS

    def _beat(self) -> None:
        written = self.files.write(_life_name(self._me.process), self._me.encode())
        self._beaten = written, time.monotonic()

    def _live(self) -> None:
        while not self._ending.wait(HEARTBEAT_SECONDS):
            if time.monotonic() - self._got_on >= STALL_SECONDS:
                continue
            try:
                self._beat()
            except StoreWriteError:  # the working thread meets the same error and reports it
                continue


def _life_name(index: int) -> str:
    return f"{_LIFE}{index:05d}"
