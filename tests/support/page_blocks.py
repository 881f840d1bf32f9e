"""The code blocks of a page of Markdown, and a process that runs them one after the other.

python page_blocks.py PAGE.md        runs the page's blocks in the current folder
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(r"^(?:<!-- (?P<name>[\w-]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block: its name in a comment before it, if it has one, and the number of its first line."""

    name: str | None
    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """Returns the blocks of code, in order; those without a language show output or a drawing."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        found.append(Block(match["name"], match["language"], match["text"], line + 1))
    return [block for block in found if block.language]


def run_blocks(page: Path, stand_ins: dict[str, str]) -> None:
    """Runs the blocks that have no name: Python in one namespace, bash as a process of its own.

    ``stand_ins`` are words of the page and what stands in for them here.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.name is not None:
            continue
        text = block.text
        for word, stand_in in stand_ins.items():
            text = text.replace(word, stand_in)
        print(f"--- {page.name}, line {block.line}", flush=True)
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + text, str(page), "exec")
            exec(code, names)
        elif block.language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True, stdin=subprocess.DEVNULL)
        else:
            raise ValueError(f"{page.name}, line {block.line}: nothing runs {block.language}")


if __name__ == "__main__":
    run_blocks(Path(sys.argv[1]), json.loads(sys.argv[2]))
