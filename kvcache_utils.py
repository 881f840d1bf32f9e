"""Fixed-size buffers for generation: the two-part KV cache and the activation buffer.

The cache has two parts, as in MaxText. The **prefill** part is written once and has one row per *prompt*.
The **ar** (autoregressive) part has one row per *sequence* and one position per decode step. The two are
never concatenated. So several sequences that continue one prompt share its prefill part ("bifurcated
attention", Athiwaratkun et al. 2024), and ragged prompts need neither left padding nor scatters: prompts
differ in ``length``, decode steps are aligned. Keys are stored rotated. Samples of a prompt are adjacent or,
where they come and go at different times, say by an index which row is theirs (``KVCache.prompt_row``).

The ar part is a ring over decode steps: step t is written at position ``t % capacity`` of every row. Each
row remembers the step at which its sequence began (``start``). So rows may begin at different times, and a
row whose sequence has ended can take another one, without a scatter. ``start`` is 0 where all begin together.

All functions are pure, safe under ``jit``, and keep every shape. A layer's buffers are chosen by an index
into either a tuple of per-layer arrays (unrolled layers) or one stack ``[layers, ...]`` (scanned layers).
Both are updated in place when the caller donates them.

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
from jaxtyping import Bool, Float, Int32

# One array [layers, rows, kv_heads, positions, head_dim], or a tuple of arrays without the first axis.
LayerBuffers = Array | tuple[Array, ...]
KeysValues = Float[Array, "rows kv_heads positions head_dim"]  # of one layer


def axes(*names: str | None) -> dict[str, Any]:
    """Returns field metadata that names the logical axes of a state's array, outermost first.

    ``qwen2_core.sharding`` reads it: "rows" are sequences or prompts, "kv_heads" the heads of keys and
    values. An array with more axes than names has them in front (the layers of a stacked cache).
    """
    return {"axes": names}


CACHE_AXES = axes("rows", "kv_heads", "positions", "head_dim")
ROW_AXES = axes("rows")
ACTIVATION_AXES = axes("layers", "tokens", "rows", "hidden")


@dataclasses.dataclass(frozen=True)
class KVCacheConfig:
    """Sizes of one KV cache. ``num_prompts * samples_per_prompt`` sequences share the prefill rows.

    ``step_alignment`` is None where all rows begin at step 0. Else each row may begin at any multiple of so
    many steps, and attention sums the ar part in pieces of that size, in the order of their steps. With
    ``indexed_prompts`` each sequence says in which prefill row its prompt lies (``KVCache.prompt_row``).

    Raises:
        ValueError: a size below 1.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_prefill_length: int
    max_decode_length: int
    num_prompts: int = 1
    samples_per_prompt: int = 1
    dtype: Any = jnp.float32
    stacked: bool = False
    step_alignment: int | None = None
    indexed_prompts: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("dtype", "stacked", "indexed_prompts") and value is not None and value < 1:
                raise ValueError(f"KVCacheConfig.{field.name} must be at least 1, not {value}.")

    @property
    def batch_size(self) -> int:
        """Number of sequences: ``num_prompts * samples_per_prompt``."""
        return self.num_prompts * self.samples_per_prompt

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, known before anything is allocated."""
        per_position = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        positions = self.num_prompts * self.max_prefill_length + self.batch_size * self.max_decode_length
        numbers = self.num_prompts + (2 if self.indexed_prompts else 1) * self.batch_size + 1
        return per_position * positions + 4 * numbers


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
        """The buffer's shape."""
        return (self.num_layers, self.max_tokens, self.batch_size, self.hidden_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, known before anything is allocated."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillCache:
    """The prompts' keys and values, right-padded. Position j of prompt p is valid where j < length[p]."""

    k: LayerBuffers = dataclasses.field(
        metadata=CACHE_AXES
    )  # a layer: [P, kv_heads, max_prefill_length, head_dim]
    v: LayerBuffers = dataclasses.field(metadata=CACHE_AXES)
    length: Int32[Array, " prompts"] = dataclasses.field(metadata=ROW_AXES)

    @property
    def capacity(self) -> int:
        """Number of prompt tokens that fit: max_prefill_length."""
        return _shape(self.k)[2]

    @property
    def valid(self) -> Bool[Array, "prompts positions"]:
        """True at positions that hold a prompt token."""
        return jnp.arange(self.capacity, dtype=jnp.int32) < self.length[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ARCache:
    """The generated tokens' keys and values, a ring: step t of every row is at position ``t % capacity``.

    Row b's sequence holds the steps from ``start[b]`` on. Earlier steps belong to another sequence.
    """

    k: LayerBuffers = dataclasses.field(
        metadata=CACHE_AXES
    )  # a layer: [B, kv_heads, max_decode_length, head_dim]
    v: LayerBuffers = dataclasses.field(metadata=CACHE_AXES)
    index: Int32[Array, ""] = dataclasses.field(
        metadata=axes()
    )  # the step being made; advances once per token
    start: Int32[Array, " batch"] = dataclasses.field(
        metadata=ROW_AXES
    )  # the step at which the sequence began
    step_alignment: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Number of decode steps that fit: max_decode_length."""
        return _shape(self.k)[2]

    @property
    def tokens_read(self) -> Int32[Array, " batch"]:
        """Number of generated tokens that each row's sequence has read."""
        return self.index - self.start

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return _shape(self.k)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Both parts of the cache. Sequence b of B continues the prompt in row ``prompt_row[b]`` of P.

    Without an index that is row ``b // (B // P)``. A row of -1 is that of an empty prompt.
    """

    prefill: PrefillCache
    ar: ARCache
    prompt_row: Int32[Array, " batch"] | None = dataclasses.field(default=None, metadata=ROW_AXES)

    @property
    def samples_per_prompt(self) -> int:
        """Number of sequences that continue each prompt, where there is no index: ``B // P``."""
        return self.ar.batch_size // self.prefill.length.shape[0]

    @property
    def prompt_lengths(self) -> Int32[Array, " batch"]:
        """Number of tokens of each sequence's prompt."""
        if self.prompt_row is None:
            return jnp.repeat(self.prefill.length, self.samples_per_prompt)
        return jnp.where(self.prompt_row < 0, 0, self.prefill.length[self.prompt_row])

    @property
    def positions(self) -> Int32[Array, " batch"]:
        """Position in its sequence, prompt included, of the token that the next decode step reads."""
        return self.prompt_lengths + self.ar.tokens_read


def create_kv_cache_buffers(config: KVCacheConfig) -> KVCache:
    """Creates zeroed buffers of ``config``'s sizes: nothing is valid, the index is 0."""

    def buffers(rows: int, positions: int) -> LayerBuffers:
        shape = (rows, config.num_kv_heads, positions, config.head_dim)
        if config.stacked:
            return jnp.zeros((config.num_layers, *shape), config.dtype)
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

    prompts, rows = config.num_prompts, config.batch_size
    prefill, ar = config.max_prefill_length, config.max_decode_length
    return KVCache(
        PrefillCache(buffers(prompts, prefill), buffers(prompts, prefill), jnp.zeros(prompts, jnp.int32)),
        ARCache(
            buffers(rows, ar),
            buffers(rows, ar),
            jnp.zeros((), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            config.step_alignment,
        ),
        jnp.full(rows, -1, jnp.int32) if config.indexed_prompts else None,
    )


def write_prefill_cache(
    cache: PrefillCache,
    layer: int | Array,
    k: Float[Array, "prompts kv_heads tokens head_dim"],
    v: Float[Array, "prompts kv_heads tokens head_dim"],
) -> PrefillCache:
    """Writes one layer's prompt keys and values, from position 0.

    Args:
        cache: the prefill part.
        layer: index of the layer; may be traced if the buffers are stacked.
        k: rotated keys; ``tokens`` may be fewer than the cache's capacity.
        v: values.

    Raises:
        ValueError: more tokens than positions (JAX alone would clamp or fail obscurely).
    """
    if k.shape[2] > cache.capacity:
        raise ValueError(
            f"A prompt of {k.shape[2]} tokens does not fit the prefill cache of {cache.capacity} positions; "
            "create the cache with a larger max_prefill_length."
        )
    return dataclasses.replace(cache, k=_write(cache.k, layer, k, 0), v=_write(cache.v, layer, v, 0))


def update_kv_cache_ar(
    cache: ARCache,
    layer: int | Array,
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
) -> ARCache:
    """Writes one layer's keys and values of one decode step from ``cache.index`` on, around the ring.

    The index does not move here: a token passes through all layers at the same index. Advance it once
    afterwards with :func:`advance_ar_index`. A sequence longer than the ring would overwrite its own
    beginning in silence. Its row writes NaN instead, so that nothing computed from it can pass for a result.
    So do several tokens that would go past the ring's end.

    Args:
        cache: the ar part.
        layer: index of the layer; may be traced if the buffers are stacked.
        k: rotated keys.
        v: values.
    """
    tokens = k.shape[2]
    fits = cache.tokens_read < cache.capacity
    if tokens > 1:
        in_ring = cache.index % cache.capacity + tokens <= cache.capacity
        fits = in_ring & (cache.tokens_read + tokens <= cache.capacity)
    fits = fits[:, None, None, None]
    k, v = jnp.where(fits, k, jnp.nan), jnp.where(fits, v, jnp.nan)
    position = cache.index % cache.capacity
    return dataclasses.replace(
        cache, k=_write(cache.k, layer, k, position), v=_write(cache.v, layer, v, position)
    )


def advance_ar_index(cache: KVCache, tokens: int | Int32[Array, ""] = 1) -> KVCache:
    """Returns the same cache, one token or so many further on; what lies past its index does not count."""
    return dataclasses.replace(cache, ar=dataclasses.replace(cache.ar, index=cache.ar.index + tokens))


def get_attention_kv(
    part: PrefillCache | ARCache,
    layer: int | Array,
    start: int | Array = 0,
    size: int | None = None,
    rows: Int32[Array, " n"] | None = None,
) -> tuple[KeysValues, KeysValues]:
    """Returns one layer's keys and values at positions ``start .. start + size``, valid or not.

    Attention reads block by block through this, so that not even a stacked cache is ever sliced out whole.

    Args:
        part: either part of the cache; its rows are prompts or sequences.
        layer: index of the layer; may be traced if the buffers are stacked.
        start: first position, clamped so that ``size`` positions are read.
        size: number of positions; the whole capacity by default.
        rows: which rows, each as often as it is named; -1 reads any. All by default.
    """
    size = part.capacity if size is None else size
    k, v = _read(part.k, layer, start, size), _read(part.v, layer, start, size)
    if rows is None:
        return k, v
    return jnp.take(k, rows, axis=0, mode="clip"), jnp.take(v, rows, axis=0, mode="clip")


def create_activation_buffer(
    config: ActivationBufferConfig,
) -> Float[Array, "layers tokens batch hidden"]:
    """Creates a zeroed buffer of ``config``'s sizes."""
    return jnp.zeros(config.shape, config.dtype)


def update_activation_buffer(
    buffer: Float[Array, "layers tokens batch hidden"],
    activations: Float[Array, "layers batch hidden"],
    step: int | Array,
) -> Float[Array, "layers tokens batch hidden"]:
    """Writes the rows of one decode step at token ``step``."""
    return update_slice(buffer, activations[:, None], (0, step, 0, 0))


def as_bits(values: Array) -> Array:
    """Returns 16-bit floats as uint16, which XLA on CPU writes as they are; others unchanged."""
    return lax.bitcast_convert_type(values, jnp.uint16) if values.dtype.itemsize == 2 else values


def from_bits(bits: Array, dtype: Any) -> Array:
    """Undoes ``as_bits`` of values of ``dtype``."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits


def update_slice(buffer: Array, values: Array, start: tuple[int | Array, ...]) -> Array:
    """Does ``lax.dynamic_update_slice`` in a form that touches the slice alone, in every dtype."""
    values = values.astype(buffer.dtype)
    if buffer.dtype.itemsize != 2:
        return lax.dynamic_update_slice(buffer, values, start)

    def as_integers(buffer: Array, values: Array, *start: int | Array) -> Array:
        # XLA on CPU updates bfloat16 by converting the whole buffer to float32 and back, in place.
        bits = lax.dynamic_update_slice(as_bits(buffer), as_bits(values), start)
        return from_bits(bits, buffer.dtype)

    def as_it_is(buffer: Array, values: Array, *start: int | Array) -> Array:
        return lax.dynamic_update_slice(buffer, values, start)

    return lax.platform_dependent(buffer, values, *start, cpu=as_integers, default=as_it_is)


def _shape(buffers: LayerBuffers) -> tuple[int, ...]:
    """Returns (rows, kv_heads, positions, head_dim) of each layer."""
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


def _write(buffers: LayerBuffers, layer: int | Array, values: Array, position: int | Array) -> LayerBuffers:
    if isinstance(buffers, tuple):
        layer = _static(layer)
        new = update_slice(buffers[layer], values, (0, 0, position, 0))
        return (*buffers[:layer], new, *buffers[layer + 1 :])
    return update_slice(buffers, values[None], (layer, 0, 0, position, 0))
