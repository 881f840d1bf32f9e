"""The compiled loop: prefill, one decode step, and every decode step under one ``fori_loop``/``while_loop``.

The loop's whole state is one dataclass, :class:`DecodeState`; each field keeps its shape and, donated,
its memory. Functions here are traced; ``generate_jitted`` checks their inputs on the host and compiles them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvcache_utils import (
    ActivationBufferConfig,
    KVCache,
    KVCacheConfig,
    create_activation_buffer,
    create_kv_cache_buffers,
    update_activation_buffer,
)
from qwen2_jax import QwenModel
from qwen2_jax_with_hooks import QwenModelWithActivations
from sampling import SamplingArrays, sample_tokens, sequence_keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything the decode loop carries; every field keeps its shape and is updated in place.

    Of each row, ``cache.ar.tokens_read`` generated tokens have been read so far.
    """

    cache: KVCache
    next_token: Array  # [B] int32: chosen, not yet read
    next_logprob: Array  # [B] float32
    ended: Array  # [B] bool: an EOS has been read
    token_ids: Array  # [B, columns] int32: a column a step, max_tokens or those of a window
    logprobs: Array  # [B, columns] float32
    lengths: Array  # [B] int32
    activations: Array | None  # [layers, columns, B, hidden]


def prefill_with_cache(
    model: QwenModel, params: Any, input_ids: Array, prompt_lengths: Array, cache: KVCache
) -> tuple[Array, KVCache, Array | None]:
    """Reads whole prompts and fills the prefill part of ``cache``.

    Args:
        input_ids: [P, P_len] int32, right-padded; P_len at most the cache's max_prefill_length.
        prompt_lengths: [P] int32, at least 1.

    Returns:
        logits [P, vocab] float32 that predict each prompt's first new token; the cache; and, for a
        model with hooks, the prompts' rows [layers, P_len, P, hidden], zero past each prompt's length.
    """
    with jax.named_scope("prefill"):
        mask = jnp.arange(input_ids.shape[1], dtype=jnp.int32) < prompt_lengths[:, None]
        logits, prefill, activations = _apply(model, params, input_ids, mask, cache.prefill)
        if activations is not None:
            activations = jnp.where(mask.T[None, :, :, None], activations, 0)
        return logits[:, 0], dataclasses.replace(cache, prefill=prefill), activations


def decode_step_with_cache(
    model: QwenModel, params: Any, token_ids: Array, cache: KVCache
) -> tuple[Array, KVCache, Array | None]:
    """Reads one token of every sequence.

    Args:
        token_ids: [B] int32.

    Returns:
        logits [B, vocab] float32 that predict the next token; the cache, its index one further; and,
        for a model with hooks, the rows [layers, B, hidden] of the token that was read.
    """
    with jax.named_scope("decode_step"):
        logits, cache, activations = _apply(model, params, token_ids[:, None], None, cache)
        return logits[:, 0], cache, None if activations is None else activations[:, 0]


def run_prefill(
    model: QwenModel,
    cache_config: KVCacheConfig,
    capture_prompt: bool,
    params: Any,
    input_ids: Array,
    prompt_lengths: Array,
    sampling: SamplingArrays,
    seed: Array,
    sequence_ids: Array,
) -> tuple[DecodeState, Array | None]:
    """Allocates the loop's state, reads the prompts into it and chooses every sequence's first token.

    Returns:
        the state, and with ``capture_prompt`` the prompts' rows as ``prefill_with_cache`` gives them.
    """
    cache = create_kv_cache_buffers(cache_config)
    logits, cache, rows = prefill_with_cache(model, params, input_ids, prompt_lengths, cache)
    logits = jnp.repeat(logits, cache_config.samples_per_prompt, axis=0)
    token, logprob = sample_tokens(logits, sampling, sequence_keys(seed, sequence_ids), 0)
    ended = jnp.zeros(token.shape, bool)
    state = start_decode_state(model, cache, token, logprob, ended, columns=cache.ar.capacity)
    return state, rows if capture_prompt else None


