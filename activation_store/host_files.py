"""What each host leaves about itself at the root of a store: that it was there, and how it computed.

The last bits of a sequence follow from more than the store's settings: from the device, the kernels, the size
of the batch. A host's *numerics* are a mapping of these, and its index lines name by an id those that they
were made with. The host writes `host-00003.json` before its first index line, and anew as these change:

    {"host": 3, "numerics": {"5f0c81aa": {"platform": "cpu", ...}}, "checksum": "..."}

An id whose mapping was lost, as `verify --repair` notes it, has null in its place.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from activation_store.checked_json import canonical_json, seal, unseal
from activation_store.format import StoreError, host_name, host_number
from activation_store.store_files import StoreFiles

Numerics = dict[str, dict[str, Any] | None]  # by id; None where it is not known any more
_SUFFIX = ".json"
_MOST_BYTES = 1 << 20


def numerics_id(numerics: Mapping[str, Any]) -> str:
    """Returns the name of a mapping of JSON values: 8 hex digits that follow from its content."""
    return hashlib.sha256(canonical_json(numerics).encode()).hexdigest()[:8]


def host_file_name(host: int) -> str:
    """Returns the name of a host's file: `host_file_name(7) == "host-00007.json"`."""
    return host_name(host) + _SUFFIX


def host_file_number(name: str) -> int | None:
    """Returns the host of a file's name: `host_file_number("host-00007.json") == 7`; None for other names."""
    return host_number(name.removesuffix(_SUFFIX)) if name.endswith(_SUFFIX) else None


def write_host_file(files: StoreFiles, host: int, numerics: Numerics) -> None:
    """Writes the file of a host, which the caller has taken; StoreWriteError where it cannot be written."""
    text = json.dumps(seal({"host": host, "numerics": numerics}), indent=2, allow_nan=False)
    files.replace(host_file_name(host), f"{text}\n".encode(), host=host)


def read_host_file(files: StoreFiles, host: int) -> Numerics | None:
    """Returns the numerics of a host by their ids, or None where it has no file.

    Raises:
        StoreError: the file is damaged or cannot be read.
    """
    name = host_file_name(host)
    try:
        data = files.read(name, 0, _MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{name} cannot be read: {error.strerror or error}") from error
    try:
        content, fits = unseal(json.loads(data))
        if not fits:
            raise ValueError("its checksum does not fit")
        if set(content) != {"host", "numerics"} or content["host"] != host:
            raise ValueError(f"it is not that of host {host}")
        for known, numerics in content["numerics"].items():
            if numerics is not None and numerics_id(numerics) != known:
                raise ValueError(f"{known} is the name of other numerics")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{name} is damaged: {error}") from error
    return content["numerics"]


def read_host_files(files: StoreFiles) -> tuple[dict[int, Numerics], dict[int, str]]:
    """Returns the numerics of every host that has a file, and what is wrong with those that are damaged."""
    found: dict[int, Numerics] = {}
    problems: dict[int, str] = {}
    for name in files.names():
        host = host_file_number(name)
        if host is None:
            continue
        try:
            found[host] = read_host_file(files, host) or {}
        except StoreError as error:
            problems[host] = str(error)
    return found, problems


def known_numerics(found: Mapping[int, Numerics]) -> dict[str, dict[str, Any]]:
    """Returns the mapping behind every id that a host still knows it of."""
    return {
        known: numerics
        for of_host in found.values()
        for known, numerics in of_host.items()
        if numerics is not None
    }
