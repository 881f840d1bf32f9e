"""Windows of decode steps over slots that are refilled: the traced functions of continuous generation.

A slot is a row of the batch. ``run_window`` makes W steps of all slots. What it returns is as large as the
window, however long the sequences are. Between two windows ``insert`` gives a slot whose sequence has ended a
new one, from the prompt that ``prefill_prompt`` has read.

What a sequence computes depends on nothing but itself and on two sizes of the slots: how many there are, and
how many tokens each has room for. A sequence begins at a multiple of ``STEP_ALIGNMENT`` steps, and attention
sums keys in pieces of so many steps. Its prompt is read alone. Its random keys are those of its own id and
its own steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32, UInt32

from generate_jitted import DecodeState, Rows, decode_one, prefill_with_cache, rows_of, start_decode_state
from kvcache_utils import (
    ROW_AXES,
    KVCache,
    KVCacheConfig,
    LayerBuffers,
    PrefillCache,
    axes,
    create_kv_cache_buffers,
    update_slice,
)
from qwen2_core.kernels.attention import DECODE_KEYS
from qwen2_core.sampling import SamplingParams, SamplingShape, sample_tokens, sequence_keys, tokens_in
from qwen2_core.steering import Placed, Steering
from qwen2_jax import QwenModel

STEP_ALIGNMENT = 16  # steps: sequences begin at multiples of it


@dataclasses.dataclass(frozen=True)
class SlotShape:
    """Sizes of the programs of one group of devices.

    ``slots`` sequences at once, prompts of up to ``prompt_width`` tokens, ``window`` steps between two
    refills. With 0 ``max_tokens`` prompts are read, and there are no slots.

    Raises:
        ValueError: no slots, or a window that is no multiple of ``STEP_ALIGNMENT``.
    """

    slots: int
    prompt_width: int
    max_tokens: int
    window: int = STEP_ALIGNMENT
    cache_dtype: Any = None  # the model's by default
    capture_prompt: bool = False  # prefills return the prompt's rows too
    sampling: SamplingShape = dataclasses.field(default_factory=SamplingShape)
    interventions: int = 0  # each slot has a strength of its own for each
    shared_prompts: bool = False  # slots that continue one prompt read one row; else each has its own

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots must be at least 1, not {self.slots}.")
        if self.window < 1 or self.window % STEP_ALIGNMENT:
            raise ValueError(f"window must be a multiple of {STEP_ALIGNMENT}, not {self.window}.")

    @property
    def reads_only(self) -> bool:
        """Whether prompts are read for their rows alone."""
        return self.max_tokens == 0

    @property
    def one_prompt(self) -> SlotShape:
        """The shape that prefills are compiled for: one prompt, whatever the slots and their windows."""
        return dataclasses.replace(
            self,
            slots=1,
            max_tokens=1,
            window=STEP_ALIGNMENT,
            shared_prompts=False,
            sampling=SamplingShape(repetition_penalty=self.sampling.repetition_penalty),
        )

    def cache_config(self, model: QwenModel) -> KVCacheConfig:
        """Returns the sizes of the cache, both parts in whole blocks, so that the last block is not cut."""
        config = model.config.kv_cache(
            _round_up(self.prompt_width, DECODE_KEYS),
            _round_up(self.max_tokens, self.window),
            num_prompts=self.slots,
            dtype=self.cache_dtype,
            step_alignment=STEP_ALIGNMENT,
        )
        return dataclasses.replace(config, indexed_prompts=self.shared_prompts)

    def prompt_cache_config(self, model: QwenModel) -> KVCacheConfig:
        """Returns the sizes of the cache that a prompt is read into: as wide as a slot's, no decode part."""
        slots = self.cache_config(model)
        return dataclasses.replace(slots, num_prompts=1, max_decode_length=1, indexed_prompts=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """What passes from window to window, updated in place: each slot's sequence, or the ended one it had."""

    cache: KVCache
    next_token: Int32[Array, " slots"] = dataclasses.field(metadata=ROW_AXES)  # chosen, not yet read
    next_logprob: Float32[Array, " slots"] = dataclasses.field(metadata=ROW_AXES)
    ended: Bool[Array, " slots"] = dataclasses.field(metadata=ROW_AXES)  # True: the slot is free
    sequence_ids: UInt32[Array, " slots"] = dataclasses.field(
        metadata=ROW_AXES
    )  # random keys derive from them
    limits: Int32[Array, " slots"] = dataclasses.field(metadata=ROW_AXES)  # the sequence's max_tokens
    strengths: Float32[Array, "slots interventions"] | None = dataclasses.field(
        metadata=axes("rows", "interventions")
    )
    # Tokens that the slot's sequence has; only where there is a repetition penalty.
    seen: Bool[Array, "slots vocab"] | None = dataclasses.field(metadata=axes("rows", "vocab"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """What the steps of one window returned; zero past each slot's ``counts``."""

    token_ids: Int32[Array, "slots steps"]
    logprobs: Float32[Array, "slots steps"]
    counts: Int32[Array, " slots"]  # steps, from the first, in which the slot's sequence was alive
    ended: Bool[Array, " slots"]  # after these steps
    activations: Float[Array, "layers steps slots hidden"] | None
    points: dict[str, Float[Array, "layers steps slots width"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefilledPrompt:
    """One prompt that has been read: all that a slot needs to continue it."""

    cache: PrefillCache  # of one row, as wide as a slot's
    logits: Float32[Array, "1 vocab"] = dataclasses.field(metadata=axes("rows", "vocab"))
    seen: Bool[Array, "1 vocab"] | None = dataclasses.field(metadata=axes("rows", "vocab"))  # its tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewSequence:
    """What ``insert`` gives a slot of a group of devices; none where the slot is -1.

    ``prompt_row`` is the prompt's row of the cache: the slot's own, where rows are not shared. The prompt is
    copied there unless ``prompt_is_there``.
    """

    slot: Int32[Array, 1] = dataclasses.field(metadata=ROW_AXES)
    prompt_row: Int32[Array, 1] = dataclasses.field(metadata=ROW_AXES)
    prompt_is_there: Bool[Array, 1] = dataclasses.field(metadata=ROW_AXES)
    sequence_id: UInt32[Array, 1] = dataclasses.field(metadata=ROW_AXES)
    limit: Int32[Array, 1] = dataclasses.field(metadata=ROW_AXES)  # its max_tokens
    strengths: Float32[Array, "1 interventions"] | None = dataclasses.field(
        metadata=axes("rows", "interventions"), default=None
    )


def create_slots(model: QwenModel, shape: SlotShape) -> SlotState:
    """Creates slots that are all free."""
    slots = shape.slots
    return SlotState(
        cache=create_kv_cache_buffers(shape.cache_config(model)),
        next_token=jnp.zeros(slots, jnp.int32),
        next_logprob=jnp.zeros(slots, jnp.float32),
        ended=jnp.ones(slots, bool),
        sequence_ids=jnp.zeros(slots, jnp.uint32),
        limits=jnp.zeros(slots, jnp.int32),
        strengths=jnp.zeros((slots, shape.interventions)) if shape.interventions else None,
        seen=_no_tokens(model, shape, slots),
    )


def empty_prompt(model: QwenModel, shape: SlotShape) -> PrefilledPrompt:
    """Creates a prompt's buffers with nothing read."""
    cache = create_kv_cache_buffers(shape.prompt_cache_config(model)).prefill
    logits = jnp.zeros((1, model.config.vocab_size), jnp.float32)
    return PrefilledPrompt(cache, logits, _no_tokens(model, shape, 1))


def _no_tokens(model: QwenModel, shape: SlotShape, rows: int) -> Array | None:
    if not shape.sampling.repetition_penalty:
        return None
    return jnp.zeros((rows, model.config.vocab_size), bool)


def prefill_prompt(
    model: QwenModel,
    shape: SlotShape,
    params: Any,
    input_ids: Int32[Array, "1 width"],
    length: Int32[Array, 1],
    steering: Steering | None = None,
) -> tuple[PrefilledPrompt, Rows]:
    """Reads one prompt by itself, so that no other prompt shows in its bits.

    Returns:
        the prompt, and its rows if the shape asks for them.
    """
    cache = create_kv_cache_buffers(shape.prompt_cache_config(model))
    output = prefill_with_cache(
        model, params, input_ids, length, cache, capture=shape.capture_prompt, steering=steering
    )
    seen = None
    if shape.sampling.repetition_penalty:
        seen = tokens_in(input_ids, length, model.config.vocab_size)
    return PrefilledPrompt(output.cache.prefill, output.logits, seen), rows_of(output)


def insert(
    state: SlotState, prompt: PrefilledPrompt, new: NewSequence, sampling: SamplingParams
) -> SlotState:
    """Gives a slot a new sequence: its prompt, and its first token, drawn with its own key.

    Nothing changes where the slot is -1. The whole row is written, what is not valid with zeros: a value that
    is not finite, left by a sequence that failed, would spoil its successors even where attention gives it no
    weight.
    """
    slot, row, cache = new.slot, new.prompt_row, state.cache

    def copied() -> PrefillCache:
        return PrefillCache(
            _set_row(cache.prefill.k, prompt.cache.k, row[0]),
            _set_row(cache.prefill.v, prompt.cache.v, row[0]),
            cache.prefill.length.at[row].set(prompt.cache.length),
        )

    def inserted(prefill: PrefillCache) -> SlotState:
        keys = sequence_keys(sampling.seed, new.sequence_id)
        token, logprob = sample_tokens(prompt.logits, sampling, keys, 0, prompt.seen)
        ar = dataclasses.replace(
            cache.ar,
            k=_clear_row(cache.ar.k, slot[0]),
            v=_clear_row(cache.ar.v, slot[0]),
            start=cache.ar.start.at[slot].set(cache.ar.index),
        )
        rows = None if cache.prompt_row is None else cache.prompt_row.at[slot].set(row)
        return SlotState(
            cache=KVCache(prefill, ar, rows),
            next_token=state.next_token.at[slot].set(token),
            next_logprob=state.next_logprob.at[slot].set(logprob),
            ended=state.ended.at[slot].set(False),
            sequence_ids=state.sequence_ids.at[slot].set(new.sequence_id),
            limits=state.limits.at[slot].set(new.limit),
            strengths=None if state.strengths is None else state.strengths.at[slot].set(new.strengths),
            seen=None if state.seen is None else state.seen.at[slot].set(prompt.seen),
        )

    # Not by writing the old row anew: in bfloat16 XLA on CPU would copy the whole cache for that. Nor by a
    # branch within a branch, for which it copies it too.
    with jax.named_scope("insert"):
        if cache.prompt_row is None:
            return lax.cond(slot[0] >= 0, lambda: inserted(copied()), lambda: state)
        writes = (slot[0] >= 0) & ~new.prompt_is_there[0]
        prefill = lax.cond(writes, copied, lambda: cache.prefill)
        same = dataclasses.replace(state, cache=dataclasses.replace(cache, prefill=prefill))
        return lax.cond(slot[0] >= 0, lambda: inserted(prefill), lambda: same)


def run_window(
    model: QwenModel,
    shape: SlotShape,
    params: Any,
    slots: SlotState,
    sampling: SamplingParams,
    placed: tuple[Placed, ...] = (),
) -> tuple[SlotState, Window]:
    """Makes a window of decode steps of all slots, fewer where all sequences end before."""
    window = shape.window
    keys = sequence_keys(sampling.seed, slots.sequence_ids)
    steering = Steering(placed, slots.strengths) if placed else None
    begin = slots.cache.ar.index
    cache = _idle_free_slots(slots.cache, slots.ended)
    state = start_decode_state(
        model, cache, slots.next_token, slots.next_logprob, slots.ended, columns=window, seen=slots.seen
    )

    def goes_on(state: DecodeState) -> Array:
        return (state.cache.ar.index < begin + window) & ~jnp.all(state.ended)

    def body(state: DecodeState) -> DecodeState:
        state = decode_one(model, params, state, state.cache.ar.index - begin, sampling, keys, steering)
        spent = state.cache.ar.tokens_read >= slots.limits
        return dataclasses.replace(state, ended=state.ended | spent)

    state = lax.while_loop(goes_on, body, state)
    # Also where all ended early, the next sequences begin at a multiple of the window.
    ar = dataclasses.replace(state.cache.ar, index=begin + window)
    slots = dataclasses.replace(
        slots,
        cache=dataclasses.replace(state.cache, ar=ar),
        next_token=state.next_token,
        next_logprob=state.next_logprob,
        ended=state.ended,
        seen=state.seen,
    )
    rows = state.activations, state.points
    return slots, Window(state.token_ids, state.logprobs, state.lengths, state.ended, *rows)


def _idle_free_slots(cache: KVCache, free: Array) -> KVCache:
    """Gives free slots an empty prompt and lets them begin now, so that attention reads nothing for them."""
    ar = dataclasses.replace(cache.ar, start=jnp.where(free, cache.ar.index, cache.ar.start))
    if cache.prompt_row is not None:
        return KVCache(cache.prefill, ar, jnp.where(free, -1, cache.prompt_row))
    prefill = dataclasses.replace(cache.prefill, length=jnp.where(free, 0, cache.prefill.length))
    return KVCache(prefill, ar)


def _set_row(buffers: LayerBuffers, row: LayerBuffers, slot: Array) -> LayerBuffers:
    """Replaces each layer's row at ``slot`` by the only row of ``row``."""
    if isinstance(buffers, tuple):
        return tuple(
            update_slice(layer, new, (slot, 0, 0, 0)) for layer, new in zip(buffers, row, strict=True)
        )
    assert isinstance(row, Array)
    return update_slice(buffers, row, (0, slot, 0, 0, 0))


def _clear_row(buffers: LayerBuffers, slot: Array) -> LayerBuffers:
    def zeros(array: Array, axis: int) -> Array:
        return jnp.zeros((*array.shape[:axis], 1, *array.shape[axis + 1 :]), array.dtype)

    if isinstance(buffers, tuple):
        return _set_row(buffers, tuple(zeros(layer, 0) for layer in buffers), slot)
    return _set_row(buffers, zeros(buffers, 1), slot)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
