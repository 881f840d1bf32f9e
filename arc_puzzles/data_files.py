"""Files of puzzles as they are found: packed or not, in any Unicode encoding, read as strict JSON."""

import gzip
import json
import stat
import zlib
from pathlib import Path
from typing import NoReturn

from arc_puzzles.grids import ArcFormatError

MAX_BYTES = 2**31  # of a file, unpacked: all public puzzles together are a hundredth of it
_SHOWN = 200
# What a file begins with that holds tasks in a form we do not read: (bytes, its name, what to do).
_OTHER_FORMS = (
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"PAR1", "a Parquet file", "write it as JSON Lines"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\x00\x05\x16\x07", "a macOS resource file", "remove it"),
)


def shown(text: str, most: int = _SHOWN) -> str:
    """Returns `text` as it can be printed: what is no printable ASCII is escaped, the middle cut if long."""
    safe = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    return safe if len(safe) <= most else f"{safe[: most // 2]}...{safe[-most // 4 :]}"


def read_text(path: Path) -> str:
    """Returns the text of a file; gzip is unpacked, and UTF-8, -16 and -32 are told apart.

    Raises ArcFormatError where the file cannot be read, is no regular file, is too large or is no text.
    """
    name = shown(str(path))
    try:
        data = _read_bytes(path, name)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ArcFormatError(f"cannot read {name}: {reason}") from error
    for magic, form, remedy in _OTHER_FORMS:
        if data.startswith(magic):
            raise ArcFormatError(f"{name} is {form}, not JSON; {remedy}")
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        encoding = encoding.removesuffix("-sig").upper()
        raise ArcFormatError(f"{name} is not JSON: byte {error.start} is not {encoding}") from error


def _read_bytes(path: Path, name: str) -> bytes:
    mode = path.stat().st_mode  # before it is opened: opening a pipe waits for its writer
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ArcFormatError(f"cannot read {name}: it is not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if data.startswith(b"\x1f\x8b"):
        with gzip.open(path) as packed:
            data = packed.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ArcFormatError(f"cannot read {name}: it has more than {MAX_BYTES / 1e9:.0f} GB")
    return data


def parse_json(
    text: str, where: str, *, several: str = "if it has one task a line, name it *.jsonl"
) -> object:
    """Parses strict JSON: refuses NaN and Infinity, and a key that occurs twice in an object.

    Raises ArcFormatError, which calls the text `where`, and says `several` of more than one value.
    """

    def refuse_constant(constant: str) -> NoReturn:
        raise ArcFormatError(f"{where} is not JSON: it contains {constant}")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result:
                raise ArcFormatError(f"{where} has the key '{shown(key)}' twice in one object")
            result[key] = value
        return result

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except ArcFormatError:
        raise
    except json.JSONDecodeError as error:
        hint = f"; {several}" if error.msg == "Extra data" else ""
        raise ArcFormatError(f"{where} is not JSON: {error}{hint}") from error
    except (ValueError, RecursionError) as error:  # ValueError: an integer of thousands of digits
        raise ArcFormatError(f"{where} is not JSON: {error}") from error


def read_json(path: Path) -> object:
    """Returns what a JSON file holds; see `read_text` and `parse_json` for what raises ArcFormatError."""
    return parse_json(read_text(path), shown(str(path)))
