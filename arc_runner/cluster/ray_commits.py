"""Learns which sequences the store has, on a thread of its own: a store that is away holds nobody up."""

from __future__ import annotations

import threading
from collections.abc import Collection

from activation_store import ActivationWriter, RetryPolicy

_EVERY_SECONDS = 10.0  # where nobody asks


class Commits:
    """Reads the store's index again and again; a context manager around that time."""

    def __init__(self, writer: ActivationWriter, patiently: RetryPolicy) -> None:
        self._writer, self._patiently = writer, patiently
        self._asked, self._over = threading.Event(), False
        self._wanted: Collection[str] = ()
        self._lock = threading.Lock()
        self._found: set[str] = set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="commits", daemon=True)

    def __enter__(self) -> Commits:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._asked.set()
        self._patiently.give_up()
        self._thread.join(5.0)  # no longer: the store may be away

    def ask(self, keys: Collection[str]) -> None:
        """Lets the index be read now, for some keys; returns at once."""
        self._wanted = keys
        self._asked.set()

    def take(self) -> set[str]:
        """Returns the keys asked for that the store has, each once or more often.

        Raises:
            StoreError: the index cannot be read.
        """
        with self._lock:
            found, self._found = self._found, set()
        if self._error is not None:
            raise self._error
        return found

    def _read(self) -> None:
        try:
            while True:
                self._asked.wait(_EVERY_SECONDS)
                self._asked.clear()
                if self._over:
                    return
                self._patiently(self._writer.refresh)
                found = {key for key in self._wanted if key in self._writer.committed}
                with self._lock:
                    self._found |= found
        except BaseException as error:  # told by whoever takes next
            self._error = error
