"""Reads what one forward pass of the model is given: token ids and an attention mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Bool, Int32

from kvcache_utils import KVCache, PrefillCache


def read_token_ids(given: ArrayLike, vocab_size: int) -> Int32[Array, "batch tokens"]:
    """Returns ids as int32; those outside the vocabulary stay outside, also where they have 64 bits.

    Raises:
        ValueError: another shape than [batch, tokens], or no integers.
    """
    ids: Any = given if isinstance(given, jax.Array) else np.asarray(given)  # not cut to 32 bits yet
    if ids.ndim != 2:
        raise ValueError(f"input_ids must be [batch, tokens], not of shape {ids.shape}.")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"input_ids must be integers, not {ids.dtype}.")
    if ids.dtype.itemsize > 4:
        ids = ids.clip(-1, vocab_size)
    return jnp.asarray(ids).astype(jnp.int32)


def read_mask(
    given: ArrayLike | None, ids: tuple[int, ...], kv_caches: Any
) -> Bool[Array, "batch positions"] | None:
    """Returns an attention mask as booleans, if it is one for ids of this shape and for these caches.

    Raises:
        ValueError: another shape, other values than integers or booleans, a mask for a decode step, or
            padding on the left in a prefill (there only where the mask is no tracer).
    """
    if given is None:
        return None
    if isinstance(kv_caches, KVCache):
        raise ValueError("A decode step takes no attention_mask: its cache knows which positions are valid.")
    mask: Any = given if isinstance(given, jax.Array) else np.asarray(given)
    past = 0
    if kv_caches and not isinstance(kv_caches, PrefillCache):
        past = kv_caches[0][0].shape[2]
    positions = ids[1] + past
    if mask.shape != (ids[0], positions) or not (
        mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)
    ):
        raise ValueError(
            f"attention_mask must be [{ids[0]}, {positions}], integers or booleans that are nonzero at "
            f"tokens, not {mask.dtype} of shape {mask.shape}."
        )
    if isinstance(kv_caches, PrefillCache) and not isinstance(mask, Tracer):
        valid = np.asarray(mask) != 0
        if (valid[:, 1:] & ~valid[:, :-1]).any():
            raise ValueError("A prefill's attention_mask must have its padding on the right.")
    return jnp.asarray(mask) != 0


def text_lengths(
    positions: Int32[Array, "batch tokens"],
    key_valid: Bool[Array, "batch positions"] | None,
    kv_caches: Any,
    prompt_lengths: ArrayLike | None,
) -> Int32[Array, "batch tokens"]:
    """Returns the length of the text in which each token is read, for RoPE that follows it.

    That is the number of positions up to the row's last token of this forward pass, padding left out. With
    ``prompt_lengths`` a pass over a whole sequence gives each token the length that it had when it was
    generated: the prompt's, or for a generated token its position plus one.
    """
    own = positions + 1
    if isinstance(kv_caches, KVCache):
        return own
    if prompt_lengths is not None and not isinstance(kv_caches, PrefillCache):
        return jnp.maximum(own, jnp.asarray(prompt_lengths, jnp.int32).reshape(-1, 1))
    if key_valid is not None:
        own = jnp.where(key_valid[:, -positions.shape[1] :], own, 0)
    return jnp.broadcast_to(own.max(axis=1, keepdims=True), positions.shape)
