"""The figures of a run: what it did, how fast, and what failed; as text for a person and as JSON."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from activation_store import SequenceRecord
from arc_puzzles import TaskFailure
from arc_runner.options import RunOptions

_LISTED = 20  # failures shown; the report file has them all


@dataclasses.dataclass
class Report:
    """Holds the figures of one run, not of those that it continues; seconds are wall-clock.

    ``tokens_generated`` counts the tokens of new sequences that were stored. ``generate_seconds`` is the time
    from the first call until the last row is on disk, without loading and compiling. ``sequences`` and the
    score are over all that was asked for, whenever it was made. ``slot_steps`` are the decode steps of all
    slots of ``--generation continuous``; in ``live_steps`` of them the slot held a sequence that had not
    ended.
    With several processes ``processes`` holds the figures of each, and all others are totals.
    """

    model: str
    device: str
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
    tests_solved: int = 0
    tests_known: int = 0
    tasks_solved: int = 0
    tasks_known: int = 0
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

    def add_failed_sequences(self, records: Sequence[SequenceRecord]) -> None:
        """Lists those of ``records`` that failed, each with its reason."""
        self.sequences_failed = [
            {
                "sequence": f"{r.task_id} test {r.test_index} {r.augmentation} sample {r.sample_index}",
                "reason": r.failure or "",
            }
            for r in records
            if r.failed
        ]

    def measure_memory(self) -> None:
        """Measures the peak bytes of the fullest device, or of this process if devices do not count (CPU)."""
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        peaks = [int(one["peak_bytes_in_use"]) for one in stats if "peak_bytes_in_use" in one]
        if peaks:
            self.peak_memory_bytes, self.peak_memory_of = max(peaks), "device"
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            self.peak_memory_bytes, self.peak_memory_of = peak, "process"

    def text(self) -> str:
        """Returns the report for a person, in lines."""
        new = self.sequences - self.sequences_resumed
        lines = [
            "stopped early; the same command continues" if self.stopped_early else "done",
            f"  model             {self.model} on {self.device}",
            f"  tasks             {self.tasks} ({len(self.tasks_failed)} failed)",
            f"  sequences         {self.sequences} ({self.sequences_resumed} were there already, "
            f"{len(self.sequences_failed)} failed)",
        ]
        if new:
            compiled = f", {self.programs} shapes compiled in {self.compile_seconds:.1f} s"
            lines += [
                f"  process {one['process']:<9d} {one['sequences_made']} sequences, "
                f"{one['tokens_generated']} tokens in {one['generate_seconds']:.1f} s"
                for one in self.processes
            ]
            lines += [
                f"  tokens generated  {self.tokens_generated} in {self.generate_seconds:.1f} s: "
                f"{self.tokens_per_second:.1f} tokens/s",
                *self._occupancy_lines(),
                f"  before that       weights loaded in {self.load_seconds:.1f} s"
                f"{compiled if self.programs else ''}",
                f"  stored            {self.bytes_stored / 1e6:.1f} MB",
            ]
        lines += [
            f"  peak memory       {self.peak_memory_bytes / 1e6:.0f} MB ({self.peak_memory_of})",
            f"  grids parsed      {self.grids_parsed} of {self.sequences}",
        ]
        if self.tests_known:
            lines.append(
                f"  solved            {self.tasks_solved} of {self.tasks_known} tasks, "
                f"{self.tests_solved} of {self.tests_known} tests"
            )
        lines += _listing("failed task    ", [(f["task_id"], f["reason"]) for f in self.tasks_failed])
        lines += _listing("failed sequence", [(f["sequence"], f["reason"]) for f in self.sequences_failed])
        return "\n".join(lines)

    def _occupancy_lines(self) -> list[str]:
        if not self.slot_steps:
            return []
        return [f"  slot occupancy    {self.slot_occupancy:.1%} of {self.slots} slots"]

    def to_json(self) -> dict[str, Any]:
        """Returns the figures, and those that follow from them, as the report file has them."""
        derived = {"tokens_per_second": self.tokens_per_second, "slot_occupancy": self.slot_occupancy}
        return dataclasses.asdict(self) | derived


def _listing(kind: str, failures: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"  {kind}   {name}: {reason}" for name, reason in failures[:_LISTED]]
    if len(failures) > _LISTED:
        lines.append(f"  {kind}   and {len(failures) - _LISTED} more, listed in the report file")
    return lines


def report_path(options: RunOptions) -> Path:
    """Returns where the report is written: ``submission.report.json`` beside ``submission.json``."""
    path = Path(options.output_filepath)
    return path.with_name(f"{path.stem}.report.json")


def failure_entries(failures: Sequence[TaskFailure]) -> list[dict[str, str]]:
    """Returns tasks that failed, in the form of ``Report.tasks_failed``."""
    return [{"task_id": failure.task_id, "reason": failure.reason} for failure in failures]
