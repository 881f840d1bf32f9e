"""The answers of a run: read back from the store, scored, and written with the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activation_store import (
    ActivationStore,
    RetryPolicy,
    SequenceRecord,
    StoreWriteError,
    at_once,
    write_outcomes,
)
from activation_store.local_files import write_atomic
from arc_puzzles import (
    ArcTask,
    Augmentation,
    Grid,
    Submission,
    build_submission,
    create_grid_encoder,
    parse_answer,
    score,
)
from arc_runner.options import RunOptions
from arc_runner.report import Report, report_path


def write_answers(
    report: Report,
    options: RunOptions,
    tasks: Sequence[ArcTask],
    records: Sequence[SequenceRecord],
    tokenizer: Any,
    patiently: RetryPolicy | None = None,
) -> None:
    """Reads the answers back from the store, writes submission and report, and fills in the score.

    ``records`` are the run's committed sequences in the order of its attempts. ``patiently`` says how a store
    that is away is waited for; without it the first failure counts.

    Raises:
        StoreWriteError: an answer file cannot be written.
    """
    submission = (patiently or at_once)(lambda: _read_answers(report, options, tasks, records, tokenizer))
    result = score(tasks, submission)
    report.tests_solved, report.tests_known = result.tests_solved, result.tests_known
    report.tasks_solved, report.tasks_known = result.tasks_solved, result.tasks_known
    write_json(options.output_filepath, submission)
    write_json(report_path(options), report.to_json())


def write_json(path: str | Path, value: object) -> None:
    """Writes ``value`` as a JSON file, whole or not at all.

    Raises:
        ValueError: the value is not JSON (NaN).
        StoreWriteError: the file cannot be written.
    """
    try:
        write_atomic(path, [f"{json.dumps(value, allow_nan=False)}\n".encode()])
    except OSError as error:
        raise StoreWriteError(f"cannot write {path}: {error.strerror or error}") from error


def _read_answers(
    report: Report,
    options: RunOptions,
    tasks: Sequence[ArcTask],
    records: Sequence[SequenceRecord],
    tokenizer: Any,
) -> Submission:
    """Builds the submission; counts its grids, and notes in the store which sequences solve their puzzle."""
    encoder = create_grid_encoder(options.grid_encoder)
    outputs = {task.task_id: [pair.output for pair in task.test] for task in tasks}
    attempts: dict[tuple[str, int], list[Grid | None]] = {}
    outcomes: dict[str, bool] = {}
    store = ActivationStore(options.activations_dir)
    report.grids_parsed = 0
    for record in records:
        grid = None
        if not record.failed:
            grid = parse_answer(store.answer(record, tokenizer), encoder)
        if grid is not None:
            grid = Augmentation.parse(record.augmentation).inverse().apply(grid)
            report.grids_parsed += 1
        attempts.setdefault((record.task_id, record.test_index), []).append(grid)
        output = outputs[record.task_id][record.test_index]
        if output is not None:
            outcomes[record.key] = grid == output
    write_outcomes(options.activations_dir, outcomes)
    return build_submission(tasks, attempts)
