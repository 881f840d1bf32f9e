"""Checks what a generation is asked to do, on the host, before any device work.

Inside ``jit`` nothing can complain: JAX clamps token ids and positions out of range, in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt32

from qwen2_core.config import QwenConfig


class PromptBatch(NamedTuple):
    """Right-padded prompts as the compiled programs take them."""

    input_ids: Int32[np.ndarray, "prompts width"]  # zero past each prompt's length
    lengths: Int32[np.ndarray, " prompts"]


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceRequest:
    """One sequence to generate.

    ``id`` and ``key`` are the caller's: they come back with the finished sequence. For a store they are its
    ``SequenceId`` and its key there.
    """

    prompt_token_ids: Int32[np.ndarray, " prompt"]
    max_tokens: int
    sampling_id: int  # random keys derive from (seed, sampling_id, step)
    id: Any = None
    key: str | None = None
    capture_prompt: bool = False  # return the prompt's rows too

    @property
    def width(self) -> int:
        """The bucket that the prompt is padded to."""
        return bucket_length(len(self.prompt_token_ids))


def bucket_length(length: int) -> int:
    """Returns the width a prompt is padded to: 64, 96, 128, then four widths to each power of two: 160, 192,
    224, ...

    Programs are compiled for each width that is used. The padding, at most a fifth, is computed in vain.
    """
    step = max(32, 1 << (length - 1).bit_length() >> 3)
    return max(64, -(-length // step) * step)


def pad_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray],
) -> tuple[Int32[np.ndarray, "prompts width"], Int32[np.ndarray, " prompts"]]:
    """Right-pads token lists to one bucket: returns (input_ids, prompt_lengths).

    Raises:
        ValueError: no prompts, or an empty one.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths):
        raise ValueError("There are no prompts.")
    if not lengths.all():
        raise ValueError(f"Prompt {int(np.argmin(lengths))} is empty.")
    return pad_to(prompts, bucket_length(int(lengths.max())))


def pad_to(prompts: Sequence[Sequence[int] | np.ndarray], width: int) -> PromptBatch:
    """Right-pads token lists, none longer than ``width``, with zeros."""
    ids = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return PromptBatch(ids, np.array([len(prompt) for prompt in prompts], np.int32))


def check_prompts(config: QwenConfig, input_ids: Any, prompt_lengths: Any, max_tokens: int) -> PromptBatch:
    """Checks prompts against the model, and converts them.

    Args:
        config: the model's.
        input_ids: [P, P_len] integers, right-padded.
        prompt_lengths: [P] integers; None: the full width.
        max_tokens: tokens to generate at most.

    Raises:
        ValueError: one sentence that says what is wrong.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"input_ids must be integers [prompts, tokens], not {ids.dtype} of shape {ids.shape}."
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}.")
    if not len(ids):
        raise ValueError("input_ids holds no prompts.")
    width = ids.shape[1]
    lengths = np.full(len(ids), width) if prompt_lengths is None else np.asarray(prompt_lengths)
    if lengths.shape != (len(ids),) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"prompt_lengths must be {len(ids)} integers, one a prompt, not of shape {lengths.shape}."
        )
    if lengths.min() < 1:
        raise ValueError(f"Prompt {int(lengths.argmin())} is empty; every prompt needs at least one token.")
    if lengths.max() > width:
        raise ValueError(
            f"Prompt {int(lengths.argmax())} is said to have {lengths.max()} tokens, but input_ids is only "
            f"{width} wide."
        )
    if lengths.max() + max_tokens > config.max_position_embeddings:
        raise ValueError(
            f"A prompt of {lengths.max()} tokens and {max_tokens} new ones exceed the model's context of "
            f"{config.max_position_embeddings}; shorten the prompt or lower max_tokens."
        )
    valid = np.arange(width) < lengths[:, None]
    outside = valid & ((ids < 0) | (ids >= config.vocab_size))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"Token id {ids[row, column]} (prompt {row}, position {column}) is outside the vocabulary of "
            f"{config.vocab_size}; does the tokenizer belong to the model?"
        )
    return PromptBatch(np.where(valid, ids, 0).astype(np.int32), lengths.astype(np.int32))


def check_sequence_ids(
    prompts: int, samples_per_prompt: int, sequence_ids: Any
) -> UInt32[np.ndarray, " batch"]:
    """Checks the ids that random keys derive from, and converts them; 0..B-1 where they are None.

    Raises:
        ValueError: one sentence that says what is wrong.
    """
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt must be at least 1, not {samples_per_prompt}.")
    batch = prompts * samples_per_prompt
    ids = np.arange(batch) if sequence_ids is None else np.asarray(sequence_ids)
    if ids.shape != (batch,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"sequence_ids must be {batch} integers, one a sequence, not of shape {ids.shape}.")
    return (ids.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
