"""The three files of answers: submission, predictions and report; whose they are, and how they are replaced.

Beside them lie the metrics, which the run appends to while it generates (``metrics``).

They belong together and to one store. What an earlier run of the same store left is extended; files that are
something else are set aside under a numbered name, never overwritten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from activation_store import StoreSettings, StoreWriteError
from activation_store.checked_json import seal, unseal
from activation_store.local_files import write_atomic
from activation_store.report_check import settings_sha256
from arc_runner.console import say
from arc_runner.options import RunOptions
from arc_runner.predictions import Book

_MAX_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class AnswerFiles:
    """Names the three files: `NAME.json`, `NAME.predictions.json` and `NAME.report.json`.

    With own prompts there are two, `NAME.jsonl` and `NAME.report.json`: the completions are the predictions.
    """

    submission: Path
    own_prompts: bool = False

    @property
    def predictions(self) -> Path:
        """Returns where all predictions are written."""
        return self.submission.with_name(f"{self.submission.stem}.predictions.json")

    @property
    def report(self) -> Path:
        """Returns where the figures are written."""
        return self.submission.with_name(f"{self.submission.stem}.report.json")

    def metrics(self, process: int = 0) -> Path:
        """Returns where a process notes how it goes: `NAME.metrics.jsonl`, `NAME.metrics-00001.jsonl`."""
        of_process = f"-{process:05d}" if process else ""
        return self.submission.with_name(f"{self.submission.stem}.metrics{of_process}.jsonl")

    def __iter__(self) -> Iterator[Path]:
        predictions = () if self.own_prompts else (self.predictions,)
        return iter((self.submission, *predictions, self.report))

    def numbered(self, number: int) -> AnswerFiles:
        """Returns the names under which they are set aside: `NAME.1.json` and so on."""
        # With an ending in any case: the others' names begin with what comes before it.
        name = f"{self.submission.stem}.{number}{self.submission.suffix or '.json'}"
        return dataclasses.replace(self, submission=self.submission.with_name(name))


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Holds what earlier runs of the same store left: predictions, figures, and the submission's sha256.

    `strangers` are the files that something else left, or that were changed since.
    """

    book: Book
    figures: Mapping[str, Any]
    submission_sha256: str | None
    strangers: tuple[Path, ...]


def answer_files(options: RunOptions) -> AnswerFiles:
    """Returns the files of a run's answers."""
    return AnswerFiles(Path(options.output_filepath), own_prompts=options.prompts is not None)


def source_of(options: RunOptions, settings: StoreSettings) -> dict[str, str]:
    """Returns what the files say of the store they belong to.

    A local store is named from the folder of the answers, so that both can be moved together.
    """
    store, local = options.activations_dir, local_store(options)
    if local is not None:
        store = os.path.relpath(local.resolve(), Path(options.output_filepath).parent.resolve())
    return {"activations_dir": store, "settings_sha256": settings_sha256(settings)}


def local_store(options: RunOptions) -> Path | None:
    """Returns the directory of the store; None where it is behind a URL of another machine."""
    location = re.sub(r"^(file|local)://", "", options.activations_dir)
    return None if "://" in location else Path(location).expanduser()


def read_earlier(files: AnswerFiles, source: Mapping[str, str]) -> Earlier:
    """Reads what is there of the answers, and tells what belongs to the store of ``source``."""
    predictions, report = (read_sealed(path, source) for path in (files.predictions, files.report))
    book = Book()
    known: set[str] = set()
    if predictions is not None:
        try:
            book = Book.from_json(predictions["tasks"])
            known = set(predictions["submission_sha256"])
        except (ValueError, KeyError, TypeError):
            predictions = None
    submission = read_file(files.submission)
    digest = None if submission is None else hashlib.sha256(submission).hexdigest()
    ours = (digest in known, predictions is not None, report is not None)
    strangers = tuple(path for path, mine in zip(files, ours, strict=True) if path.is_file() and not mine)
    return Earlier(book, report or {}, digest if digest in known else None, strangers)


def set_aside(files: AnswerFiles) -> AnswerFiles:
    """Renames the files that are there to the next numbered names that are free, which it returns.

    Raises:
        StoreWriteError: they cannot be renamed.
    """
    number = 1
    while any(path.exists() or path.is_symlink() for path in files.numbered(number)):
        number += 1
    for path, aside in zip(files, files.numbered(number), strict=True):
        try:
            if path.is_file():
                path.rename(aside)
        except OSError as error:
            raise StoreWriteError(f"cannot rename {path} to {aside}: {error.strerror}") from error
    return files.numbered(number)


def say_aside(files: AnswerFiles, aside: AnswerFiles, strangers: Sequence[Path]) -> None:
    """Says that files were renamed because ``strangers`` among them are something else's."""
    names = ", ".join(path.name for path in strangers)
    say(
        f"what was in {files.submission} is now in {aside.submission.name} and beside it: this store did "
        f"not leave {names} like that"
    )


def write_all(
    files: AnswerFiles, source: Mapping[str, str], book: Book, figures: Mapping[str, Any], earlier: Earlier
) -> None:
    """Writes the three files, each whole or not at all; the next run mends what a crash between them leaves.

    The report comes first, since nothing else knows its figures. The predictions name the submission as it
    was and as it will be.

    Raises:
        StoreWriteError: a file cannot be written.
    """
    submission = json_bytes(book.submission())
    hashes = [hashlib.sha256(submission).hexdigest()]
    predictions = json_bytes(
        seal(
            {
                "source": dict(source),
                "submission_sha256": [*hashes, *filter(None, [earlier.submission_sha256])],
                "tasks": book.to_json(),
            }
        )
    )
    hashes.append(hashlib.sha256(predictions).hexdigest())
    names = (files.submission.name, files.predictions.name)
    report = dict(figures) | {"source": dict(source), "sha256": dict(zip(names, hashes, strict=True))}
    write_bytes(files.report, json_bytes(seal(report)))
    write_bytes(files.predictions, predictions)
    write_bytes(files.submission, submission)


def json_bytes(value: object) -> bytes:
    """Returns a value as a line of JSON; raises ValueError for NaN."""
    return f"{json.dumps(value, allow_nan=False)}\n".encode()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all; where it is a link, the file that it leads to.

    Raises:
        StoreWriteError: the file cannot be written.
    """
    try:
        write_atomic(os.path.realpath(path), [data])
    except OSError as error:
        raise StoreWriteError(f"cannot write {path}: {error.strerror or error}") from error


def read_sealed(path: Path, source: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns a sealed file's content if it is unchanged and of this source, else None."""
    data = read_file(path)
    if data is None:
        return None
    try:
        content, intact = unseal(json.loads(data))
    except (ValueError, RecursionError, AttributeError, TypeError):
        return None
    return content if intact and content.get("source") == source else None


def read_file(path: Path) -> bytes | None:
    """Returns a regular file of a plausible size; None where there is none that can be read."""
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= _MAX_BYTES else None
    except OSError:
        return None
