"""What a run leaves to read: its progress, the submission, and the report of what was done and how fast."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from activation_store import (
    ActivationStore,
    Patience,
    SequenceRecord,
    StoreWriteError,
    at_once,
    write_outcomes,
)
from arc_puzzles import (
    ArcTask,
    Augmentation,
    Grid,
    Submission,
    TaskFailure,
    build_submission,
    create_grid_encoder,
    parse_answer,
    score,
)
from arc_puzzles.tasks import write_json_atomic
from arc_runner.options import RunOptions

_LISTED = 20  # failures shown; the report file has them all
_QUIET_SECONDS = 30.0  # between two lines of progress where there is no terminal


class Progress:
    """Sequences done and tokens a second: a bar on a terminal, elsewhere a plain line now and then."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, unit="seq", disable=None)  # None: only on a terminal
        self._total, self._sequences, self._tokens = total, 0, 0
        self._started = self._said = time.monotonic()

    def update(self, sequences: int, tokens: int) -> None:
        """So many more are done."""
        self._sequences += sequences
        self._tokens += tokens
        now = time.monotonic()
        speed = f"{self._tokens / (now - self._started):.1f} tokens/s"
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update(sequences)
        if self._bar.disable and now - self._said >= _QUIET_SECONDS:
            self._said = now
            print(f"{self._sequences} of {self._total} sequences, {speed}", flush=True)

    def close(self) -> None:
        self._bar.close()


@dataclasses.dataclass
class Report:
    """Figures of one run, not of those it continues; seconds are wall-clock.

    ``tokens_generated`` counts the tokens of new sequences, ``generate_seconds`` the time from the first
    call until the last row is on disk, without loading and compiling. ``sequences`` and the score are over
    all that was asked for, whenever it was made. Of ``slot_steps``, the decode steps of all slots of
    ``--generation continuous``, ``live_steps`` read a token of a sequence that had not ended. ``processes``
    has the figures of each where there were several; the others are then of all together.
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
        return self.tokens_generated / self.generate_seconds if self.generate_seconds else 0.0

    @property
    def slot_occupancy(self) -> float:
        return self.live_steps / self.slot_steps if self.slot_steps else 0.0

    def add_failed_sequences(self, records: Sequence[SequenceRecord]) -> None:
        self.sequences_failed = [
            {
                "sequence": f"{r.task_id} test {r.test_index} {r.augmentation} sample {r.sample_index}",
                "reason": r.failure or "",
            }
            for r in records
            if r.failed
        ]

    def measure_memory(self) -> None:
        """Peak bytes on the fullest device, or of this process where devices keep no count (CPU)."""
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        peaks = [int(one["peak_bytes_in_use"]) for one in stats if "peak_bytes_in_use" in one]
        if peaks:
            self.peak_memory_bytes, self.peak_memory_of = max(peaks), "device"
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            self.peak_memory_bytes, self.peak_memory_of = peak, "process"

    def text(self) -> str:
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
        derived = {"tokens_per_second": self.tokens_per_second, "slot_occupancy": self.slot_occupancy}
        return dataclasses.asdict(self) | derived


def _listing(kind: str, failures: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"  {kind}   {name}: {reason}" for name, reason in failures[:_LISTED]]
    if len(failures) > _LISTED:
        lines.append(f"  {kind}   and {len(failures) - _LISTED} more, listed in the report file")
    return lines


def write_answers(
    report: Report,
    options: RunOptions,
    tasks: Sequence[ArcTask],
    records: Sequence[SequenceRecord],
    tokenizer: Any,
    patiently: Patience | None = None,
) -> None:
    """Reads the answers back from the store, writes submission and report, and fills in the score.

    ``records`` are the run's committed sequences in the order of its attempts. With ``patiently`` it waits
    for a store that is away.

    Raises:
        StoreWriteError: an answer file cannot be written.
    """
    submission = (patiently or at_once)(lambda: _read_answers(report, options, tasks, records, tokenizer))
    result = score(tasks, submission)
    report.tests_solved, report.tests_known = result.tests_solved, result.tests_known
    report.tasks_solved, report.tasks_known = result.tasks_solved, result.tasks_known
    for path, content in ((options.output_filepath, submission), (report_path(options), report.to_json())):
        try:
            write_json_atomic(path, content)
        except OSError as error:
            raise StoreWriteError(f"cannot write {path}: {error.strerror or error}") from error


def _read_answers(
    report: Report,
    options: RunOptions,
    tasks: Sequence[ArcTask],
    records: Sequence[SequenceRecord],
    tokenizer: Any,
) -> Submission:
    """The submission; tells the store which sequences solve their puzzle, and counts the grids."""
    encoder = create_grid_encoder(options.grid_encoder)
    outputs = {task.task_id: [pair.output for pair in task.test] for task in tasks}
    attempts: dict[tuple[str, int], list[Grid | None]] = {}
    outcomes: dict[str, bool] = {}
    store = ActivationStore(options.activations_dir)
    report.grids_parsed = 0
    for record in records:
        grid = None
        if not record.failed:
            text = tokenizer.decode(store.generated_tokens(record).tolist(), skip_special_tokens=True)
            grid = parse_answer(text, encoder)
        if grid is not None:
            grid = Augmentation.parse(record.augmentation).inverse().apply(grid)
            report.grids_parsed += 1
        attempts.setdefault((record.task_id, record.test_index), []).append(grid)
        output = outputs[record.task_id][record.test_index]
        if output is not None:
            outcomes[record.key] = grid == output
    write_outcomes(options.activations_dir, outcomes)
    return build_submission(tasks, attempts)


def report_path(options: RunOptions) -> Path:
    """``submission.json`` -> ``submission.report.json``."""
    path = Path(options.output_filepath)
    return path.with_name(f"{path.stem}.report.json")


def failure_entries(failures: Sequence[TaskFailure]) -> list[dict[str, str]]:
    return [{"task_id": failure.task_id, "reason": failure.reason} for failure in failures]
