"""Checks what a generation is asked to do, on the host, before any device work.

Inside ``jit`` nothing can complain: JAX clamps token ids and positions out of range, in silence.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt32

from qwen2_core.config import QwenConfig
from qwen2_core.inputs import integer_row, mask_rows, token_rows, whole_number

LEAST_SEQUENCE_ID, MOST_SEQUENCE_ID = -(2**31), 2**32 - 1  # random keys take 32 bits of them
_MOST_SEQUENCES = 1 << 24  # in one call; far more than memory holds
_LIKELY_PADDING = 8  # repetitions of one id at an end of a single prompt


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
    max_tokens: int  # 0: read the prompt for its rows alone, with capture_prompt
    sampling_id: int  # -2**31 to 2**32 - 1; random keys derive from (seed, sampling_id, step)
    id: Any = None
    key: str | None = None
    capture_prompt: bool = False  # return the prompt's rows too
    strengths: Any = None  # of the engine's interventions: one number, or one for each; None: their own

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


def pad_prompts(prompts: Any) -> tuple[Int32[np.ndarray, "prompts width"], Int32[np.ndarray, " prompts"]]:
    """Right-pads token lists to one bucket: returns (input_ids, prompt_lengths).

    Args:
        prompts: a list of prompts, each token ids in any kind of list or array, or what a tokenizer returns
            for one text. What it returns for several will do as well. Its masks say what is padding.

    Raises:
        ValueError: no prompts, an empty one, text, or anything else that is no token id.
    """
    rows = unpadded("prompts", prompts)
    if not rows:
        raise ValueError("There are no prompts.")
    for number, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"Prompt {number} is empty.")
        outside = (row < 0) | (row >= 2**31)
        if outside.any():
            column = int(np.argmax(outside))
            raise ValueError(f"Token id {row[column]} (prompt {number}, position {column}) can be no token.")
    return pad_to(rows, bucket_length(max(map(len, rows))))


def unpadded(name: str, prompts: Any) -> list[np.ndarray]:
    """Returns prompts as ``token_rows`` takes them, without what their own masks leave out.

    Raises:
        ValueError: as ``token_rows``, or a mask with a gap.
    """
    rows, masks = token_rows(name, prompts)
    return rows if masks is None else _without_padding(rows, masks)


def pad_to(prompts: Sequence[Sequence[int] | np.ndarray], width: int) -> PromptBatch:
    """Right-pads token lists, none longer than ``width``, with zeros."""
    ids = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return PromptBatch(ids, np.array([len(prompt) for prompt in prompts], np.int32))


def check_max_tokens(max_tokens: Any, prompt_rows: bool, how: str) -> int:
    """Returns the number of tokens to generate at most; 0 only where the prompts' rows are captured.

    Raises:
        ValueError: no whole number, or nothing is asked for; ``how`` is what would ask for prompts' rows.
    """
    max_tokens = whole_number("max_tokens", max_tokens, 0)
    if not max_tokens and not prompt_rows:
        raise ValueError(
            "max_tokens 0 generates nothing, and no rows of prompts are asked for: "
            f"say {how}, of a model that captures, or give at least 1."
        )
    return max_tokens


def check_prompts(
    config: QwenConfig, input_ids: Any, prompt_lengths: Any, max_tokens: int, attention_mask: Any = None
) -> PromptBatch:
    """Checks prompts against the model, and converts them.

    Args:
        config: the model's.
        input_ids: [P, P_len] integers; a list of lists of several lengths, one prompt's ids, or what a
            tokenizer returns, its mask included. Where nothing says what is padding, all of it is read.
        prompt_lengths: [P] integers: the prompts are padded on the right.
        max_tokens: tokens to generate at most.
        attention_mask: as input_ids: 1 at tokens, 0 at padding, on the left or on the right.

    Raises:
        ValueError: one sentence that says what is wrong.
    """
    rows, masks = token_rows("input_ids", input_ids)
    if attention_mask is not None:
        if masks is not None:
            raise ValueError("attention_mask is given twice: by itself, and with the input_ids.")
        masks = mask_rows(attention_mask, rows)
    if not rows:
        raise ValueError("input_ids holds no prompts.")
    widths = {len(row) for row in rows}
    width = max(widths) if len(widths) == 1 else bucket_length(max(widths))
    lengths = None if prompt_lengths is None else _lengths(prompt_lengths, rows)
    if masks is not None:
        rows = _without_padding(rows, masks)
        for number, row in enumerate(rows):
            if lengths is not None and len(row) != lengths[number]:
                raise ValueError(
                    f"Prompt {number} has {len(row)} tokens by its attention_mask, and {lengths[number]} by "
                    "prompt_lengths; give one of the two."
                )
    elif lengths is not None:
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    elif len(widths) == 1:
        _warn_of_padding(np.stack(rows))
    longest = max(map(len, rows))
    for number, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"Prompt {number} is empty; every prompt needs at least one token.")
        outside = (row < 0) | (row >= config.vocab_size)
        if outside.any():
            column = int(np.argmax(outside))
            raise ValueError(
                f"Token id {row[column]} (prompt {number}, position {column}) is outside the vocabulary of "
                f"{config.vocab_size}; does the tokenizer belong to the model?"
            )
    if longest + max_tokens > config.context_length:
        raise ValueError(
            f"A prompt of {longest} tokens and {max_tokens} new ones exceed the model's context of "
            f"{config.context_length}; shorten the prompt or lower max_tokens."
        )
    return pad_to(rows, width)


def _lengths(given: Any, rows: Sequence[np.ndarray]) -> np.ndarray:
    lengths = integer_row("prompt_lengths", given, len(rows), "prompt")
    for number, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        if length < 1:
            raise ValueError(f"Prompt {number} is empty; every prompt needs at least one token.")
        if length > len(row):
            raise ValueError(
                f"Prompt {number} is said to have {length} tokens, but input_ids is only {len(row)} wide."
            )
    return lengths


def _without_padding(rows: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the prompts without padding, which may be at either end but not in the middle."""
    for number, valid in enumerate(masks):
        if np.count_nonzero(np.diff(valid.astype(np.int8), prepend=0) == 1) > 1:
            raise ValueError(
                f"The attention_mask of prompt {number} has a gap; it may leave out padding on the left or "
                "on the right, and no token between others."
            )
    return [row[valid] for row, valid in zip(rows, masks, strict=True)]


