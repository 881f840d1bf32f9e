"""Text and grids of a store's tokens: the one part of its page that knows of ARC and of tokenizers."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.format import SequenceRecord, StoreError
from activation_store.prompts import load_tokenizer
from activation_store.reader import ActivationStore
from arc_puzzles import (
    ArcFormatError,
    ArcTask,
    Augmentation,
    Grid,
    GridEncoder,
    create_grid_encoder,
    load_tasks,
    parse_answer,
    read_puzzle,
)
from arc_puzzles.thinking import opens_thinking

_MOST_BYTES = 1 << 28  # of a data set that a store names
_MOST_LETTERS = 200  # of a token


@contextlib.contextmanager
def open_reader(
    store: ActivationStore, model_path: str | None = None, dataset: str | None = None
) -> Iterator["TextReader"]:
    """Opens what makes text and grids of a store's tokens.

    Without `model_path` and `dataset` they are those that the store names, if they are there; what is not
    there is said in the reader's notes.

    Raises:
        StoreError, ArcFormatError: what is given cannot be read.
    """
    notes: list[str] = []
    tokenizer = _load_tokenizer(store, model_path, notes)
    tasks = _load_tasks(store, dataset, notes)
    with contextlib.closing(tokenizer) if tokenizer else contextlib.nullcontext():
        yield TextReader(store, tokenizer, tasks, notes)


def _load_tokenizer(store: ActivationStore, model_path: str | None, notes: list[str]) -> Any:
    """Returns the tokenizer of a checkpoint, by default of the one that the store names; None without one."""
    if model_path is not None:
        return load_tokenizer(model_path)
    named = str(store.provenance.get("model_id", ""))
    try:
        if named and Path(named).is_dir():
            return load_tokenizer(named)
    except (StoreError, OSError):
        pass
    notes.append("tokens are shown by their numbers: give --model_path, the model of the store")
    return None


def _load_tasks(store: ActivationStore, dataset: str | None, notes: list[str]) -> dict[str, ArcTask]:
    """Returns the tasks of a data set by their ids; of the one that the store names if none is given."""
    if dataset is not None:
        return {task.task_id: task for task in load_tasks(dataset).tasks}
    named = Path(str(store.provenance.get("dataset", "")))
    if _encoder(store) is None:
        return {}
    try:
        if named.is_file() and named.stat().st_size <= _MOST_BYTES:
            return {task.task_id: task for task in load_tasks(named).tasks}
    except (ArcFormatError, OSError):
        pass
    notes.append("right answers are not known: give --dataset, the data set of the store")
    return {}


class TextReader:
    """Makes text and grids of a store's tokens; `notes` says what cannot be made, a sentence each."""

    def __init__(
        self, store: ActivationStore, tokenizer: Any, tasks: dict[str, ArcTask], notes: list[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._tasks = tasks
        self._encoder = _encoder(store)
        self.notes = notes
        self._changed: set[str] = set()  # tasks that the data set has otherwise

    def token(self, token_id: int) -> str:
        """Returns the text of one token; its number where there is no text."""
        if self._tokenizer is None or token_id < 0:
            return f"#{token_id}"
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if not text or "\ufffd" in text:  # part of a letter: as the vocabulary writes it
            text = self._tokenizer.convert_ids_to_tokens([token_id])[0] or f"#{token_id}"
        return text[:_MOST_LETTERS]

    def puzzle(self, record: SequenceRecord, prompt: Sequence[int]) -> dict[str, Any] | None:
        """Returns train pairs, test input and right answer as the model saw them, turned and recoloured.

        The grids are those in the prompt's tokens, or the data set's where there is no tokenizer. None for
        what is no puzzle.
        """
        if self._encoder is None:
            return None
        known = self._task(record)
        read = None
        if self._tokenizer is not None:
            read = read_puzzle(self._text(prompt), self._encoder)
        if read is None and known is None:
            return None
        truth = None
        if known is not None:
            test = known.test[record.test_index]
            truth = test.output
            if read is not None and read != (known.train, test.input):
                truth = None
                self._note_change(record.task_id)
            read = read or (known.train, test.input)
        assert read is not None
        train, asked = read
        return {
            "train": [[_rows(pair.input), _rows(pair.output)] for pair in train],
            "input": _rows(asked),
            "truth": _rows(truth),
        }

    def answer(self, record: SequenceRecord, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Returns the text of an answer, None without a tokenizer, and the grid in it as rows of digits."""
        if self._tokenizer is None or record.finish_reason == "imported":
            return {"text": None, "grid": None}
        text = self._text(tokens)
        if self._encoder is None:
            return {"text": text, "grid": None}
        opened = opens_thinking(self._tokenizer, np.asarray(prompt, np.int32))
        return {"text": text, "grid": _rows(parse_answer(text, self._encoder, opened))}

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _task(self, record: SequenceRecord) -> ArcTask | None:
        """Returns the data set's task of a sequence, augmented as for its prompt."""
        task = self._tasks.get(record.task_id)
        if task is None or record.test_index >= len(task.test):
            return None
        try:
            return task.augmented(Augmentation.parse(record.augmentation))
        except ArcFormatError:  # a store may hold any name
            return None

    def _note_change(self, task_id: str) -> None:
        if task_id not in self._changed:
            self._changed.add(task_id)
            self.notes.append(f"the data set has another puzzle {task_id} now: its right answer is left out")


def _encoder(store: ActivationStore) -> GridEncoder | None:
    """Returns the encoder of a store's grids, None where it holds no puzzles."""
    try:
        return create_grid_encoder(store.settings.prompt.get("grid_encoder", ""))
    except ArcFormatError:
        return None


def _rows(grid: Grid | None) -> list[str] | None:
    """Returns a grid as one text of digits a row."""
    return None if grid is None else ["".join(map(str, row)) for row in grid]
