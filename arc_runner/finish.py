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
from arc_runner.cluster.barrier import DONE, STOPPED, tell_end, wait_for_others
from arc_runner.cluster.figures import figures_of, gather_figures, leave_figures, merge_figures
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.console import say, show
from arc_runner.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_TASKS_FAILED
from arc_runner.job import Job
from arc_runner.live_lines import is_terminal
from arc_runner.report import Report
from arc_runner.signals import StopRequest
from arc_runner.waiting import Waiting


def answer(
    job: Job,
    report: Report,
    committed: Mapping[str, SequenceRecord],
    patiently: RetryPolicy | None = None,
) -> int:
    """Writes the answers to what is committed, prints the report, and returns the exit code."""
    with Waiting("reading the answers back"):
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
    job: Job,
    part: Job,
    report: Report,
    writer: ActivationWriter,
    process: ProcessInfo,
    stop: StopRequest,
    patiently: RetryPolicy,
) -> int:
    """Ends one of several processes: leaves its figures, and answers for all or says who does.

    Process 0 of a cluster waits for the others and answers; of shards, which do not know each other, the one
    that finds nothing left. Returns the exit code, which is about ``part``, this process's part of the job;
    that of process 0 is about the whole job.
    """
    report.measure_memory()
    report.stamp()
    directory = job.options.activations_dir
    leave_figures(directory, figures_of(report, process.index, writer.sequences_written), patiently)

    def left() -> int:
        patiently(writer.refresh)
        return job.left(writer.committed)

    missing = left()
    code = _exit_code(part, part.records(writer.committed))
    made = f"{process}: {writer.sequences_written} sequences made"
    if process.coordinator and process.index:
        is_there = tell_end(process, STOPPED if code == EXIT_RESUMABLE else DONE)
        who = "process 0 answers once all have ended" if is_there else f"process 0 has ended; {_GO_ON}"
        say(f"{made}; {missing} of all are left; {who}")
        return code
    if process.coordinator and not stop.requested:
        ended = wait_for_others(process, left, stop)
        missing = job.left(writer.committed)
        if missing:
            say(f"{process}: {_ends(process, ended)}")
            code = EXIT_RESUMABLE
    if missing:
        say(f"{made}; {missing} of all are left; {_GO_ON}")
        return code
    merge_figures(report, gather_figures(directory, process.count, patiently))
    return answer(job, report, writer.committed, patiently)


_GO_ON = (
    "the same command makes what is missing, any number of processes may; --merge answers with what is there"
)


def _ends(process: ProcessInfo, ended: Mapping[int, str]) -> str:
    """Says of the processes that did not do all of their part what is known."""
    stopped = [str(index) for index, how in sorted(ended.items()) if how == STOPPED]
    if stopped:
        return f"process {', '.join(stopped)} stopped early"
    silent = [str(index) for index in range(process.count) if index not in {process.index, *ended}]
    return f"nothing has been heard of process {', '.join(silent)} and nothing stored for a while"


def answer_from_store(job: Job, report: Report) -> int:
    """Answers with what is in the store, whichever processes made it (``--merge``); returns the exit code.

    Raises:
        StoreError: there is no store, or it was made with other settings.
    """
    directory = job.options.activations_dir
    store = ActivationStore(directory)
    check_settings(store.settings, job.settings, directory)
    report.sequences_resumed = len(job.records(store.index))
    merge_figures(report, gather_figures(directory))
    return answer(job, report, store.index)


def _exit_code(job: Job, records: Sequence[SequenceRecord]) -> int:
    if len(records) < len(job.requests):
        return EXIT_RESUMABLE
    failed = job.failures or any(record.failed for record in records)
    return EXIT_TASKS_FAILED if failed else EXIT_DONE
