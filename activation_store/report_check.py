"""Checks a run's report and the answers beside it: they are as they were written, of this store."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from activation_store.checked_json import canonical_json, unseal
from activation_store.format import StoreSettings

_MAX_BYTES = 2**31


def verify_report(path: str | Path, settings: StoreSettings) -> Iterator[str]:
    """Yields a sentence for each way in which a report and the files it names are not as a run left them.

    A report carries its own checksum, the sha256 of the files beside it, and that of its store's settings.
    """
    path = Path(path)
    data = _read(path)
    if data is None:
        yield f"{path} cannot be read, or is no regular file"
        return
    try:
        report, intact = unseal(json.loads(data))
        source, hashes = dict(report["source"]), dict(report["sha256"])
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        yield f"{path} is no report of a run, or is damaged"
        return
    if not intact:
        yield f"{path} has changed since it was written: its checksum does not fit"
        return
    if source.get("settings_sha256") != settings_sha256(settings):
        yield f"{path} is of a store with other settings"
    for name, digest in hashes.items():
        beside = path.with_name(_name_now(name, path, hashes))
        content = _read(beside)
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            yield f"{beside} is not what {path.name} says: run the same command again, it is made anew"


def _name_now(name: str, report: Path, names: Iterable[str]) -> str:
    """Returns what a file is called beside a report that may have been renamed with it, as when set aside."""
    before = min(
        (Path(one).stem for one in names), key=len
    )  # the submission's; the predictions have a word more
    now = report.name.removesuffix(".report.json")
    name = Path(name).name
    return now + name.removeprefix(before) if now != report.name and name.startswith(before) else name


def settings_sha256(settings: StoreSettings) -> str:
    """Returns the sha256 by which a report names the settings of its store."""
    return hashlib.sha256(canonical_json(settings.to_json()).encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= _MAX_BYTES else None
    except (OSError, ValueError):
        return None
