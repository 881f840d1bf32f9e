"""One report of several processes: each leaves its figures in its host folder, one adds up those of all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

from activation_store import RetryPolicy, at_once
from activation_store.format import host_name
from activation_store.remote_files import open_files
from activation_store.store_files import FIGURES
from arc_runner.report import Report

_SUMMED = ("tokens_generated", "bytes_stored", "slots", "slot_steps", "live_steps")
_LARGEST = ("load_seconds", "compile_seconds", "programs", "generate_seconds", "peak_memory_bytes")
_MERGED = (*_SUMMED, *_LARGEST, "sequences_resumed", "peak_memory_of", "made_at")
_logger = logging.getLogger(__name__)


def figures_of(report: Report, process: int, sequences: int) -> dict[str, Any]:
    """Returns the figures of one process, which has made ``sequences``, as JSON values."""
    return dataclasses.asdict(report) | {"process": process, "sequences_made": sequences}


def leave_figures(directory: str, figures: dict[str, Any], patiently: RetryPolicy | None = None) -> None:
    """Writes a process's figures into its host folder, which must be there, in the place of earlier ones.

    Raises:
        StoreWriteError: they cannot be written.
    """
    name, data = _name(figures["process"]), json.dumps(figures).encode()
    (patiently or at_once)(lambda: open_files(directory).replace(name, data))


def forget_figures(directory: str, process: int, patiently: RetryPolicy | None = None) -> None:
    """Removes the figures that this process left in an earlier run.

    Raises:
        StoreWriteError: they cannot be removed.
    """
    (patiently or at_once)(lambda: open_files(directory).discard(_name(process)))


def gather_figures(
    directory: str, count: int | None = None, patiently: RetryPolicy | None = None
) -> list[dict[str, Any]]:
    """Returns the figures that processes have left, in their order: of the first ``count``, or of all."""

    def gather() -> dict[int, bytes]:
        files, found = open_files(directory), {}
        for host in files.hosts():
            if count is None or host < count:
                with contextlib.suppress(FileNotFoundError):
                    found[host] = files.read(_name(host))
        return found

    parsed = {host: _parse(host, data) for host, data in (patiently or at_once)(gather).items()}
    for host, figures in parsed.items():
        if figures is None:
            _logger.warning("the figures in %s are damaged; the report is without them", _name(host))
    return [figures for figures in parsed.values() if figures is not None]


def merge_figures(report: Report, figures: Sequence[dict[str, Any]]) -> None:
    """Replaces the report's figures by those of all processes: sums of amounts, maxima of the others."""
    if not figures:
        return
    for name in _SUMMED:
        setattr(report, name, sum(one[name] for one in figures))
    for name in _LARGEST:
        setattr(report, name, max(one[name] for one in figures))
    report.sequences_resumed = min(one["sequences_resumed"] for one in figures)
    report.peak_memory_of = figures[0]["peak_memory_of"]
    report.made_at = max(one["made_at"] for one in figures)
    names = ("process", "device", "sequences_made", "tokens_generated", "generate_seconds")
    report.processes = [{name: one[name] for name in names} for one in figures]


def _parse(host: int, data: bytes) -> dict[str, Any] | None:
    """Returns the figures that a process left; None if they are damaged."""
    try:
        figures = json.loads(data)
        for field in dataclasses.fields(Report):
            if field.name in _MERGED and type(figures[field.name]) is not type(field.default):
                return None
        if type(figures["sequences_made"]) is not int or type(figures["device"]) is not str:
            return None
        return figures if figures["process"] == host else None
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def _name(host: int) -> str:
    return f"{host_name(host)}/{FIGURES}"
