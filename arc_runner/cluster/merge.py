"""One submission and one report for several processes, written by the process that ends last."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from arc_runner.cluster.claims import Claims
from arc_runner.cluster.shared_files import SharedFiles
from arc_runner.report import Report

POLL_SECONDS = 1.0
_ANSWERS, _ANSWERING, _ANSWERED = "answers", "answering", "answered"
_SUMMED = ("tokens_generated", "bytes_stored", "slots", "slot_steps", "live_steps")
_LARGEST = ("load_seconds", "compile_seconds", "programs", "generate_seconds", "peak_memory_bytes")
_MERGED = (*_SUMMED, *_LARGEST, "sequences_resumed", "peak_memory_of", "made_at")
_logger = logging.getLogger(__name__)
_FIGURES = re.compile(r"figures-(\d{5})\.json")


def leave_figures(files: SharedFiles, index: int, report: Report, sequences: int) -> float:
    """Writes the figures of this process, which has made ``sequences``, where the others can read them.

    Returns a time, by the file system's clock, at which they could be read.
    """
    figures = dataclasses.asdict(report) | {"process": index, "sequences_made": sequences}
    data = json.dumps(figures).encode()
    files.write(_figures_name(index), data)
    # Twice: a file's time may be from just before it was in its place. That of the second is after the first.
    return files.write(_figures_name(index), data)


def forget_figures(files: SharedFiles, index: int) -> None:
    """Removes the figures that this process left in an earlier run."""
    files.remove(_figures_name(index))


def gather_figures(files: SharedFiles, processes: int | None = None) -> list[dict[str, Any]]:
    """Returns the figures that processes have left, in their order: of the first ``processes``, or of all."""
    found = []
    for name in files.names():
        match = _FIGURES.fullmatch(name)
        if match and (processes is None or int(match[1]) < processes) and (there := files.read(name)):
            figures = _parse_figures(there[0])
            if figures is None:
                _logger.warning("the figures in %s are damaged; the report is without them", name)
            else:
                found.append(figures)
    return found


def _parse_figures(data: bytes) -> dict[str, Any] | None:
    """Returns the figures that a process left; None if they are damaged. Those of old have no time."""
    try:
        figures = {"made_at": "", **json.loads(data)}
        for field in dataclasses.fields(Report):
            if field.name in _MERGED and type(figures[field.name]) is not type(field.default):
                return None
        return figures if type(figures["process"]) is type(figures["sequences_made"]) is int else None
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


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


def answer_once(claims: Claims, me: str, written: float, answer: Callable[[], None]) -> str:
    """Calls ``answer`` unless another process has answered since ``written``, when our figures were left.

    So the process that ends last answers, with the figures of all. Processes that end together may both
    answer, which does no harm. Returns the name of the process that has answered.
    """
    while not claims.acquire(_ANSWERS):
        time.sleep(POLL_SECONDS)
    answered = claims.files.read(_ANSWERED)
    seen, by = (0.0, me) if answered is None else _parse_answered(answered[0], me)
    if seen <= written:  # the earlier answer may have missed these figures
        seen, by = claims.files.write(_ANSWERING, me.encode()), me
        answer()
        claims.files.write(_ANSWERED, json.dumps([seen, by]).encode())
    claims.release(_ANSWERS)
    return by


def _parse_answered(data: bytes, me: str) -> tuple[float, str]:
    """Returns when the last answer saw the figures, and whose it was; of a damaged note, that nobody has."""
    try:
        seen, by = json.loads(data)
        return float(seen), str(by)
    except (ValueError, RecursionError, TypeError):
        return 0.0, me


def _figures_name(index: int) -> str:
    return f"figures-{index:05d}.json"
