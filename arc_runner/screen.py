"""The rows that a terminal shows while a run works: what goes on, and the bar.

Imports rich; only the thread that draws imports this.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from arc_runner.console import shown_on
from arc_runner.live_lines import Row, size_of
from arc_runner.progress import Activity, Progress, WorkerLine, shown_seconds
from arc_runner.rich_text import make_console, rendered

_STYLES = re.compile(r"\x1b\[[0-9;]*m")
_SILENT_SECONDS = 10.0  # after which a worker that is not heard of is shown in red
_NARROW = 60  # columns; below it the bar stands in a line of its own


def draw_rows(activities: Sequence[Activity], progress: Progress | None) -> list[Row]:
    """Returns the rows for stderr's terminal as it is now: as many as fit, none wider than it."""
    columns, lines = size_of(sys.stderr)
    # In the last column some terminals begin a new line.
    console = make_console(sys.stderr, max(1, columns - 1))
    parts: list[RenderableType] = [_activity(one) for one in activities]
    if progress is not None and progress.generating.seconds:
        parts += _progress(progress, console)
    drawn = rendered(console, Group(*parts)).splitlines() if parts else []
    return [Row(line, cell_len(_STYLES.sub("", line))) for line in drawn[: max(1, lines - 1)]]


def _activity(one: Activity) -> Text:
    what = Text(shown_on(sys.stderr, one.what()))
    return what.append(f"  {shown_seconds(time.monotonic() - one.begun)}", "bold cyan")


def _progress(progress: Progress, console: Console) -> list[RenderableType]:
    bar = ProgressBar(total=max(progress.total, 1), completed=progress.done, complete_style="cyan")
    done = Text(f"{progress.done} of {progress.total} sequences")
    line = Table.grid(padding=(0, 1), expand=True)
    if console.width < _NARROW:
        line.add_column(ratio=1)
        line.add_row(bar)
        line.add_row(done)
    else:
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(Text("generating", "bold"), bar, done)
    between = ", " if console.options.ascii_only else " \N{MIDDLE DOT} "
    table = [_workers(progress.workers)] if progress.workers else []
    return [line, Text(between.join(progress.facts())), *table]


def _workers(workers: Sequence[WorkerLine]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold", show_edge=False)
    for name in ("worker", "place", ""):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "slots", "heard"):
        table.add_column(name, justify="right", no_wrap=True)
    now = time.monotonic()
    for one in workers:
        heard = now - one.heard
        style = "red" if heard >= _SILENT_SECONDS else None
        table.add_row(
            str(one.index),
            shown_on(sys.stderr, one.place),
            one.phase,
            f"{one.tokens_per_second:.1f}",
            f"{one.slots_in_use} of {one.slots}",
            Text(f"{shown_seconds(heard)} ago", style or ""),
        )
    return table
