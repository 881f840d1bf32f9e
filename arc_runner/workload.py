"""Decides what a run will generate, before the weights are read: tasks or prompts to requests to calls."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from activation_store import SequenceId, StoreSettings, sequence_key
from arc_puzzles import (
    LoadedTasks,
    TaskFailure,
    build_messages,
    choose_augmentations,
    create_grid_encoder,
    encode_prompts,
)
from arc_puzzles.prompt_files import LoadedPrompts, encode_own
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
    loaded: LoadedTasks | LoadedPrompts,
    tokenizer: Any,
    options: RunOptions,
    settings: StoreSettings,
    context: int,
) -> tuple[list[SequenceRequest], list[TaskFailure]]:
    """Builds what is to be generated for every task or own prompt, in the order of its predictions.

    A task with a prompt that is too long is a failure as a whole. ``context`` is the model's largest number
    of tokens, prompt and answer together. ``settings`` are the store's: they decide each sequence's key.
    """
    if isinstance(loaded, LoadedPrompts):
        asked, failures = _ask_prompts(loaded, tokenizer, options)
    else:
        asked, failures = _ask_puzzles(loaded, tokenizer, options), []
    requests: list[SequenceRequest] = []
    for one in asked:
        problem = _problem(one, options.max_output_tokens, context)
        if problem:
            failures.append(TaskFailure(one.name, problem, one.n_tests))
        else:
            requests += [_request(sequence_id, options, settings) for sequence_id in one.ids]
    return requests, failures


class _Asked(NamedTuple):
    """Holds the sequences of a task or of an own prompt, and what its prompts are called."""

    name: str
    n_tests: int
    ids: list[SequenceId]
    called: Callable[[SequenceId], str]


def _ask_puzzles(loaded: LoadedTasks, tokenizer: Any, options: RunOptions) -> list[_Asked]:
    encoder = create_grid_encoder(options.grid_encoder)
    variants = choose_augmentations(options.augmentations, options.random_seed)
    asked = [
        (task, variant, test_index)
        for task in loaded.tasks
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
                options.thinking,
            )
    ids_of: dict[str, list[SequenceId]] = {task.task_id: [] for task in loaded.tasks}
    for (task, variant, test_index), prompt in zip(asked, prompts, strict=True):
        for sample in range(options.samples_per_prompt):
            ids_of[task.task_id].append(SequenceId(task.task_id, test_index, sample, str(variant), prompt))
    return [
        _Asked(
            task.task_id,
            len(task.test),
            ids_of[task.task_id],
            lambda one: f"the prompt of test {one.test_index} ({one.augmentation})",
        )
        for task in loaded.tasks
    ]


def _ask_prompts(
    loaded: LoadedPrompts, tokenizer: Any, options: RunOptions
) -> tuple[list[_Asked], list[TaskFailure]]:
    asked: list[_Asked] = []
    failures: list[TaskFailure] = []
    done = 0
    with Waiting(lambda: f"tokenizing: {done} of {len(loaded.prompts)} prompts"):
        for part in _ranges(len(loaded.prompts), _PROMPTS_AT_ONCE):
            prompts = loaded.prompts[part.start : part.stop]
            encoded = encode_own(tokenizer, [one.content for one in prompts], options.thinking)
            done = part.stop
            for one, token_ids in zip(prompts, encoded, strict=True):
                if isinstance(token_ids, str):
                    failures.append(TaskFailure(one.prompt_id, f"{one.place} {token_ids}"))
                    continue
                ids = [
                    SequenceId(one.prompt_id, 0, sample, "identity", token_ids)
                    for sample in range(options.samples_per_prompt)
                ]
                called = f"{one.place}: the prompt"
                asked.append(_Asked(one.prompt_id, 1, ids, lambda _, called=called: called))
    return asked, failures


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


def _problem(asked: _Asked, new_tokens: int, context: int) -> str | None:
    """Returns why the prompts cannot be run, or None."""
    for one in asked.ids:
        if len(one.prompt_token_ids) + new_tokens > context:
            return (
                f"{asked.called(one)} has {len(one.prompt_token_ids)} tokens; with --max_output_tokens "
                f"{new_tokens} that exceeds the model's context of {context}"
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
