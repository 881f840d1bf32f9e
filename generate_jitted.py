"""Generation as compiled programs: prefill, then every decode step in one loop on the device.

    config, params = load_qwen2("Qwen/Qwen2.5-0.5B-Instruct")
    model = create_model_with_hooks(config)
    input_ids, prompt_lengths = pad_prompts([tokenizer.encode("2 + 2 ="), tokenizer.encode("Why?")])
    out = generate_single_task_jitted(model, params, input_ids, 64, prompt_lengths=prompt_lengths)
    out.activations[:, t, b]       # [14, hidden]: layers 10..23 after reading generated token t of row b

Which row is which: ``activations[:, t, b]`` is what the layers produced while *reading* generated token
t, at position ``prompt_lengths[b] + t``. One forward pass is run for each generated token, also for the
last one, so n tokens have n rows. The prefill's last row chose token 0.

Two programs are compiled for each shape, the prefill and the decode loop. Prompts, lengths, sampling,
seeds and EOS ids are traced values: changing them never recompiles.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kvcache_utils import (
    ActivationBufferConfig,
    KVCache,
    KVCacheConfig,
    create_activation_buffer,
    create_kv_cache_buffers,
    update_activation_buffer,
)
from qwen2_core.config import QwenConfig
from qwen2_core.kernels.matmul import compiler_options
from qwen2_core.requests import Request, bucket_length, check_request, pad_prompts
from qwen2_core.sampling import Sampling, SamplingArrays, sample_tokens, sequence_keys
from qwen2_core.sharding import ACTIVATIONS, ROWS, WHOLE, axes_of, layout_of
from qwen2_jax import QwenModel
from qwen2_jax_with_hooks import QwenModelWithActivations

__all__ = [
    "DecodeState",
    "GenerateShape",
    "Generation",
    "Sampling",
    "bucket_length",
    "compile_generate",
    "decode_step_with_cache",
    "generate_single_task_jitted",
    "pad_prompts",
    "prefill_with_cache",
]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, on the device. Everything at or past ``lengths[b]`` is zero.

    B = prompts x samples_per_prompt, samples of one prompt adjacent.
    """

    token_ids: Array  # [B, max_tokens] int32
    lengths: Array  # [B] int32: tokens generated, the EOS that ended the row included
    finished: Array  # [B] bool: ended by an EOS token, not by max_tokens
    logprobs: Array  # [B, max_tokens] float32, the model's own (temperature 1) log-probability of each token
    activations: Array | None  # [layers, max_tokens, B, hidden] in the model's dtype
    prompt_activations: Array | None  # [layers, P_len, P, hidden]; zero at or past the prompt's length


@dataclasses.dataclass(frozen=True)
class GenerateShape:
    """All that decides which programs are compiled, beside the model and the weights' shapes."""

    num_prompts: int
    prompt_width: int
    max_tokens: int
    samples_per_prompt: int = 1
    cache_dtype: Any = None  # the model's by default
    stop: bool = True  # end when every row has met an EOS id
    capture_prompt: bool = False
    eos_slots: int = 8

    @property
    def batch_size(self) -> int:
        return self.num_prompts * self.samples_per_prompt

    def cache_config(self, config: QwenConfig) -> KVCacheConfig:
        return KVCacheConfig(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_prefill_length=self.prompt_width,
            max_decode_length=self.max_tokens,
            num_prompts=self.num_prompts,
            samples_per_prompt=self.samples_per_prompt,
            dtype=config.dtype if self.cache_dtype is None else self.cache_dtype,
            stacked=config.scan_layers,
        )

    def nbytes(self, model: QwenModel) -> int:
        """Bytes of the KV cache and of the activation buffers that one call allocates."""
        config = model.config
        total = self.cache_config(config).nbytes
        if isinstance(model, QwenModelWithActivations):
            layers, hidden = len(model.extract_layers), config.hidden_size
            buffers = [(self.max_tokens, self.batch_size)]
            buffers += [(self.prompt_width, self.num_prompts)] if self.capture_prompt else []
            for tokens, rows in buffers:
                total += ActivationBufferConfig(layers, tokens, rows, hidden, config.dtype).nbytes
        return total


@dataclasses.dataclass(frozen=True)
class CompiledGenerate:
    """The two executables of one shape."""

    shape: GenerateShape
    prefill: (
        jax.stages.Compiled
    )  # (params, ids, lengths, sampling, seed, sequence_ids) -> (state, rows | None)
    decode: jax.stages.Compiled  # (params, state, sampling, seed, sequence_ids, eos_ids) -> state
    compile_seconds: float

    def __call__(self, params: Any, request: Request, sampling: Sampling) -> Generation:
        drawing = (sampling.traced(), request.seed, request.sequence_ids)
        state, prompt_activations = self.prefill(params, request.input_ids, request.prompt_lengths, *drawing)
        state = self.decode(params, state, *drawing, request.eos_token_ids)
        return Generation(
            token_ids=state.token_ids,
            lengths=state.lengths,
            finished=state.ended,
            logprobs=state.logprobs,
            activations=state.activations,
            prompt_activations=prompt_activations,
        )


def compile_generate(model: QwenModel, params: Any, shape: GenerateShape) -> CompiledGenerate:
    """Compiles prefill and decode for one shape, from the weights' shapes alone; cached.

    ``generate_single_task_jitted`` calls this itself; call it before to be warm, from several threads
    for several shapes at once. ``params`` may hold ``jax.ShapeDtypeStruct`` in place of arrays.
    """
    leaves, treedef = jax.tree.flatten(params)
    abstract = tuple(_abstract(leaf) for leaf in leaves)
    return _compile(model, shape, treedef, abstract)  # pyright: ignore[reportArgumentType]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


