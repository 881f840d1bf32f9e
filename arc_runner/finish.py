"""How a run ends: its answers, its report and its exit code, alone or together with other processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from activation_store import (
    ActivationStore,
    ActivationWriter,
    RetryPolicy,
    SequenceRecord,
    at_once,
    check_settings,
)
from arc_runner.answer_files import answer_files
from arc_runner.answers import write_answers
from arc_runner.cluster.claims import Claims
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.merge import answer_once, gather_figures, leave_figures, merge_figures
from arc_runner.cluster.shared_files import SharedFiles
from arc_runner.console import say, show
from arc_runner.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_TASKS_FAILED
from arc_runner.job import Job
from arc_runner.live_lines import is_terminal
from arc_runner.report import Report


def answer(
    job: Job,
    report: Report,
    committed: Mapping[str, SequenceRecord],
    patiently: RetryPolicy | None = None,
) -> int:
    """Writes the answers to what is committed, prints the report, and returns the exit code."""
    records = (patiently or at_once)(lambda: job.records(committed))
    report.stopped_early = len(records) < len(job.requests)
    if not report.processes:
        report.measure_memory()
        report.stamp()
    book = write_answers(report, job, records, patiently)
    files = answer_files(job.options)
    if is_terminal(sys.stdout):
        from arc_runner.end_screen import draw_end  # rich takes time to import

        show(draw_end(report, job.tasks, book))
    else:
        say(report.text())
    answers = f"answers in {files.submission}, all predictions in {files.predictions}"
    if files.own_prompts:
        answers = f"completions in {files.submission}"
    say(f"activations in {job.options.activations_dir}, {answers}, report in {files.report}")
    return _exit_code(job, records)


def answer_together(
    job: Job, part: Job, report: Report, writer: ActivationWriter, claims: Claims, process: ProcessInfo
) -> int:
    """Leaves this process's figures for the others, and answers for all if it is the last one to end.

    Returns the exit code, which is about ``part``, this process's part of the job.
    """
    report.measure_memory()
    report.stamp()
    patiently = claims.files.patiently
    written = leave_figures(claims.files, process.index, report, writer.sequences_written)
    made = f"{process}: {writer.sequences_written} sequences made"
    if left := job.left(writer.committed):
        say(f"{made}; {left} of all are left, the answers are written once all are done")
    else:

        def answer_for_all() -> None:
            figures = gather_figures(claims.files, process.count)
            if process.claims and len(figures) == 1 and not claims.sees_others():
                say(
                    f"{process}: no other process has been seen in {job.options.activations_dir}; unless "
                    "they were stopped, compare their --activations_dir"
                )
            merge_figures(report, figures)
            answer(job, report, writer.committed, patiently)

        answered_by = answer_once(claims, str(process), written, answer_for_all)
        if answered_by != str(process):
            say(f"{made}; the answers are written by {answered_by}")
    return _exit_code(part, patiently(lambda: part.records(writer.committed)))


def answer_from_store(job: Job, report: Report) -> int:
    """Answers with what is in the store, whichever processes made it (``--merge``); returns the exit code.

    Raises:
        StoreError: there is no store, or it was made with other settings.
    """
    directory = job.options.activations_dir
    store = ActivationStore(directory)
    check_settings(store.settings, job.settings, directory)
    report.sequences_resumed = len(job.records(store.index))
    merge_figures(report, gather_figures(SharedFiles(directory, read_only=True)))
    return answer(job, report, store.index)


def _exit_code(job: Job, records: Sequence[SequenceRecord]) -> int:
    if len(records) < len(job.requests):
        return EXIT_RESUMABLE
    failed = job.failures or any(record.failed for record in records)
    return EXIT_TASKS_FAILED if failed else EXIT_DONE
