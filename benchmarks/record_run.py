"""Records what a terminal shows of a command, as an SVG.

    python benchmarks/record_run.py docs/images/run.svg -- python distributed_kv_cached_inference.py

The command runs in a real pseudo-terminal of 100 columns and 40 lines. The picture has all that stands there
in the end, also what has scrolled away. ``--while SECONDS`` pictures instead what stood there by then.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 100, 40
_TOKENS = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|[\r\n]|[^\x1b\r\n]+|\x1b")


class Screen:
    """Holds the lines of a terminal; knows the few sequences that the runner writes."""

    def __init__(self, columns: int = COLUMNS) -> None:
        self._columns = columns
        self.lines: list[list[tuple[str, str]]] = [[]]  # of each column its character and its style
        self._row = self._column = 0
        self._style = ""

    def feed(self, text: str) -> None:
        """Shows what a program has written."""
        for token in _TOKENS.finditer(text):
            parameter, command = token[1], token[2]
            if command == "m":
                self._style = "" if parameter in ("", "0") else f"{self._style}{token[0]}"
            elif command == "A":
                self._row = max(0, self._row - int(parameter or 1))
            elif command in ("J", "K"):
                del self.lines[self._row][self._column :]
                if command == "J":
                    del self.lines[self._row + 1 :]
            elif token[0] == "\r":
                self._column = 0
            elif token[0] == "\n":
                self._next_line()
            elif command is None:
                for character in token[0]:
                    self._write(character)

    def _write(self, character: str) -> None:
        if self._column == self._columns:
            self._next_line()
        line = self.lines[self._row]
        line[self._column : self._column + 1] = [(character, self._style)]
        self._column += 1

    def _next_line(self) -> None:
        self._row, self._column = self._row + 1, 0
        if len(self.lines) == self._row:
            self.lines.append([])

    def plain(self) -> list[str]:
        """Returns the lines without their styles."""
        return ["".join(character for character, _ in line).rstrip() for line in self.lines]

    def styled(self) -> str:
        """Returns the lines with ANSI styles, each column with its own."""
        return "\n".join(
            "".join(f"{style}{character}\x1b[0m" if style else character for character, style in line)
            for line in self.lines
        )


def run_in_terminal(
    command: Sequence[str], columns: int = COLUMNS, lines: int = LINES, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Runs a command in a terminal of its own and yields what it writes; at last raises if it failed."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    with subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, env=env, start_new_session=True
    ) as process:
        os.close(inner)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with contextlib.suppress(OSError):  # the last one has closed it
            while data := os.read(terminal, 65536):
                yield decoder.decode(data)
        os.close(terminal)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def write_svg(styled: str, title: str, path: Path) -> None:
    """Writes lines with ANSI styles as a picture of a terminal."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(Text.from_ansi(styled), soft_wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(path), title=title)


def main() -> None:
    """Records the command line's command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("svg", type=Path, help="the file to write")
    parser.add_argument("--while", dest="seconds", type=float, help="picture what stands there by then")
    parser.add_argument("--title", help="of the picture; by default the command")
    parser.add_argument("command", nargs="+", help="after --: what to run")
    options = parser.parse_args()
    screen, begun, styled = Screen(), time.monotonic(), ""
    env = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable if word == "python" else word for word in options.command]
    for text in run_in_terminal(command, env=env):
        screen.feed(text)
        if options.seconds is None or time.monotonic() - begun <= options.seconds:
            styled = screen.styled()
    write_svg(styled, options.title or shlex.join(options.command), options.svg)


if __name__ == "__main__":
    main()
