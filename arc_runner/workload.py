"""Decides what a run will generate, before the weights are read: tasks to requests, requests to calls."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np

from activation_store import SequenceId, StoreSettings, sequence_key
from arc_puzzles import (
    ArcTask,
    TaskFailure,
    build_messages,
    choose_augmentations,
    create_grid_encoder,
    encode_prompts,
)
from arc_runner.options import RunOptions
from arc_runner.waiting import Waiting
from qwen2_core.requests import SequenceRequest

_PROMPTS_AT_ONCE = 256  # a prompt being tokenized takes some 100 bytes a token


@dataclasses.dataclass(frozen=True)
class Call:
    """Holds one compiled call: sequences of one task, samples of one prompt adjacent, padded to one width."""

    requests: tuple[SequenceRequest, ...]
    samples_per_prompt: int
    width: int

    @property
    def prompts(self) -> list[np.ndarray]:
        """Returns the call's prompts, int32 [n] each."""
        return [request.prompt_token_ids for request in self.requests[:: self.samples_per_prompt]]


def build_requests(
    tasks: Sequence[ArcTask], tokenizer: Any, options: RunOptions, settings: StoreSettings, context: int
) -> tuple[list[SequenceRequest], list[TaskFailure]]:
    """Builds what is to be generated for every task, in the order of its predictions.

    A task with a prompt that is too long is a failure as a whole. ``context`` is the model's largest number
    of tokens, prompt and answer together. ``settings`` are the store's: they decide each sequence's key.
    """
    encoder = create_grid_encoder(options.grid_encoder)
    variants = choose_augmentations(options.augmentations, options.random_seed)
    asked = [
        (task, variant, test_index)
        for task in tasks
        for variant in variants
        for test_index in range(len(task.test))
    ]
    prompts: list[np.ndarray] = []
    with Waiting(lambda: f"tokenizing: {len(prompts)} of {len(asked)} prompts"):
        for part in _ranges(len(asked), _PROMPTS_AT_ONCE):
            prompts += encode_prompts(
                tokenizer,
                [
                    build_messages(task.augmented(variant), test_index, encoder, options.prompt_version)
                    for task, variant, test_index in asked[part.start : part.stop]
                ],
            )
    ids_of: dict[str, list[SequenceId]] = {task.task_id: [] for task in tasks}
    for (task, variant, test_index), prompt in zip(asked, prompts, strict=True):
        for sample in range(options.samples_per_prompt):
            ids_of[task.task_id].append(SequenceId(task.task_id, test_index, sample, str(variant), prompt))
    requests: list[SequenceRequest] = []
    failures: list[TaskFailure] = []
    for task in tasks:
        ids = ids_of[task.task_id]
        problem = _problem(ids, options.max_output_tokens, context)
        if problem:
            failures.append(TaskFailure(task.task_id, problem, len(task.test)))
        else:
            requests += [_request(sequence_id, options, settings) for sequence_id in ids]
    return requests, failures


def _request(sequence_id: SequenceId, options: RunOptions, settings: StoreSettings) -> SequenceRequest:
    return SequenceRequest(
        sequence_id.prompt_token_ids,
        options.max_output_tokens,
        sampling_id=sampling_id(sequence_id),
        id=sequence_id,
        key=sequence_key(settings, sequence_id),
        capture_prompt=options.extract_prompt and sequence_id.sample_index == 0,  # all samples share it
    )


def plan_calls(
    requests: Sequence[SequenceRequest], options: RunOptions, committed: Container[str | None]
) -> list[Call]:
    """Plans the calls that are left to make, those of short prompts first.

    A call is a task's prompts, padded to the bucket of the longest, split so that at most ``batch_size``
    sequences run at once and prompts come in powers of two: few different shapes, so few programs, and
    no padding rows. A call of which any sequence is missing is run whole: a sequence's last bits may
    depend on the shape of its batch, and a resumed run must give the same bytes.
    """
    samples = options.samples_per_prompt
    by_task: dict[str, list[SequenceRequest]] = {}
    for request in requests:
        by_task.setdefault(request.id.task_id, []).append(request)
    widths = {task_id: max(one.width for one in members) for task_id, members in by_task.items()}
    calls = []
    for task_id in sorted(by_task, key=widths.__getitem__):
        prompts = [by_task[task_id][i : i + samples] for i in range(0, len(by_task[task_id]), samples)]
        for part in _ranges(samples, options.batch_size):
            for chunk in _chunks(prompts, options.batch_size // len(part)):
                of_call = tuple(prompt[sample] for prompt in chunk for sample in part)
                calls.append(Call(of_call, len(part), widths[task_id]))
    return [call for call in calls if any(request.key not in committed for request in call.requests)]


def sampling_id(sequence: SequenceId) -> int:
    """Returns 32 bits that identify the sequence for its random keys, the same in whichever batch it runs."""
    name = f"{sequence.task_id}/{sequence.test_index}/{sequence.augmentation}/{sequence.sample_index}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def _problem(ids: Sequence[SequenceId], new_tokens: int, context: int) -> str | None:
    """Returns why the prompts cannot be run, or None."""
    for one in ids:
        if len(one.prompt_token_ids) + new_tokens > context:
            return (
                f"the prompt of test {one.test_index} ({one.augmentation}) has {len(one.prompt_token_ids)} "
                f"tokens; with --max_output_tokens {new_tokens} that exceeds the model's context of {context}"
            )
    return None


def _ranges(total: int, most: int) -> Iterator[range]:
    """Yields ranges of at most ``most`` that make up ``range(total)``."""
    for start in range(0, total, most):
        yield range(start, min(start + most, total))


def _chunks(prompts: list[Any], most: int) -> Iterator[list[Any]]:
    """Yields the prompts in pieces whose sizes are powers of two, at most ``most``, largest first."""
    size = 1 << (most.bit_length() - 1)
    start = 0
    while start < len(prompts):
        while size > len(prompts) - start:
            size //= 2
        yield prompts[start : start + size]
        start += size
