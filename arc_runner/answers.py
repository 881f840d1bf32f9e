"""The answers of a run: read back from the store, voted on, scored, and written with the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from activation_store import (
    ActivationStore,
    RetryPolicy,
    SequenceRecord,
    StoreError,
    at_once,
    write_outcomes,
)
from arc_puzzles import GridEncoder, create_grid_encoder
from arc_puzzles.thinking import after_thinking
from arc_runner.answer_files import answer_files, read_earlier, say_aside, set_aside, source_of, write_all
from arc_runner.completions import write_completions
from arc_runner.console import say
from arc_runner.job import Job
from arc_runner.predictions import Book, Predicted, TaskPredictions, read_grid
from arc_runner.report import Report

_logger = logging.getLogger(__name__)


def write_answers(
    report: Report, job: Job, records: Sequence[SequenceRecord], patiently: RetryPolicy | None = None
) -> Book | None:
    """Reads the answers back from the store, and writes submission, predictions and report; or completions.

    What earlier runs of the same store answered is kept, and counted in the report. ``records`` are the
    run's committed sequences in the order of its predictions. ``patiently`` says how a store that is away is
    waited for; without it the first failure counts.

    Returns:
        all that has been answered; None for own prompts.

    Raises:
        StoreWriteError: an answer file cannot be written.
    """
    if job.options.prompts is not None:
        write_completions(report, job, records, patiently)
        return None
    wait = patiently or at_once
    files, source = answer_files(job.options), source_of(job.options, job.settings)
    made = wait(lambda: _read_answers(job, records))
    earlier = read_earlier(files, source)
    if earlier.strangers:
        say_aside(files, set_aside(files), earlier.strangers)
    book = made.extended(earlier.book)
    _say_kept(book, made)
    report.count(book, new=max(0, len(records) - report.sequences_resumed))
    report.keep_figures(earlier.figures)
    try:
        wait(lambda: write_outcomes(job.options.activations_dir, book.outcomes()))
    except StoreError as error:  # it can be made again, the answers come first
        _logger.warning("which sequences solve their puzzle is not noted in the store: %s", error)
    write_all(files, source, book, report.to_json(), earlier)
    return book


def _read_answers(job: Job, records: Sequence[SequenceRecord]) -> Book:
    """Returns the predictions of the job's committed sequences, with every task of the data set."""
    encoder = create_grid_encoder(job.options.grid_encoder)
    store = ActivationStore(job.options.activations_dir)
    predictions: dict[tuple[str, int], list[Predicted]] = {}
    for record in records:
        one = _predicted(record, store, job, encoder)
        predictions.setdefault((record.task_id, record.test_index), []).append(one)
    usable = {task.task_id: task for task in job.tasks}
    reasons = {failure.task_id: failure.reason for failure in job.failures}
    return Book(
        {
            task_id: TaskPredictions(
                usable[task_id].digest if task_id in usable else "",
                usable[task_id].outputs if task_id in usable else (None,) * n_tests,
                tuple(tuple(predictions.get((task_id, i), ())) for i in range(n_tests)),
                reasons.get(task_id),
            )
            for task_id, n_tests in job.outline
        }
    )


def _predicted(record: SequenceRecord, store: ActivationStore, job: Job, encoder: GridEncoder) -> Predicted:
    if record.failed:
        failure = record.failure or ""
        return Predicted(record.key, record.augmentation, record.sample_index, failure=failure)
    text = store.answer(record, job.tokenizer)
    grid = read_grid(text, record.augmentation, encoder, job.opens_thinking)
    logprob = float(store.generated_logprobs(record).sum(dtype=np.float64))
    thinking = record.generated_length > 0 and after_thinking(text, job.opens_thinking) is None
    name = (record.key, record.augmentation, record.sample_index)
    return Predicted(*name, grid, logprob, thinking=thinking)


def _say_kept(book: Book, made: Book) -> None:
    """Says what earlier runs of the store had answered besides."""
    tasks = len(book.tasks) - len(made.tasks)
    predictions = sum(1 for _ in book.predictions()) - sum(1 for _ in made.predictions())
    if tasks or predictions:
        say(f"kept from earlier runs of this store: {tasks} tasks, {predictions} predictions")
