"""Which programs are being compiled, and how long each takes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from arc_runner.progress import shown_seconds


class Compiling:
    """Watches programs that are compiled side by side; calling it says what goes on, for ``Waiting``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def program(self, name: str) -> Iterator[None]:
        """Notes that the program is compiled inside."""
        begun = time.monotonic()
        with self._lock:
            self._begun[name] = begun
        try:
            yield
        finally:
            with self._lock:
                del self._begun[name]
                self._seconds[name] = time.monotonic() - begun

    def __call__(self) -> str:
        now = time.monotonic()
        with self._lock:
            running = [f"{name} {shown_seconds(now - begun)}" for name, begun in self._begun.items()]
            done = list(self._seconds)
        after = f"; done: {', '.join(done)}" if done else ""
        return f"compiling {', '.join(running)}{after}" if running else f"compiled {', '.join(done)}"

    def summary(self) -> str:
        """Returns the programs with their seconds, the slowest first; they were compiled side by side."""
        slowest_first = sorted(self._seconds.items(), key=lambda one: -one[1])
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in slowest_first)
