"""Windows of decode steps over slots that are refilled: the compiled programs of continuous generation.

A slot is a row of the batch. ``run_window`` makes W steps of all slots; what it returns is as large as the
window, however long the sequences are. Between two windows ``insert`` gives slots whose sequence has ended
a new one, from the prompt that ``prefill_prompt`` has read.

What a sequence computes depends on nothing but itself and on the number of slots. It begins at a multiple
of the window, which is a multiple of the pieces that attention sums alone (``STEP_PIECE``); its prompt
is read alone; its random keys are those of its own id and its own steps. Functions here are traced;
``continuous`` compiles them and decides what goes where.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from generate_jitted import DecodeState, decode_one, prefill_with_cache, start_decode_state
from kvcache_utils import (
    KVCache,
    KVCacheConfig,
    LayerBuffers,
    PrefillCache,
    create_kv_cache_buffers,
    update_slice,
)
from qwen2_core.kernels.attention import DECODE_KEYS
from qwen2_core.sampling import SamplingArrays, sample_tokens, sequence_keys
from qwen2_jax import QwenModel

STEP_PIECE = 16  # sequences begin at multiples of it


@dataclasses.dataclass(frozen=True)
class SlotShape:
    """Sizes of the programs: ``slots`` rows, prompts of up to ``prompt_width`` tokens, W ``window`` steps."""

    slots: int
    prompt_width: int
    max_tokens: int
    window: int = STEP_PIECE
    cache_dtype: Any = None  # the model's by default

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots must be at least 1, not {self.slots}.")
        if self.window < 1 or self.window % STEP_PIECE:
            raise ValueError(f"window must be a multiple of {STEP_PIECE}, not {self.window}.")

    def cache_config(self, model: QwenModel, slots: int | None = None) -> KVCacheConfig:
        """The cache of all slots, or of so many; both parts in whole blocks, so that no last one is cut."""
        config = model.config
        return KVCacheConfig(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_prefill_length=_round_up(self.prompt_width, DECODE_KEYS),
            max_decode_length=_round_up(self.max_tokens, self.window),
            num_prompts=self.slots if slots is None else slots,
            dtype=config.dtype if self.cache_dtype is None else self.cache_dtype,
            stacked=config.scan_layers,
            begin_every=STEP_PIECE,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """What goes from window to window, updated in place: each slot's sequence, or the ended one it had."""

    cache: KVCache
    next_token: Array  # [B] int32: chosen, not yet read
    next_logprob: Array  # [B] float32
    ended: Array  # [B] bool: the slot is free
    sequence_ids: Array  # [B] uint32: what random keys derive from
    limits: Array  # [B] int32: the sequence's max_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """What W steps gave, zero past each slot's ``counts``."""

    token_ids: Array  # [B, W] int32
    logprobs: Array  # [B, W] float32
    counts: Array  # [B] int32: steps in which the slot's sequence was alive, from the first
    ended: Array  # [B] bool: after them
    activations: Array | None  # [layers, W, B, hidden]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefilledPrompt:
    """One prompt, read: what any slot needs to continue it."""

    cache: PrefillCache  # of one row, as wide as the slots'
    logits: Array  # [1, vocab] float32


def create_slots(model: QwenModel, shape: SlotShape) -> SlotState:
    """Slots that are all free."""
    slots = shape.slots
    return SlotState(
        cache=create_kv_cache_buffers(shape.cache_config(model)),
        next_token=jnp.zeros(slots, jnp.int32),
        next_logprob=jnp.zeros(slots, jnp.float32),
        ended=jnp.ones(slots, bool),
        sequence_ids=jnp.zeros(slots, jnp.uint32),
        limits=jnp.zeros(slots, jnp.int32),
    )


def empty_prompt(model: QwenModel, shape: SlotShape) -> PrefilledPrompt:
    """A prompt's buffers, nothing read."""
    config = dataclasses.replace(shape.cache_config(model, 1), max_decode_length=1)
    cache = create_kv_cache_buffers(config).prefill
    return PrefilledPrompt(cache, jnp.zeros((1, model.config.vocab_size), jnp.float32))


