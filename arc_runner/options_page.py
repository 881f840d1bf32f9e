"""The tables of flags in docs/runner.md, from the parser that answers --help.

    python -m arc_runner.options_page docs/runner.md

A table stands between ``<!-- flags: GROUP -->`` and ``<!-- end of flags -->``; what is there is replaced.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from arc_runner.command_line import make_parser

_TABLE = re.compile(r"(?<=<!-- flags: )([^>]*)( -->\n).*?(?=<!-- end of flags -->)", re.DOTALL)
_DEFAULT = re.compile(r"(.*?) \(default: (.*)\)", re.DOTALL)


def fill(page: str) -> str:
    """Returns a page with its tables as they should be.

    Raises:
        KeyError: the page names a group that there is not.
    """
    # The parser has no public list of its groups.
    groups = {str(group.title): group._group_actions for group in make_parser()._action_groups}
    return _TABLE.sub(lambda found: f"{found[1]}{found[2]}{_table(groups[found[1]])}", page)


def _table(flags: list[argparse.Action]) -> str:
    rows = ["| flag | meaning | default |", "|---|---|---|", *map(_row, flags)]
    return "".join(f"{row}\n" for row in rows)


def _row(flag: argparse.Action) -> str:
    text = (flag.help or "").replace("%%", "%")
    meaning, default = found.groups() if (found := _DEFAULT.fullmatch(text)) else (text, "")
    if flag.choices:
        values = "{" + ",".join(map(str, flag.choices)) + "}"
    elif flag.nargs == 0:
        values = ""
    else:
        values = flag.metavar if isinstance(flag.metavar, tuple) else [str(flag.metavar)]
        values = " ".join(values) + (" ..." if flag.nargs == "+" else "")
    name = f"{flag.option_strings[0]} {values}".strip()
    cells = (f"`{name}`", _markdown(meaning), _markdown(default))
    return f"| {' | '.join(cells)} |".replace("  |", " |")


def _markdown(text: str) -> str:
    return re.sub(r"(--\w+)", r"`\1`", re.sub(r"([|*])", r"\\\1", text))


def main() -> None:
    """Fills the tables of the page that the command line names."""
    page = Path(sys.argv[1])
    page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