def _warn_of_padding(ids: np.ndarray) -> None:
    """Warns of what looks like padding in prompts [P, P_len] of which nothing says that it is.

    That is one id at the same end of the rows, repeated, where no other id is repeated at that end: as often
    in each row and nowhere else; more often in one than in another, and nowhere else or three times; in a
    single prompt, eight times and nowhere else.
    """
    if not ids.size:
        return
    for side, rows in (("right", ids[:, ::-1]), ("left", ids)):
        repeated = np.logical_and.accumulate(rows == rows[:, :1], axis=1).sum(axis=1)
        longest = int(np.argmax(repeated))
        pad, runs = rows[longest, 0], np.where(rows[:, 0] == rows[longest, 0], repeated, 0)
        most, ragged = runs.max(), runs.min() < runs.max()
        nowhere_else = np.count_nonzero(ids == pad) == runs.sum()
        if len(rows) == 1:
            likely = most >= _LIKELY_PADDING and nowhere_else
        else:
            likely = (most >= 2 and nowhere_else) or (most >= 3 and ragged)
        if likely and most < rows.shape[1] and (repeated[runs == 0] == 1).all():
            warnings.warn(
                f"input_ids look padded on the {side}, and all of it is read as tokens: give attention_mask= "
                "or prompt_lengths=.",
                stacklevel=4,
            )


def check_sequence_ids(
    prompts: int, samples_per_prompt: int, sequence_ids: Any
) -> UInt32[np.ndarray, " batch"]:
    """Checks the ids that random keys derive from, and converts them; 0..B-1 where they are None.

    Raises:
        ValueError: one sentence that says what is wrong.
    """
    batch = prompts * samples_per_prompt
    if batch > _MOST_SEQUENCES:
        raise ValueError(
            f"{batch} sequences in one call are too many (the most is {_MOST_SEQUENCES}); lower "
            "samples_per_prompt."
        )
    if sequence_ids is None:
        return np.arange(batch, dtype=np.uint32)
    ids = integer_row("sequence_ids", sequence_ids, batch, "sequence")
    outside = (ids < LEAST_SEQUENCE_ID) | (ids > MOST_SEQUENCE_ID)
    if outside.any():
        raise ValueError(
            f"sequence_ids have 32 bits, and {ids[np.argmax(outside)]} is outside of -2**31 to 2**32 - 1."
        )
    return (ids.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