def prefill_prompt(
    model: QwenModel, shape: SlotShape, capture_prompt: bool, params: Any, input_ids: Array, length: Array
) -> tuple[PrefilledPrompt, Array | None]:
    """Reads one prompt, ``input_ids`` [1, width] and ``length`` [1], by itself: no other shows in its bits.

    Returns:
        the prompt, and with ``capture_prompt`` its rows [layers, width, 1, hidden].
    """
    cache = create_kv_cache_buffers(dataclasses.replace(shape.cache_config(model, 1), max_decode_length=1))
    logits, cache, rows = prefill_with_cache(model, params, input_ids, length, cache)
    return PrefilledPrompt(cache.prefill, logits), rows if capture_prompt else None


def insert(
    state: SlotState,
    prompt: PrefilledPrompt,
    slot: Array,
    sequence_id: Array,
    limit: Array,
    sampling: SamplingArrays,
    seed: Array,
) -> SlotState:
    """Gives ``slot`` [1] a new sequence: a copy of the prompt, and its first token, drawn with its own key.

    Nothing changes where the slot is -1. The whole row is written, what is not valid with zeros: a value
    that is not finite, left by a sequence that failed, would spoil its successors even where attention gives
    it no weight.
    """

    def inserted() -> SlotState:
        token, logprob = sample_tokens(prompt.logits, sampling, sequence_keys(seed, sequence_id), 0)
        prefill, ar = state.cache.prefill, state.cache.ar
        prefill = PrefillCache(
            _set_row(prefill.k, prompt.cache.k, slot[0]),
            _set_row(prefill.v, prompt.cache.v, slot[0]),
            prefill.length.at[slot].set(prompt.cache.length),
        )
        ar = dataclasses.replace(
            ar,
            k=_clear_row(ar.k, slot[0]),
            v=_clear_row(ar.v, slot[0]),
            start=ar.start.at[slot].set(ar.index),
        )
        return SlotState(
            cache=KVCache(prefill, ar),
            next_token=state.next_token.at[slot].set(token),
            next_logprob=state.next_logprob.at[slot].set(logprob),
            ended=state.ended.at[slot].set(False),
            sequence_ids=state.sequence_ids.at[slot].set(sequence_id),
            limits=state.limits.at[slot].set(limit),
        )

    # Not by writing the old row anew: in bfloat16 XLA on CPU would copy the whole cache for that.
    with jax.named_scope("insert"):
        return lax.cond(slot[0] >= 0, inserted, lambda: state)


def run_window(
    model: QwenModel,
    window: int,
    params: Any,
    slots: SlotState,
    sampling: SamplingArrays,
    seed: Array,
    eos_token_ids: Array,
) -> tuple[SlotState, Window]:
    """``window`` steps of all slots, fewer where all sequences end before.

    Args:
        eos_token_ids: int32, padded with -1.
    """
    keys = sequence_keys(seed, slots.sequence_ids)
    begin = slots.cache.ar.index
    cache = _idle_free_slots(slots.cache, slots.ended)
    state = start_decode_state(
        model, cache, slots.next_token, slots.next_logprob, slots.ended, columns=window
    )

    def goes_on(state: DecodeState) -> Array:
        return (state.cache.ar.index < begin + window) & ~jnp.all(state.ended)

    def body(state: DecodeState) -> DecodeState:
        state = decode_one(model, params, state, state.cache.ar.index - begin, sampling, keys, eos_token_ids)
        spent = state.cache.ar.tokens_read >= slots.limits
        return dataclasses.replace(state, ended=state.ended | spent)

    state = lax.while_loop(goes_on, body, state)
    # Also where all ended early, the next sequences begin at a multiple of the window.
    ar = dataclasses.replace(state.cache.ar, index=begin + window)
    slots = dataclasses.replace(
        slots,
        cache=KVCache(state.cache.prefill, ar),
        next_token=state.next_token,
        next_logprob=state.next_logprob,
        ended=state.ended,
    )
    return slots, Window(state.token_ids, state.logprobs, state.lengths, state.ended, state.activations)


def _idle_free_slots(cache: KVCache, free: Array) -> KVCache:
    """Free slots hold an empty prompt and begin now: attention reads nothing on their account."""
    prefill = dataclasses.replace(cache.prefill, length=jnp.where(free, 0, cache.prefill.length))
    ar = dataclasses.replace(cache.ar, start=jnp.where(free, cache.ar.index, cache.ar.start))
    return KVCache(prefill, ar)


def _set_row(buffers: LayerBuffers, row: LayerBuffers, slot: Array) -> LayerBuffers:
    """``buffers`` with the row of each layer at ``slot`` replaced by the only one of ``row``."""
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
