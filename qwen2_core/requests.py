"""What a generation is asked to do, checked on the host before any device work.

Inside ``jit`` nothing can complain: JAX clamps ids and slots out of range, in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen2_core.config import QwenConfig

_EOS_SLOTS = 8  # EOS ids are padded to a multiple of this, so that sets of different sizes share a program


class Request(NamedTuple):
    """Checked inputs of one call, as the compiled programs take them."""

    input_ids: np.ndarray  # [P, P_len] int32, zero past each length
    prompt_lengths: np.ndarray  # [P] int32
    sequence_ids: np.ndarray  # [B] uint32
    eos_token_ids: np.ndarray  # int32, padded with -1
    seed: np.uint32


def check_request(
    config: QwenConfig,
    input_ids: Any,
    max_tokens: int,
    *,
    prompt_lengths: Any = None,
    samples_per_prompt: int = 1,
    eos_token_ids: Sequence[int] = (),
    seed: int = 0,
    sequence_ids: Any = None,
) -> Request:
    """The arguments of ``generate_single_task_jitted``, checked and in their final types.

    Raises:
        ValueError: one sentence that says what is wrong.
    """
    ids, lengths = _check_prompts(config, input_ids, prompt_lengths, max_tokens)
    rows = _check_rows(len(ids), samples_per_prompt, sequence_ids)
    eos = _pack_eos(eos_token_ids, config.vocab_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and 2**32 - 1, not {seed}.")
    return Request(ids, lengths, rows, eos, np.uint32(seed))


def bucket_length(length: int) -> int:
    """The width a prompt is padded to: 64, 96, 128, then four to each power of two: 160, 192, 224, 256, ...

    A program is compiled for each width that is used; what is padded, up to a fifth, is computed in vain.
    """
    step = max(32, 1 << (length - 1).bit_length() >> 3)
    return max(64, -(-length // step) * step)


def pad_prompts(prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads token lists to one bucket: (input_ids [P, width], prompt_lengths [P]), int32.

    Raises:
        ValueError: no prompts, or an empty one.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths):
        raise ValueError("There are no prompts.")
    if not lengths.all():
        raise ValueError(f"Prompt {int(np.argmin(lengths))} is empty.")
    ids = np.zeros((len(lengths), bucket_length(int(lengths.max()))), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


def eos_slots(count: int) -> int:
    """The slots that so many EOS ids are padded to, of which a program is compiled."""
    return -(-max(count, 1) // _EOS_SLOTS) * _EOS_SLOTS


def _pack_eos(eos_token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """The ids as an int32 array padded with -1, which no token is."""
    for token in eos_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"EOS token id {token} is outside the vocabulary of {vocab_size}.")
    packed = np.full(eos_slots(len(eos_token_ids)), -1, np.int32)
    packed[: len(eos_token_ids)] = list(eos_token_ids)
    return packed


def _check_prompts(
    config: QwenConfig, input_ids: Any, prompt_lengths: Any, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
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
    return np.where(valid, ids, 0).astype(np.int32), lengths.astype(np.int32)


def _check_rows(prompts: int, samples_per_prompt: int, sequence_ids: Any) -> np.ndarray:
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt must be at least 1, not {samples_per_prompt}.")
    batch = prompts * samples_per_prompt
    ids = np.arange(batch) if sequence_ids is None else np.asarray(sequence_ids)
    if ids.shape != (batch,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"sequence_ids must be {batch} integers, one a sequence, not of shape {ids.shape}.")
    return (ids.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
