"""JSON that carries its own checksum, so that a bit which changed later is noticed.

`seal` and `unseal` are for an object that is a file of its own; `seal_line` and `unseal_line` for one that is
a line among many.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

CHECKSUM = "checksum"
_LINE_CHECKSUM = b',"crc32":"'


def canonical_json(value: Any) -> str:
    """Returns the one JSON text of a value: sorted keys, no spaces; raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content with a field `checksum` at its end: the sha256 of the rest as canonical JSON.

    Raises:
        ValueError: the content is no JSON, or has a field of that name.
    """
    if CHECKSUM in content:
        raise ValueError(f"the content has a field {CHECKSUM!r} already")
    return {**content, CHECKSUM: _sha256(content)}


def unseal(sealed: Mapping[str, Any]) -> tuple[dict[str, Any], bool | None]:
    """Returns the content without its checksum, and whether that fits; None where there is no checksum."""
    content = {name: value for name, value in sealed.items() if name != CHECKSUM}
    if CHECKSUM not in sealed:
        return content, None
    try:
        return content, sealed[CHECKSUM] == _sha256(content)
    except ValueError:  # NaN, or nested too deeply
        return content, False


def seal_line(line: bytes) -> bytes:
    """Returns a line, one compact JSON object that has a field at least, with its CRC-32 as last field."""
    body = line[:-1]
    return b'%b%b%08x"}' % (body, _LINE_CHECKSUM, zlib.crc32(body))


def unseal_line(line: bytes) -> bytes:
    """Returns the line that `seal_line` was given; one without a checksum, as of earlier versions, as it is.

    Raises:
        ValueError: the checksum does not fit.
    """
    body, found, checksum = line.rpartition(_LINE_CHECKSUM)
    if not found:
        return line
    if checksum != b'%08x"}' % zlib.crc32(body):
        raise ValueError("its checksum does not fit")
    return body + b"}"


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