@functools.lru_cache(maxsize=256)
def _compile(
    model: QwenModel, shape: GenerateShape, treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]
) -> CompiledGenerate:
    params = jax.tree.unflatten(treedef, leaves)
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:  # XLA compiles outside the GIL
        options = compiler_options()
        prefill, decode = pool.map(lambda p: p.compile(options), lower_generate(model, params, shape))
    return CompiledGenerate(shape, prefill, decode, time.perf_counter() - started)


def lower_generate(
    model: QwenModel, params: Any, shape: GenerateShape
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Prefill and decode as ``CompiledGenerate`` calls them, traced but not compiled."""
    layout = layout_of(model.config, params)
    if shape.num_prompts % layout.groups:
        raise ValueError(
            f"{shape.num_prompts} prompts cannot be shared among the {layout.groups} groups of devices that "
            "the weights are on; give a multiple of prompts, or load the weights with mesh_shape=(1, ...)."
        )
    prompts = shape.num_prompts // layout.groups
    cache = dataclasses.replace(shape, num_prompts=prompts).cache_config(model.config)
    empty = jax.eval_shape(functools.partial(empty_decode_state, model, cache))
    state_axes, drawing_axes = axes_of(empty), (WHOLE, WHOLE, ROWS)
    drawing = (
        Sampling().traced(),
        layout.struct((), jnp.uint32),
        layout.struct((cache.batch_size,), jnp.uint32, ROWS),
    )
    prefill = layout.jit(
        functools.partial(run_prefill, model, cache, shape.capture_prompt),
        in_axes=(WHOLE, ROWS, ROWS, *drawing_axes),
        out_axes=(state_axes, ACTIVATIONS),
    )
    decode = layout.jit(
        functools.partial(run_decode, model, shape.stop),
        in_axes=(WHOLE, state_axes, *drawing_axes, WHOLE),
        out_axes=state_axes,
        donate_argnums=(1,),
    )
    input_ids = layout.struct((prompts, shape.prompt_width), jnp.int32, ROWS)
    lengths = layout.struct((prompts,), jnp.int32, ROWS)
    eos_token_ids = layout.struct((shape.eos_slots,), jnp.int32)
    return (
        prefill.lower(params, input_ids, lengths, *drawing),
        decode.lower(params, layout.structs(empty), *drawing, eos_token_ids),
    )


def generate_single_task_jitted(
    model: QwenModel,
    params: Any,
    input_ids: Any,
    max_tokens: int,
    *,
    prompt_lengths: Any = None,
    samples_per_prompt: int = 1,
    eos_token_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    sequence_ids: Any = None,
    cache_dtype: Any = None,
    extract_activations: bool = True,
    extract_prompt: bool = False,
) -> Generation:
    """Generates from P prompts, ``samples_per_prompt`` sequences each, and captures their activations.

    Without EOS ids the loop is ``lax.fori_loop`` over exactly ``max_tokens`` steps; with them it is
    the same body under ``lax.while_loop``, which ends when every row has ended.

    Args:
        model: ``create_model_with_hooks(config)``; a plain ``QwenModel`` only without activations.
        params: the parameter tree, from ``load_qwen2``.
        input_ids: [P, P_len] integers, right-padded, numpy or jax. Each width compiles once: pad to a
            few widths (``pad_prompts``) rather than to each batch's own.
        max_tokens: tokens to generate at most.
        prompt_lengths: [P] valid tokens of each prompt; the full width by default.
        eos_token_ids: ids that end a row; the one that does is generated, read and captured.
        seed: 0 to 2**32 - 1. Keys derive from (seed, the sequence's id, step).
        sequence_ids: [B] integers, 0..B-1 by default. Give each sequence its own to make its tokens
            independent of the batch it is in.
        cache_dtype: of the KV cache; the model's by default.
        extract_prompt: return the prompts' rows too.

    Raises:
        ValueError: an empty or too long prompt, a token id outside the vocabulary, ``max_tokens`` < 1,
            shapes that do not fit; all on the host, before any device work.
    """
    config = model.config
    extract_prompt = extract_prompt and extract_activations
    if extract_activations and not isinstance(model, QwenModelWithActivations):
        raise ValueError(
            "This model returns no activations: make it with create_model_with_hooks(config), "
            "or pass extract_activations=False."
        )
    if not extract_activations:
        model = QwenModel(config)
    request = check_request(
        config,
        input_ids,
        max_tokens,
        prompt_lengths=prompt_lengths,
        samples_per_prompt=samples_per_prompt,
        eos_token_ids=eos_token_ids,
        seed=seed,
        sequence_ids=sequence_ids,
    )
    shape = GenerateShape(
        num_prompts=request.input_ids.shape[0],
        prompt_width=request.input_ids.shape[1],
        max_tokens=max_tokens,
        samples_per_prompt=samples_per_prompt,
        cache_dtype=None if cache_dtype is None else np.dtype(cache_dtype),
        stop=len(eos_token_ids) > 0,
        capture_prompt=extract_prompt,
        eos_slots=len(request.eos_token_ids),
    )
    program = compile_generate(model, params, shape)
    return program(params, request, sampling)
