"""What messages to a person have in common: similar names, masked passwords, escaped control characters.

Imports only the standard library: messages are needed before the imports that take seconds.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_NAMES_COMPARED = 10_000  # entries of a directory
# The user's part of a URL, as in s3://key:secret@bucket, and parameters such as ?token=...
_USER = re.compile(r"(\w://)(?:[^\s/@:]*:[^\s'\"]*|[^\s/@]+)@")
_SECRETS = "token|signature|sig|secret|password|key|credential"
_PARAMETER = re.compile(rf"([?&][\w-]*(?:{_SECRETS})[\w-]*=)[^&\s#'\"]+", re.IGNORECASE)
# Controls, halves of surrogate pairs, line separators, and what turns the direction of writing.
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def similar_name(name: str, names: Iterable[str]) -> str:
    """Returns "; did you mean OTHER?" for the one of ``names`` that is most like ``name``, "" if none is."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""


def did_you_mean(path: str | os.PathLike[str]) -> str:
    """Returns "; did you mean OTHER?" for a path that is not there and looks like another, else ""."""
    if "://" in os.fspath(path) or Path(path).exists():
        return ""
    similar = _similar_path(Path(path))
    return "" if similar is None else f"; did you mean {similar}?"


def _similar_path(path: Path) -> Path | None:
    """Returns the existing path that is most like ``path``, each missing part by its most similar name."""
    found = Path(path.anchor or ".")
    for part in path.parts[1:] if path.anchor else path.parts:
        if not (found / part).exists():
            try:
                names = [entry.name for entry in itertools.islice(os.scandir(found), _NAMES_COMPARED)]
            except OSError:
                return None
            close = difflib.get_close_matches(part, names, 1)
            if not close:
                return None
            part = close[0]
        found /= part
    return found


def shown(value: Any) -> str:
    """Returns a value for an error message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def masked(text: str) -> str:
    """Returns ``text`` with the passwords and tokens of the URLs in it as ``***``."""
    return _PARAMETER.sub(r"\1***", _USER.sub(r"\1***@", text))


def printable(text: str, *, keep: str = "") -> str:
    r"""Returns ``text`` with what a terminal would obey, and does not show, as escapes such as ``\x1b``.

    The characters of ``keep`` stay as they are.
    """

    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()

    return _NOT_SHOWN.sub(escaped, text)
