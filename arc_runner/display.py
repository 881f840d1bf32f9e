"""What a run shows while it works: what it does now and for how long, then a bar; off a terminal, few lines.

One thread draws. The work itself only says what it begins and ends (``waiting.Waiting``) and counts
(``progress.Progress``).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from arc_runner.console import say
from arc_runner.live_lines import LIVE, Row, is_terminal
from arc_runner.progress import Activity, Progress

_DRAWN_SECONDS = 0.25
_DRAWN_AFTER = 0.5  # what is over sooner is not worth a line that flickers
# Without a terminal a line is printed when so many seconds have passed, then every half minute.
_SAID_AFTER = (2.0, 10.0, 30.0)
_QUIET_SECONDS = 30.0
_LOOKED_SECONDS = 1.0


class Display:
    """Shows what goes on in this process, as long as anything does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self._activities: list[Activity] = []
        self._progress: Progress | None = None
        self._progress_said = 0.0

    def begin(self, one: Activity | Progress) -> None:
        """Shows an activity, or the run that generates, from now on."""
        with self._lock:
            if isinstance(one, Progress):
                self._progress, self._progress_said = one, time.monotonic()
            else:
                self._activities.append(one)
            if self._thread is None:
                self._thread = threading.Thread(target=self._live, name="display", daemon=True)
                self._thread.start()

    def end(self, one: Activity | Progress) -> None:
        """Shows it no more, at once; does nothing if it is not shown."""
        with self._lock:
            if one is self._progress:
                self._progress = None
            elif one in self._activities:
                self._activities.remove(one)
            else:
                return
            last = None if self._activities or self._progress else self._thread
        self._changed.set()
        if last is not None:
            last.join(1.0)  # no longer: nobody may be reading what it prints

    def _live(self) -> None:
        while True:
            self._changed.clear()
            with self._lock:
                activities, progress = list(self._activities), self._progress
                if not activities and progress is None:
                    LIVE.draw(())
                    self._thread = None
                    return
            if is_terminal(sys.stderr):
                LIVE.draw(_rows(activities, progress))
                pause = _DRAWN_SECONDS
            else:
                self._say(activities, progress)
                due = [one.begun + _said_after(one.lines_said) - time.monotonic() for one in activities]
                pause = max(0.0, min([*due, _LOOKED_SECONDS]))
            self._changed.wait(pause)

    def _say(self, activities: Sequence[Activity], progress: Progress | None) -> None:
        """Prints the lines that are due; of the progress only while nothing else goes on."""
        now = time.monotonic()
        for one in activities:
            if now >= one.begun + _said_after(one.lines_said):
                one.lines_said += 1
                say(f"{one.what()}, {now - one.begun:.0f} s so far")
        if progress is not None and not activities and now - self._progress_said >= _QUIET_SECONDS:
            self._progress_said = now
            say(", ".join([f"{progress.done} of {progress.total} sequences", *progress.facts()]))
            for one in progress.workers:
                say(f"  {one}")


DISPLAY = Display()


def _has_other_bars() -> bool:
    """Tells whether a library draws bars there: huggingface_hub's, of a download, stand in the same place."""
    tqdm = sys.modules.get("tqdm.std")
    return tqdm is not None and len(tqdm.tqdm._instances) > 0


def _rows(activities: Sequence[Activity], progress: Progress | None) -> list[Row]:
    shown = [one for one in activities if time.monotonic() - one.begun >= _DRAWN_AFTER]
    if (not shown and progress is None) or _has_other_bars():
        return []
    from arc_runner.screen import draw_rows  # rich takes time to import, which only who waits has

    return draw_rows(shown, progress)


def _said_after(lines: int) -> float:
    """Returns how many seconds after its beginning an activity's next line is due."""
    known = len(_SAID_AFTER)
    return _SAID_AFTER[lines] if lines < known else (lines - known + 2) * _QUIET_SECONDS
