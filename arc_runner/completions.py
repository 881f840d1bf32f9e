"""What a run on own prompts answers: one line of JSON a sequence, and the report beside it.

The store has everything that a line says. So the file is made anew by every run, of this run's sequences and
of all others that the store has; only those of prompts that have changed are left out. A file that is
something else's is set aside, as those of puzzles are (``answer_files``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activation_store import ActivationStore, RetryPolicy, SequenceRecord, at_once, sequence_key
from activation_store.checked_json import seal
from arc_runner.answer_files import (
    AnswerFiles,
    answer_files,
    json_bytes,
    read_file,
    read_sealed,
    say_aside,
    set_aside,
    source_of,
    write_bytes,
)
from arc_runner.console import say
from arc_runner.job import Job
from arc_runner.report import Report

# What some readers take for the end of a line, and JSON may leave as it is.
_LINE_ENDS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}


@dataclasses.dataclass(frozen=True)
class Completion:
    """Holds one line of the file. A sequence that failed has no text, and says why in ``failure``."""

    id: str
    sample: int
    text: str | None
    finish_reason: str  # "stop", "length" or "failed"
    tokens: int  # generated, with the EOS that ended the sequence
    mean_logprob: float | None  # of the generated tokens, in nats, at temperature 1
    key: str  # of the sequence in the store
    failure: str | None = None

    @property
    def line(self) -> str:
        """Returns the line, without its end."""
        values = {name: value for name, value in vars(self).items() if name != "failure" or value is not None}
        return json.dumps(values, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS)


def write_completions(
    report: Report, job: Job, records: Sequence[SequenceRecord], patiently: RetryPolicy | None = None
) -> None:
    """Reads the answers back from the store, and writes completions and report; counts them in the report.

    ``records`` are the run's committed sequences, in its order; they come first. ``patiently``
    says how a store that is away is waited for; without it the first failure counts.

    Raises:
        StoreWriteError: a file cannot be written.
    """
    files, source = answer_files(job.options), source_of(job.options, job.settings)
    completions = (patiently or at_once)(lambda: _read_completions(job, records))
    if kept := len(completions) - len(records):
        say(f"kept from earlier runs of this store: {kept} completions")
    _count(report, job, completions, new=max(0, len(records) - report.sequences_resumed))
    earlier, digest, strangers = _read_earlier(files, source)
    if strangers:
        say_aside(files, set_aside(files), strangers)
        digest = None
    report.keep_figures(earlier)
    data = "".join(f"{one.line}\n" for one in completions).encode()
    # The report comes first: between the two it knows the completions as they were and as they will be.
    figures = report.to_json() | {
        "source": dict(source),
        "sha256": {files.submission.name: hashlib.sha256(data).hexdigest()},
        "replaced_sha256": digest,
    }
    write_bytes(files.report, json_bytes(seal(figures)))
    write_bytes(files.submission, data)


def _read_completions(job: Job, records: Sequence[SequenceRecord]) -> list[Completion]:
    """Returns the completions of this run's sequences, then those that the store has besides."""
    store = ActivationStore(job.options.activations_dir)
    made = {record.key for record in records}
    prompts = {request.id.task_id: request.id for request in job.requests}
    unusable = {failure.task_id for failure in job.failures}

    def is_of_now(record: SequenceRecord) -> bool:
        prompt = prompts.get(record.task_id)
        if prompt is None:
            return record.task_id not in unusable
        same = dataclasses.replace(prompt, sample_index=record.sample_index)
        return sequence_key(job.settings, same) == record.key

    others = [one for one in store.index.records() if one.key not in made and is_of_now(one)]
    return [_completion(store, record, job.tokenizer) for record in (*records, *others)]


def _completion(store: ActivationStore, record: SequenceRecord, tokenizer: Any) -> Completion:
    if record.failed:
        name = (record.task_id, record.sample_index)
        return Completion(*name, None, record.finish_reason, 0, None, record.key, record.failure)
    return Completion(
        record.task_id,
        record.sample_index,
        store.answer(record, tokenizer),
        record.finish_reason,
        record.generated_length,
        float(store.generated_logprobs(record).mean(dtype=np.float64)) if record.generated_length else None,
        record.key,
    )


def _count(report: Report, job: Job, completions: Sequence[Completion], new: int) -> None:
    """Counts what the file has: prompts, those of the run that failed, and sequences."""
    names = {name for name, _ in job.outline}
    report.tasks = len(names | {one.id for one in completions})
    report.tasks_failed = [{"task_id": one.task_id, "reason": one.reason} for one in job.failures]
    report.sequences, report.sequences_resumed = len(completions), len(completions) - new
    report.sequences_failed = [
        {"sequence": f"{one.id} sample {one.sample}", "reason": one.failure}
        for one in completions
        if one.failure is not None
    ]


def _read_earlier(
    files: AnswerFiles, source: Mapping[str, str]
) -> tuple[Mapping[str, Any], str | None, list[Path]]:
    """Returns the earlier report of this store, the completions' sha256, and the files that are others'."""
    report = read_sealed(files.report, source)
    found = read_file(files.submission)
    digest = None if found is None else hashlib.sha256(found).hexdigest()
    known = [] if report is None else [*report["sha256"].values(), report["replaced_sha256"]]
    ours = (digest in known, report is not None)
    strangers = [path for path, mine in zip(files, ours, strict=True) if path.is_file() and not mine]
    return report or {}, digest, strangers
