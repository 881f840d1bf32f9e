"""Fixed buffers for generation: the two-part KV cache and the activation buffer.

The cache follows MaxText's layout: a **prefill** part, written once, one row per *prompt*, and an
**ar** (autoregressive) part, one row per *sequence* and one slot per decode step. The two are never
concatenated, so several sequences that continue one prompt share its prefill part ("bifurcated
attention", Athiwaratkun et al. 2024), and ragged prompts need neither left padding nor scatters:
prompts differ in ``length``, decode steps are aligned. Keys are stored rotated.

The ar part is a ring over decode steps: step t is written to slot ``t % capacity`` of all rows alike. Each
row remembers the step at which its sequence began, so that rows may begin at different times and a row
whose sequence has ended can take another one, without a scatter (``start`` is 0 where all begin together).

Everything here is pure, safe under ``jit`` and keeps every shape. A layer is chosen by an index into
either a tuple of per-layer buffers (unrolled layers) or one stack ``[layers, ...]`` (scanned layers);
both are updated in place when the buffers are donated.

    config = KVCacheConfig(num_layers=24, num_kv_heads=2, head_dim=64,
                           max_prefill_length=256, max_decode_length=1100)
    config.nbytes                                          # 33_325_056 bytes at float32 (three scalars more)
    cache = create_kv_cache_buffers(config)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# One array [layers, rows, kv_heads, slots, head_dim], or a tuple of `layers` arrays without the first axis.
LayerBuffers = Array | tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class KVCacheConfig:
    """Sizes of one KV cache. ``num_prompts * samples_per_prompt`` sequences share the prefill rows."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_prefill_length: int
    max_decode_length: int
    num_prompts: int = 1
    samples_per_prompt: int = 1
    dtype: Any = jnp.float32
    stacked: bool = False
    begin_every: int | None = None  # rows begin at multiples of so many steps; None: all at step 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("dtype", "stacked") and value is not None and value < 1:
                raise ValueError(f"KVCacheConfig.{field.name} must be at least 1, not {value}.")

    @property
    def batch_size(self) -> int:
        """Sequences: ``num_prompts * samples_per_prompt``."""
        return self.num_prompts * self.samples_per_prompt

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, known before anything is allocated."""
        per_slot = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        slots = self.num_prompts * self.max_prefill_length + self.batch_size * self.max_decode_length
        return per_slot * slots + 4 * self.num_prompts + 4 * self.batch_size + 4


@dataclasses.dataclass(frozen=True)
class ActivationBufferConfig:
    """Sizes of one activation buffer ``[num_layers, max_tokens, batch_size, hidden_size]``."""

    num_layers: int
    max_tokens: int
    batch_size: int
    hidden_size: int
    dtype: Any = jnp.float32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.num_layers, self.max_tokens, self.batch_size, self.hidden_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, known before anything is allocated."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillCache:
    """The prompts' keys and values, right-padded; slot j of prompt p is valid where j < length[p]."""

    k: LayerBuffers  # [P, kv_heads, max_prefill_length, head_dim] a layer
    v: LayerBuffers
    length: Array  # [P] int32

    @property
    def capacity(self) -> int:
        """Prompt tokens the buffers have room for: max_prefill_length."""
        return _shape(self.k)[2]

    @property
    def valid(self) -> Array:
        """[P, max_prefill_length] bool: the slots that hold a prompt token."""
        return jnp.arange(self.capacity, dtype=jnp.int32) < self.length[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ARCache:
    """The generated tokens' keys and values, a ring: step t of all rows is in slot ``t % capacity``.

    Row b's sequence holds the steps from ``start[b]`` on; earlier ones belong to another sequence.
    """

    k: LayerBuffers  # [B, kv_heads, max_decode_length, head_dim] a layer
    v: LayerBuffers
    index: Array  # int32 scalar: the step being made, advanced once per token, not once per layer
    start: Array  # [B] int32: the step at which each row's sequence began
    begin_every: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Decode steps that a sequence has room for: max_decode_length."""
        return _shape(self.k)[2]

    @property
    def tokens_read(self) -> Array:
        """[B] int32: the generated tokens that each row's sequence has read."""
        return self.index - self.start

    @property
    def batch_size(self) -> int:
        return _shape(self.k)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Both parts. B sequences continue P prompts; sequence b continues prompt ``b // (B // P)``."""

    prefill: PrefillCache
    ar: ARCache

    @property
    def samples_per_prompt(self) -> int:
        return self.ar.batch_size // self.prefill.length.shape[0]

    @property
    def positions(self) -> Array:
        """[B] int32: the position of the token that the next decode step reads."""
        return jnp.repeat(self.prefill.length, self.samples_per_prompt) + self.ar.tokens_read


def create_kv_cache_buffers(config: KVCacheConfig) -> KVCache:
    """Zeroed buffers of ``config``'s sizes, nothing valid, index 0."""

    def buffers(rows: int, slots: int) -> LayerBuffers:
        shape = (rows, config.num_kv_heads, slots, config.head_dim)
        if config.stacked:
            return jnp.zeros((config.num_layers, *shape), config.dtype)
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

    prompts, prompt_slots = config.num_prompts, config.max_prefill_length
    rows, decode_slots = config.batch_size, config.max_decode_length
    return KVCache(
        PrefillCache(
            buffers(prompts, prompt_slots), buffers(prompts, prompt_slots), jnp.zeros(prompts, jnp.int32)
        ),
        ARCache(
            buffers(rows, decode_slots),
            buffers(rows, decode_slots),
            jnp.zeros((), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            config.begin_every,
        ),
    )


def write_prefill_cache(cache: PrefillCache, layer: int | Array, k: Array, v: Array) -> PrefillCache:
    """Writes one layer's prompt keys and values, from slot 0.

    Args:
        layer: index of the layer; may be traced if the buffers are stacked.
        k, v: [P, kv_heads, tokens, head_dim], keys rotated; ``tokens`` may be fewer than the slots.

    Raises:
        ValueError: more tokens than slots (JAX alone would clamp or fail obscurely).
    """
    if k.shape[2] > cache.capacity:
        raise ValueError(
            f"A prompt of {k.shape[2]} tokens does not fit the prefill cache of {cache.capacity} slots; "
            "create the cache with a larger max_prefill_length."
        )
    return dataclasses.replace(
        cache, k=_write(cache.k, layer, k, slot=0), v=_write(cache.v, layer, v, slot=0)
    )


def update_kv_cache_ar(cache: ARCache, layer: int | Array, k: Array, v: Array) -> ARCache:
    """Writes one layer's key and value of one decode step at ``cache.index``, around the ring.

    The index does not move here: one token passes through all layers at the same index. Advance it
    once afterwards with :func:`advance_ar_index`. A sequence longer than the ring would overwrite its own
    beginning, in silence; its row writes NaN, so that nothing computed from it can pass for a result.

    Args:
        layer: index of the layer; may be traced if the buffers are stacked.
        k, v: [B, kv_heads, 1, head_dim], keys rotated.
    """
    fits = (cache.tokens_read < cache.capacity)[:, None, None, None]
    k, v = jnp.where(fits, k, jnp.nan), jnp.where(fits, v, jnp.nan)
    slot = cache.index % cache.capacity
    return dataclasses.replace(
        cache, k=_write(cache.k, layer, k, slot=slot), v=_write(cache.v, layer, v, slot=slot)
    )


def advance_ar_index(cache: KVCache) -> KVCache:
    """The same cache, one token further on."""
    return dataclasses.replace(cache, ar=dataclasses.replace(cache.ar, index=cache.ar.index + 1))


def get_attention_kv(
    part: PrefillCache | ARCache, layer: int | Array, start: int | Array = 0, size: int | None = None
) -> tuple[Array, Array]:
    """One layer's keys and values in slots ``start .. start + size``, valid or not; all by default.

    Attention reads block by block through this, so that not even a stacked cache is ever sliced out
    whole. ``start`` is clamped so that ``size`` slots are read.

    Returns:
        k, v [rows, kv_heads, size, head_dim]: rows are prompts in the prefill part, sequences in the ar part.
    """
    size = part.capacity if size is None else size
    return _read(part.k, layer, start, size), _read(part.v, layer, start, size)


def create_activation_buffer(config: ActivationBufferConfig) -> Array:
    """A zeroed buffer ``[num_layers, max_tokens, batch_size, hidden_size]``."""
    return jnp.zeros(config.shape, config.dtype)


def update_activation_buffer(buffer: Array, activations: Array, step: int | Array) -> Array:
    """Writes the rows of one decode step, ``activations [layers, B, hidden]``, at token ``step``."""
    return update_slice(buffer, activations[:, None], (0, step, 0, 0))


def update_slice(buffer: Array, values: Array, start: tuple[int | Array, ...]) -> Array:
    """``lax.dynamic_update_slice`` that touches the slice alone."""
    values = values.astype(buffer.dtype)
    if buffer.dtype.itemsize != 2:
        return lax.dynamic_update_slice(buffer, values, start)

    def as_integers(buffer: Array, values: Array, *start: Array) -> Array:
        # XLA on CPU updates bfloat16 by converting the whole buffer to float32 and back, in place.
        bits, new = (lax.bitcast_convert_type(x, jnp.uint16) for x in (buffer, values))
        return lax.bitcast_convert_type(lax.dynamic_update_slice(bits, new, start), buffer.dtype)

    def as_it_is(buffer: Array, values: Array, *start: Array) -> Array:
        return lax.dynamic_update_slice(buffer, values, start)

    return lax.platform_dependent(buffer, values, *start, cpu=as_integers, default=as_it_is)


def _shape(buffers: LayerBuffers) -> tuple[int, ...]:
    """(rows, kv_heads, slots, head_dim) of each layer."""
    return buffers[0].shape if isinstance(buffers, tuple) else buffers.shape[1:]


def _read(buffers: LayerBuffers, layer: int | Array, start: int | Array, size: int) -> Array:
    rows, heads, _, dim = _shape(buffers)
    if isinstance(buffers, tuple):
        return lax.dynamic_slice(buffers[_static(layer)], (0, 0, start, 0), (rows, heads, size, dim))
    return lax.dynamic_slice(buffers, (layer, 0, 0, start, 0), (1, rows, heads, size, dim))[0]


def _static(layer: int | Array) -> int:
    if not isinstance(layer, int):
        raise TypeError("A tuple of per-layer buffers needs a Python int as layer, not a traced index.")
    return layer


def _write(buffers: LayerBuffers, layer: int | Array, values: Array, slot: int | Array) -> LayerBuffers:
    if isinstance(buffers, tuple):
        layer = _static(layer)
        new = update_slice(buffers[layer], values, (0, 0, slot, 0))
        return (*buffers[:layer], new, *buffers[layer + 1 :])
    return update_slice(buffers, values[None], (layer, 0, 0, slot, 0))
