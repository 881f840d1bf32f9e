"""The figures of a run: what it did, how fast, and what failed; as text for a person and as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from arc_puzzles.data_files import shown
from arc_runner.predictions import Book

_LISTED = 20  # failures shown; the report file has them all
# What is of the run that generated, not of the submission.
FIGURES = (
    *("made_at", "device", "tokens_generated", "load_seconds", "compile_seconds", "programs"),
    *("generate_seconds", "slots", "slot_steps", "live_steps", "bytes_stored"),
    *("peak_memory_bytes", "peak_memory_of", "processes"),
)


@dataclasses.dataclass
class Report:
    """Holds what a submission has, and the figures of the last run that generated; seconds are wall-clock.

    Tasks, sequences and scores are over all that the submission has, whenever it was made; ``*_solved``
    counts the two attempts, ``*_solved_by_any`` every prediction; ``still_thinking`` counts those whose text
    ended before the model's thinking did, so that it has no answer. The other figures are of one run, not of
    those that it continues: that of ``made_at``, in UTC. ``tokens_generated`` counts the tokens of its new
    sequences that were stored. ``generate_seconds`` is the time from the first call until the last row is on
    disk, without loading and compiling. ``slot_steps`` are the decode steps of all slots of
    ``--generation continuous``; in ``live_steps`` of them the slot held a sequence that had not ended. With
    several processes ``processes`` holds the figures of each, and all others are totals.
    """

    model: str
    device: str
    asked: str = "tasks"  # or "prompts", own ones: then `tasks` and `tasks_failed` are of these
    tasks: int = 0
    tasks_failed: list[dict[str, str]] = dataclasses.field(default_factory=list)
    sequences: int = 0
    sequences_resumed: int = 0
    sequences_failed: list[dict[str, str]] = dataclasses.field(default_factory=list)
    tokens_generated: int = 0
    load_seconds: float = 0.0
    compile_seconds: float = 0.0
    programs: int = 0
    generate_seconds: float = 0.0
    slots: int = 0
    slot_steps: int = 0
    live_steps: int = 0
    bytes_stored: int = 0
    peak_memory_bytes: int = 0
    peak_memory_of: str = ""
    grids_parsed: int = 0
    still_thinking: int = 0
    tests_solved: int = 0
    tests_known: int = 0
    tasks_solved: int = 0
    tasks_known: int = 0
    tests_solved_by_any: int = 0
    tasks_solved_by_any: int = 0
    made_at: str = ""
    stopped_early: bool = False
    processes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Returns the speed of generation; 0 if nothing was generated."""
        return self.tokens_generated / self.generate_seconds if self.generate_seconds else 0.0

    @property
    def slot_occupancy(self) -> float:
        """Returns the share of slot steps that served a sequence, from 0 to 1."""
        return self.live_steps / self.slot_steps if self.slot_steps else 0.0

    def count(self, book: Book, new: int) -> None:
        """Counts what a submission has: its tasks, predictions and scores; ``new`` of them were just made."""
        predictions = list(book.predictions())
        self.tasks = len(book.tasks)
        self.tasks_failed = [
            {"task_id": task_id, "reason": task.failure}
            for task_id, task in book.tasks.items()
            if task.failure is not None
        ]
        self.sequences = len(predictions)
        self.sequences_resumed = len(predictions) - new
        self.sequences_failed = [
            {"sequence": f"{task_id} test {i} {one.augmentation} sample {one.sample}", "reason": one.failure}
            for task_id, i, one in predictions
            if one.failure is not None
        ]
        self.grids_parsed = sum(one.grid is not None for _, _, one in predictions)
        self.still_thinking = sum(one.thinking for _, _, one in predictions)
        attempts, any_prediction = book.scores()
        self.tests_solved, self.tests_known = attempts.tests_solved, attempts.tests_known
        self.tasks_solved, self.tasks_known = attempts.tasks_solved, attempts.tasks_known
        self.tests_solved_by_any = any_prediction.tests_solved
        self.tasks_solved_by_any = any_prediction.tasks_solved

    def stamp(self) -> None:
        """Notes the time, if this run has generated something."""
        if self.tokens_generated or self.generate_seconds:  # prompts may be read alone
            # To the microsecond: of two runs within a second, the later one is the younger.
            now = datetime.datetime.now(datetime.UTC)
            self.made_at = now.isoformat(" ", "microseconds").removesuffix("+00:00")

    def keep_figures(self, earlier: Mapping[str, Any]) -> None:
        """Takes over the figures of an earlier report that are younger than these, or these are of nothing.

        Figures of another form than ours are not taken over.
        """
        if not all(type(earlier.get(name)) is type(getattr(self, name)) for name in FIGURES):
            return
        # Of one time, what several processes answer in turn: the more of them it counts, the more there is.
        theirs, ours = ((one["made_at"], one["tokens_generated"]) for one in (earlier, vars(self)))
        if theirs > ours and all(map(_is_of_process, earlier["processes"])):
            for name in FIGURES:
                setattr(self, name, earlier[name])

    def measure_memory(self) -> None:
        """Notes the peak memory so far."""
        self.peak_memory_bytes, self.peak_memory_of = peak_memory()

    def text(self) -> str:
        """Returns the report for a person, in lines."""
        return "\n".join([self.outcome, *(f"  {name:<17} {value}" for name, value in self.rows())])

    @property
    def outcome(self) -> str:
        """Returns how the run ended, for a person."""
        return "stopped early; the same command continues" if self.stopped_early else "done"

    def rows(self) -> list[tuple[str, str]]:
        """Returns the figures for a person, each with its name of at most 17 characters."""
        new = self.sequences - self.sequences_resumed
        when = "" if new else f" (run of {self.made_at.partition('.')[0]} UTC)"
        rows = [
            ("model", f"{_from_here(self.model)} on {self.device}"),
            (self.asked, f"{self.tasks} ({len(self.tasks_failed)} failed)"),
            (
                "sequences",
                f"{self.sequences} ({self.sequences_resumed} were there already, "
                f"{len(self.sequences_failed)} failed)",
            ),
        ]
        if new or self.tokens_generated:
            compiled = f", {self.programs} shapes compiled in {self.compile_seconds:.1f} s"
            rows += [
                (
                    f"process {one['process']}",
                    f"{one['sequences_made']} sequences, {one['tokens_generated']} tokens in "
                    f"{one['generate_seconds']:.1f} s",
                )
                for one in self.processes
            ]
            speed = f"{self.tokens_generated} in {self.generate_seconds:.1f} s: {self.tokens_per_second:.1f}"
            rows.append(("tokens generated", f"{speed} tokens/s{when}"))
            if self.slot_steps:
                rows.append(("slot occupancy", f"{self.slot_occupancy:.1%} of {self.slots} slots"))
            loaded = f"weights loaded in {self.load_seconds:.1f} s{compiled if self.programs else ''}"
            rows += [("before that", loaded), ("stored", f"{self.bytes_stored / 1e6:.1f} MB")]
        rows.append(("peak memory", f"{self.peak_memory_bytes / 1e6:.0f} MB ({self.peak_memory_of})"))
        if self.asked == "tasks":
            thinking = f" ({self.still_thinking} were still thinking)" if self.still_thinking else ""
            rows.append(("grids parsed", f"{self.grids_parsed} of {self.sequences}{thinking}"))
        if self.tests_known:
            tests = f"{self.tests_solved} of {self.tests_known} tests"
            rows.append(("solved", f"{self.tasks_solved} of {self.tasks_known} tasks, {tests}"))
            by_any = f"{self.tasks_solved_by_any} tasks, {self.tests_solved_by_any} tests"
            rows.append(("by any prediction", by_any))
        failed = f"failed {self.asked.removesuffix('s')}"
        rows += _listing(failed, [(f["task_id"], f["reason"]) for f in self.tasks_failed])
        rows += _listing("failed sequence", [(f["sequence"], f["reason"]) for f in self.sequences_failed])
        return rows

    def to_json(self) -> dict[str, Any]:
        """Returns the figures, and those that follow from them, as the report file has them."""
        derived = {"tokens_per_second": self.tokens_per_second, "slot_occupancy": self.slot_occupancy}
        return dataclasses.asdict(self) | derived


def peak_memory() -> tuple[int, str]:
    """Returns the peak bytes of the fullest "device", or of this "process" if devices do not count (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(one["peak_bytes_in_use"]) for one in stats if "peak_bytes_in_use" in one]
    if peaks:
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def _from_here(path: str) -> str:
    """Returns a path below the current directory as it is from there, any other as it is."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _is_of_process(value: object) -> bool:
    """Tells whether a value has the form of an entry of ``Report.processes``."""
    kinds = {"process": int, "sequences_made": int, "tokens_generated": int, "generate_seconds": float}
    return isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in kinds.items())


def _listing(kind: str, failures: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    rows = [(kind, f"{shown(name)}: {shown(reason, 2000)}") for name, reason in failures[:_LISTED]]
    if len(failures) > _LISTED:
        rows.append((kind, f"and {len(failures) - _LISTED} more, listed in the report file"))
    return rows