def run_decode(
    model: QwenModel,
    stop: bool,
    params: Any,
    state: DecodeState,
    sampling: SamplingArrays,
    seed: Array,
    sequence_ids: Array,
    eos_token_ids: Array,
) -> DecodeState:
    """From the prefill's state to the last token: ``max_tokens`` steps or, with ``stop``, until all rows end.

    Args:
        eos_token_ids: int32, padded with -1.
    """
    keys = sequence_keys(seed, sequence_ids)
    max_tokens = state.token_ids.shape[1]

    def body(state: DecodeState) -> DecodeState:
        return decode_one(model, params, state, state.cache.ar.index, sampling, keys, eos_token_ids)

    if not stop:
        return lax.fori_loop(0, max_tokens, lambda _, state: body(state), state)
    return lax.while_loop(
        lambda state: (state.cache.ar.index < max_tokens) & ~jnp.all(state.ended), body, state
    )


def empty_decode_state(model: QwenModel, cache_config: KVCacheConfig) -> DecodeState:
    """The state of ``run_prefill``, of zeros: its shapes and types."""
    cache = create_kv_cache_buffers(cache_config)
    rows = cache.ar.batch_size
    token, logprob = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32)
    return start_decode_state(model, cache, token, logprob, jnp.zeros(rows, bool), columns=cache.ar.capacity)


def start_decode_state(
    model: QwenModel, cache: KVCache, token: Array, logprob: Array, ended: Array, columns: int
) -> DecodeState:
    """Zeroed outputs of ``columns`` steps beside ``cache``, with activations only for a model with hooks."""
    batch, config = cache.ar.batch_size, model.config
    activations = None
    if isinstance(model, QwenModelWithActivations):
        activations = create_activation_buffer(
            ActivationBufferConfig(
                len(model.extract_layers), columns, batch, config.hidden_size, config.dtype
            )
        )
    return DecodeState(
        cache=cache,
        next_token=token,
        next_logprob=logprob,
        ended=ended,
        token_ids=jnp.zeros((batch, columns), jnp.int32),
        logprobs=jnp.zeros((batch, columns), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        activations=activations,
    )


def decode_one(
    model: QwenModel,
    params: Any,
    state: DecodeState,
    column: Array,
    sampling: SamplingArrays,
    keys: Array,
    eos: Array,
) -> DecodeState:
    """Reads ``next_token``, keeps its row in ``column`` of the outputs, chooses the one after it."""
    step, live = state.cache.ar.tokens_read, ~state.ended
    logits, cache, rows = decode_step_with_cache(model, params, state.next_token, state.cache)
    activations = state.activations
    if activations is not None and rows is not None:
        activations = update_activation_buffer(activations, jnp.where(live[:, None], rows, 0), column)
    token_column = jnp.where(live, state.next_token, 0)[:, None]
    logprob_column = jnp.where(live, state.next_logprob, 0.0)[:, None]
    next_token, next_logprob = sample_tokens(logits, sampling, keys, step + 1)
    return DecodeState(
        cache=cache,
        next_token=next_token,
        next_logprob=next_logprob,
        ended=state.ended | jnp.any(state.next_token[:, None] == eos, axis=-1),
        token_ids=lax.dynamic_update_slice(state.token_ids, token_column, (0, column)),
        logprobs=lax.dynamic_update_slice(state.logprobs, logprob_column, (0, column)),
        lengths=state.lengths + live,
        activations=activations,
    )


def _apply(
    model: QwenModel, params: Any, input_ids: Array, mask: Array | None, cache: Any
) -> tuple[Array, Any, Array | None]:
    result = model.apply({"params": params}, input_ids, mask, cache)
    if isinstance(model, QwenModelWithActivations):
        return result  # type: ignore[return-value] - (logits, cache, activations)
    return (*result, None)  # type: ignore[return-value]
