"""Counts the solved tasks while a run generates, as its report will count them.

A thread of its own reads the answers, so that nothing waits for it. Sequences of earlier runs are read from
the store first.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from activation_store import ActivationStore, FinishedSequence, SequenceRecord, StoreError
from arc_puzzles import Grid, Prediction, create_grid_encoder, vote
from arc_puzzles.scoring import ATTEMPTS
from arc_runner.cluster.work import keys_of
from arc_runner.job import Job
from arc_runner.predictions import read_grid


class _Answer(NamedTuple):
    key: str
    task_id: str
    test_index: int
    augmentation: str
    text: str
    logprobs: np.ndarray


class Judge:
    """Judges sequences of a job as they end. Without a known right answer it does nothing."""

    def __init__(self, job: Job, committed: Mapping[str, SequenceRecord]) -> None:
        self._job = job
        self._outputs = {task.task_id: task.outputs for task in job.tasks if None not in task.outputs}
        self._encoder = create_grid_encoder(job.options.grid_encoder)
        self._committed = job.records(committed)
        self._order = {key: number for number, key in enumerate(keys_of(job.requests))}
        self._ended: queue.SimpleQueue[FinishedSequence | None] = queue.SimpleQueue()
        self._predictions: dict[tuple[str, int], dict[int, Prediction]] = {}
        self._solved: set[str] = set()
        self._over = False
        self._thread = threading.Thread(target=self._judge, name="judge", daemon=True)
        if self._outputs:
            self._thread.start()

    def add(self, ended: FinishedSequence) -> None:
        """Hands over a sequence; returns at once."""
        if self._outputs:
            # Without its rows, which take much memory and are not looked at.
            self._ended.put(dataclasses.replace(ended, rows=None))

    def solved(self) -> tuple[int, int] | None:
        """Returns how many tasks are solved so far, of how many; None where no right answer is known."""
        return (len(self._solved), len(self._outputs)) if self._outputs else None

    def close(self) -> None:
        """Judges no more."""
        self._over = True
        self._ended.put(None)
        if self._outputs:
            self._thread.join(1.0)  # no longer: it may be reading from a store that is away

    def _judge(self) -> None:
        decode = self._job.tokenizer.decode
        try:
            store = ActivationStore(self._job.options.activations_dir) if self._committed else None
            for record in self._committed:
                if self._over or store is None:
                    break
                if not record.failed and record.task_id in self._outputs:
                    text = store.answer(record, self._job.tokenizer)
                    name = (record.key, record.task_id, record.test_index, record.augmentation)
                    self._take(_Answer(*name, text, store.generated_logprobs(record)))
        except (StoreError, OSError):
            pass  # the report reads it again, and says what is wrong
        while (one := self._ended.get()) is not None and not self._over:
            if one.key is not None and one.id.task_id in self._outputs:
                text = decode(one.token_ids.tolist(), skip_special_tokens=True)
                name = (one.key, one.id.task_id, one.id.test_index, one.id.augmentation)
                self._take(_Answer(*name, text, one.logprobs))

    def _take(self, answer: _Answer) -> None:
        """Counts an answer among its test's, and judges its task anew."""
        grid = read_grid(answer.text, answer.augmentation, self._encoder, self._job.opens_thinking)
        of_test = self._predictions.setdefault((answer.task_id, answer.test_index), {})
        logprob = float(answer.logprobs.sum(dtype=np.float64))
        of_test[self._order[answer.key]] = Prediction(grid, logprob)
        outputs = self._outputs[answer.task_id]
        if all(output in self._attempts(answer.task_id, i) for i, output in enumerate(outputs)):
            self._solved.add(answer.task_id)
        else:
            self._solved.discard(answer.task_id)

    def _attempts(self, task_id: str, test_index: int) -> list[Grid]:
        of_test = self._predictions.get((task_id, test_index), {})
        best = vote([of_test[number] for number in sorted(of_test)])
        return [one.grid for one in best[:ATTEMPTS]]
