"""What a run will do, decided before the weights are read: tasks to prompts, prompts to compiled calls."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from activation_store import SequenceId
from arc_puzzles import (
    ArcTask,
    Augmentation,
    TaskFailure,
    build_messages,
    choose_augmentations,
    create_grid_encoder,
    encode_prompt,
)
from arc_runner.options import RunOptions
from qwen2_core.requests import bucket_length


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Holds one prompt of a task: a test input, shown in one augmentation."""

    task_id: str
    test_index: int
    augmentation: Augmentation
    token_ids: np.ndarray  # int32 [n]

    def sequence(self, sample_index: int) -> SequenceId:
        """Returns the identity of one of the prompt's samples."""
        return SequenceId(self.task_id, self.test_index, sample_index, str(self.augmentation), self.token_ids)


class Keyed(NamedTuple):
    """Holds a sequence of the run with its key in the store, which takes a while to compute."""

    key: str
    id: SequenceId


@dataclasses.dataclass(frozen=True)
class Call:
    """Holds one compiled call: prompts of one task, padded to ``width`` tokens, and the samples of each."""

    prompts: tuple[Prompt, ...]
    samples: range
    width: int

    @property
    def sequences(self) -> list[SequenceId]:
        """Returns the call's sequences in the order of its rows: samples of one prompt are adjacent."""
        return [prompt.sequence(sample) for prompt in self.prompts for sample in self.samples]


def build_prompts(
    tasks: Sequence[ArcTask], tokenizer: Any, options: RunOptions, context: int
) -> tuple[list[Prompt], list[TaskFailure]]:
    """Builds the prompts of every task; a task with a prompt that is too long is a failure as a whole.

    ``context`` is the model's largest number of tokens, prompt and answer together.
    """
    encoder = create_grid_encoder(options.grid_encoder)
    variants = choose_augmentations(options.augmentations, options.random_seed)
    prompts: list[Prompt] = []
    failures: list[TaskFailure] = []
    for task in tasks:
        built = []
        for variant in variants:
            augmented = task.augmented(variant)
            for test_index in range(len(task.test)):
                messages = build_messages(augmented, test_index, encoder, options.prompt_version)
                token_ids = encode_prompt(tokenizer, messages)
                built.append(Prompt(task.task_id, test_index, variant, token_ids))
        problem = _problem(built, options.max_output_tokens, context)
        if problem:
            failures.append(TaskFailure(task.task_id, problem))
        else:
            prompts += built
    return prompts, failures


def plan_calls(
    prompts: Sequence[Prompt], options: RunOptions, is_done: Callable[[SequenceId], bool]
) -> list[Call]:
    """Plans the calls that are left to make, those of short prompts first.

    A call is a task's prompts, padded to the bucket of the longest, split so that at most ``batch_size``
    sequences run at once and prompts come in powers of two: few different shapes, so few programs, and
    no padding rows. A call of which any sequence is missing is run whole: a sequence's last bits may
    depend on the shape of its batch, and a resumed run must give the same bytes.
    """
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task_id, []).append(prompt)
    widths = {
        task_id: bucket_length(max(len(prompt.token_ids) for prompt in members))
        for task_id, members in by_task.items()
    }
    calls = []
    for task_id in sorted(by_task, key=widths.__getitem__):
        for samples in _ranges(options.samples_per_prompt, options.batch_size):
            for chunk in _chunks(by_task[task_id], options.batch_size // len(samples)):
                calls.append(Call(tuple(chunk), samples, widths[task_id]))
    return [call for call in calls if not all(is_done(sequence) for sequence in call.sequences)]


def sampling_id(sequence: SequenceId) -> int:
    """Returns 32 bits that identify the sequence for its random keys, the same in whichever batch it runs."""
    name = f"{sequence.task_id}/{sequence.test_index}/{sequence.augmentation}/{sequence.sample_index}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def _problem(prompts: Sequence[Prompt], new_tokens: int, context: int) -> str | None:
    """Returns why the prompts cannot be run, or None."""
    for prompt in prompts:
        if len(prompt.token_ids) + new_tokens > context:
            return (
                f"the prompt of test {prompt.test_index} ({prompt.augmentation}) has {len(prompt.token_ids)} "
                f"tokens; with --max_output_tokens {new_tokens} that exceeds the model's context of {context}"
            )
    return None


def _ranges(total: int, most: int) -> Iterator[range]:
    """Yields ranges of at most ``most`` that make up ``range(total)``."""
    for start in range(0, total, most):
        yield range(start, min(start + most, total))


def _chunks(prompts: list[Prompt], most: int) -> Iterator[list[Prompt]]:
    """Yields the prompts in pieces whose sizes are powers of two, at most ``most``, largest first."""
    size = 1 << (most.bit_length() - 1)
    start = 0
    while start < len(prompts):
        while size > len(prompts) - start:
            size //= 2
        yield prompts[start : start + size]
        start += size
