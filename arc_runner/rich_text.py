"""What rich draws, as text: the runner prints it itself, so that printing never ends a run."""

from __future__ import annotations

import io
from typing import TextIO

from rich.console import Console, RenderableType


class _Text(io.StringIO):
    """Holds text that is for a stream of some encoding, in whose characters rich then draws."""

    encoding = ""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self.encoding = encoding


def make_console(stream: TextIO, width: int) -> Console:
    """Returns a console that draws for a terminal of ``width`` columns, in the characters that it has.

    The colours are those of the environment: none with ``NO_COLOR``.
    """
    file = _Text(stream.encoding or "utf-8")
    return Console(file=file, width=width, force_terminal=True, highlight=False, markup=False, emoji=False)


def rendered(console: Console, what: RenderableType) -> str:
    """Returns what rich draws, in lines, as the terminal gets it; nothing is printed."""
    with console.capture() as captured:
        console.print(what)
    return captured.get()
