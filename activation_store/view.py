"""The page of a store: one HTML file with everything in it, for a browser without any network."""

import html
import json
import os
from pathlib import Path
from typing import Any

from activation_store.format import StoreUsageError, StoreWriteError
from activation_store.local_files import write_atomic
from activation_store.output_places import target_outside
from activation_store.reader import ActivationStore
from activation_store.view_data import Reader, ViewChoice, page_data

_PARTS = Path(__file__).with_name("page")
_MARK = b'<meta name="generator" content="activation_store view">'
_HEAD_BYTES = 1_000  # of a page, which hold the mark


def write_page(
    store: ActivationStore, output: str | os.PathLike[str], reader: Reader, choice: ViewChoice
) -> int:
    """Writes the page of a store and returns its size in bytes.

    Args:
        store: the store to read.
        output: the file to write; an earlier page there is replaced.
        reader: what makes text of tokens.
        choice: which sequences and numbers are on it.

    Raises:
        StoreUsageError: the file is there and is no such page, or is in the store; also as `page_data`.
        StoreWriteError: the file cannot be written.
    """
    target = target_outside(store, output)
    try:
        if target.is_dir():
            raise StoreUsageError(f"{target} is a folder; give the name of a page, such as page.html")
        if target.exists() and not (target.is_file() and _is_page(target)):
            raise StoreUsageError(f"{target} is there and is no page of a store; choose another name")
        if not target.parent.is_dir():
            raise StoreUsageError(f"there is no folder {target.parent}")
    except OSError as error:
        raise StoreWriteError(f"cannot write {target}: {error.strerror or error}") from error
    page = make_page(page_data(store, reader, choice)).encode()
    try:
        write_atomic(target, [page])
    except OSError as error:
        raise StoreWriteError(f"cannot write {target}: {error.strerror or error}") from error
    return len(page)


def make_page(data: dict[str, Any]) -> str:
    """Returns the page that shows `data`, in which every text is taken for text, whatever it holds."""
    page = (_PARTS / "page.html").read_text("utf-8")
    parts = {
        "TITLE": html.escape(data["name"]),
        "STYLE": (_PARTS / "page.css").read_text("utf-8"),
        "SCRIPT": (_PARTS / "page.js").read_text("utf-8"),
        "DATA": script_json(data),  # the last one: nothing is replaced in it
    }
    for name, text in parts.items():
        before, mark, after = page.partition(f"@{name}@")
        assert mark
        page = before + text + after
    return page


def script_json(value: Any) -> str:
    """Returns JSON for a script element: nothing in it can end the element, and no address stands in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for letter in "<>&/":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK in file.read(_HEAD_BYTES)
