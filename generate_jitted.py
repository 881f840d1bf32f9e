"""Generation as compiled programs: one prefill, then every decode step in one loop on the device.

    config, params = load_qwen2("Qwen/Qwen2.5-0.5B-Instruct")
    model = create_model_with_hooks(config)
    input_ids, prompt_lengths = pad_prompts([tokenizer.encode("2 + 2 ="), tokenizer.encode("Why?")])
    out = generate_single_task_jitted(model, params, input_ids, 64, prompt_lengths=prompt_lengths)
    out.layer(12, row=1)           # [n, hidden] float32, numpy: layer 12 after reading each of its n tokens
    out.activations[:, t, b]       # [14, hidden]: layers 10..23 after reading generated token t of row b

``activations[:, t, b]`` is from *reading* generated token t, at position ``prompt_lengths[b] + t``. One
forward pass runs for each token, also for the last, so n tokens have n rows. The prefill chose token 0.

This page holds it from the inside out: the loop's state, the prefill, one decode step, the loop, the call,
its two programs. Prompts, lengths, sampling, seeds and EOS ids are traced: changing them never recompiles.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32, Key, UInt32

from kvcache_utils import (
    ACTIVATION_AXES,
    ROW_AXES,
    KVCache,
    axes,
    create_activation_buffer,
    create_kv_cache_buffers,
    update_activation_buffer,
)
from qwen2_core.compilation import AbstractParams, check_surroundings, compile_all, raise_on_nan, traced_apart
from qwen2_core.drafts import check_draft_tokens, decode_with_drafts, start_history
from qwen2_core.generation import CompiledGenerate, GenerateShape, Generation
from qwen2_core.inputs import cache_dtype_of, whole_number, yes_or_no
from qwen2_core.parameter_checks import check_params
from qwen2_core.requests import (
    PromptBatch,
    bucket_length,
    check_max_tokens,
    check_prompts,
    check_sequence_ids,
    pad_prompts,
)
from qwen2_core.sampling import (
    Sampling,
    SamplingParams,
    abstract_sampling_params,
    sample_tokens,
    sampling_params,
    sequence_keys,
    tokens_in,
    with_tokens,
)
from qwen2_core.sharding import ACTIVATIONS, ROWS, WHOLE, axes_of, layout_of
from qwen2_core.steering import STEERING, Steering, abstract_steering, check_prompt_strengths, steer
from qwen2_jax import HookedOutput, ModelOutput, QwenModel, check_model, make_output

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


Rows = tuple[Array | None, dict[str, Array]]  # of the chosen layers, and of other points by name

# --- The loop's state -------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that the decode loop carries. Every field keeps its shape and, donated, its memory.

    ``columns`` is max_tokens, or the steps of a window. Of each row, ``cache.ar.tokens_read`` generated
    tokens have been read so far. Everything at or past ``lengths[b]`` is zero.
    """

    cache: KVCache
    next_token: Int32[Array, " batch"] = dataclasses.field(metadata=ROW_AXES)  # chosen, not yet read
    next_logprob: Float32[Array, " batch"] = dataclasses.field(metadata=ROW_AXES)
    ended: Bool[Array, " batch"] = dataclasses.field(metadata=ROW_AXES)  # an EOS has been read
    token_ids: Int32[Array, "batch columns"] = dataclasses.field(metadata=axes("rows", "tokens"))
    logprobs: Float32[Array, "batch columns"] = dataclasses.field(metadata=axes("rows", "tokens"))
    lengths: Int32[Array, " batch"] = dataclasses.field(metadata=ROW_AXES)
    activations: Float[Array, "layers columns batch hidden"] | None = dataclasses.field(
        metadata=ACTIVATION_AXES
    )
    points: dict[str, Float[Array, "layers columns batch width"]] = dataclasses.field(
        metadata=ACTIVATION_AXES, default_factory=dict
    )
    # Tokens that the prompt or the answer has; only where there is a repetition penalty.
    seen: Bool[Array, "batch vocab"] | None = dataclasses.field(metadata=axes("rows", "vocab"), default=None)
    # The text: the prompt and the tokens read so far; only where drafts are copied from it.
    history: Int32[Array, "batch positions"] | None = dataclasses.field(
        metadata=axes("rows", "tokens"), default=None
    )


def start_decode_state(
    model: QwenModel,
    cache: KVCache,
    token: Int32[Array, " batch"],
    logprob: Float32[Array, " batch"],
    ended: Bool[Array, " batch"],
    columns: int,
    seen: Bool[Array, "batch vocab"] | None = None,
) -> DecodeState:
    """Makes a state with zeroed outputs of ``columns`` steps; activations only for a model that captures."""
    batch = cache.ar.batch_size
    buffer = model.activation_buffer(columns, batch)
    points = model.point_buffers(columns, batch)
    return DecodeState(
        cache=cache,
        next_token=token,
        next_logprob=logprob,
        ended=ended,
        token_ids=jnp.zeros((batch, columns), jnp.int32),
        logprobs=jnp.zeros((batch, columns), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        activations=None if buffer is None else create_activation_buffer(buffer),
        points={point: create_activation_buffer(of_point) for point, of_point in points.items()},
        seen=seen,
    )


# --- Prefill ----------------------------------------------------------------------------------------------


def prefill_with_cache(
    model: QwenModel,
    params: Any,
    input_ids: Int32[Array, "prompts width"],
    prompt_lengths: Int32[Array, " prompts"],
    cache: KVCache,
    *,
    capture: bool = True,
    steering: Steering | None = None,
) -> ModelOutput | HookedOutput:
    """Reads whole prompts and fills the prefill part of ``cache``.

    Args:
        model: captures the prompts' rows if it is one of ``create_model_with_hooks``.
        params: the parameter tree.
        input_ids: right-padded; the width is at most the cache's max_prefill_length.
        prompt_lengths: at least 1 each.
        cache: its prefill part is overwritten.
        capture: False leaves the prompts' rows out.
        steering: interventions, of P rows.

    Returns:
        (logits [P, vocab] float32 that predict each prompt's first new token; the cache; the prompts' rows
        [layers, width, P, hidden], zero past each prompt's length, or None; and, where other points are
        captured, theirs).
    """
    with jax.named_scope("prefill"):
        mask = jnp.arange(input_ids.shape[1], dtype=jnp.int32) < prompt_lengths[:, None]
        output = _forward(model, params, input_ids, mask, cache.prefill, steering, capture=capture)
        rows, points = jax.tree.map(
            lambda rows: jnp.where(mask.T[None, :, :, None], rows, 0), rows_of(output)
        )
        cache = dataclasses.replace(cache, prefill=output.cache)
        return make_output(output.logits[:, 0], cache, rows, points)


def run_prefill(
    model: QwenModel,
    shape: GenerateShape,
    params: Any,
    prompts: tuple[Int32[Array, "prompts width"], Int32[Array, " prompts"]],
    sampling: SamplingParams,
    sequence_ids: UInt32[Array, " batch"],
    steering: Steering | None = None,
) -> tuple[DecodeState, Rows]:
    """Allocates the loop's state, reads the prompts into it, and chooses every sequence's first token.

    Returns:
        the state, and the prompts' rows as ``rows_of`` gives them if the shape asks for them.
    """
    cache = create_kv_cache_buffers(shape.cache_config(model.config))
    output = prefill_with_cache(
        model, params, *prompts, cache, capture=shape.capture_prompt, steering=steering
    )
    cache = output.cache
    logits = jnp.repeat(output.logits, shape.samples_per_prompt, axis=0)
    seen = None
    if shape.sampling.repetition_penalty:
        seen = jnp.repeat(tokens_in(*prompts, model.config.vocab_size), shape.samples_per_prompt, axis=0)
    token, logprob = sample_tokens(logits, sampling, sequence_keys(sampling.seed, sequence_ids), 0, seen)
    ended = jnp.zeros(token.shape, bool)
    state = start_decode_state(model, cache, token, logprob, ended, columns=shape.max_tokens, seen=seen)
    history = start_history(prompts[0], shape.max_tokens, shape.draft_tokens)
    return dataclasses.replace(state, history=history), rows_of(output)


# --- One decode step --------------------------------------------------------------------------------------


def decode_step_with_cache(
    model: QwenModel,
    params: Any,
    token_ids: Int32[Array, " batch"],
    cache: KVCache,
    steering: Steering | None = None,
) -> ModelOutput | HookedOutput:
    """Reads one token of every sequence.

    Returns:
        (logits [B, vocab] float32 that predict the next token; the cache, its index one further; the rows
        [layers, B, hidden] of the token that was read, or None for a model that captures no layers; and,
        where other points are captured, theirs [layers, B, width]).
    """
    with jax.named_scope("decode_step"):
        output = _forward(model, params, token_ids[:, None], None, cache, steering)
        rows, points = jax.tree.map(lambda rows: rows[:, 0], rows_of(output))
        return make_output(output.logits[:, 0], output.cache, rows, points)


def decode_one(
    model: QwenModel,
    params: Any,
    state: DecodeState,
    column: Int32[Array, ""],
    sampling: SamplingParams,
    keys: Key[Array, " batch"],
    steering: Steering | None = None,
) -> DecodeState:
    """Reads ``next_token``, keeps its row in ``column`` of the outputs, and chooses the token after it."""
    step, live = state.cache.ar.tokens_read, ~state.ended
    output = decode_step_with_cache(model, params, state.next_token, state.cache, steering)
    activations, points = jax.tree.map(
        lambda buffer, rows: update_activation_buffer(buffer, jnp.where(live[:, None], rows, 0), column),
        (state.activations, state.points),
        rows_of(output),
    )
    token_column = jnp.where(live, state.next_token, 0)[:, None]
    logprob_column = jnp.where(live, state.next_logprob, 0.0)[:, None]
    seen = with_tokens(state.seen, state.next_token)
    next_token, next_logprob = sample_tokens(output.logits, sampling, keys, step + 1, seen)
    return DecodeState(
        cache=output.cache,
        next_token=next_token,
        next_logprob=next_logprob,
        ended=state.ended | jnp.any(state.next_token[:, None] == sampling.eos_token_ids, axis=-1),
        token_ids=lax.dynamic_update_slice(state.token_ids, token_column, (0, column)),
        logprobs=lax.dynamic_update_slice(state.logprobs, logprob_column, (0, column)),
        lengths=state.lengths + live,
        activations=activations,
        points=points,
        seen=seen,
    )


def rows_of(output: ModelOutput | HookedOutput) -> Rows:
    """Returns the rows of the chosen layers, or None, and those of other points by name."""
    return output.activations, output.points if isinstance(output, HookedOutput) else {}


def _forward(
    model: QwenModel,
    params: Any,
    input_ids: Array,
    mask: Array | None,
    cache: Any,
    steering: Steering | None,
    *,
    capture: bool = True,
) -> ModelOutput | HookedOutput:
    output: Any = model.apply(
        {"params": params},
        input_ids,
        mask,
        cache,
        capture_layers=model.capture_layers if capture else (),
        capture_points=model.capture_points if capture else (),
        interventions=steering,
        method=model.forward,
    )
    return output


# --- The loop ---------------------------------------------------------------------------------------------


def run_decode(
    model: QwenModel,
    shape: GenerateShape,
    params: Any,
    state: DecodeState,
    sampling: SamplingParams,
    sequence_ids: UInt32[Array, " batch"],
    steering: Steering | None = None,
) -> DecodeState:
    """Runs from the prefill's state to the last token.

    The loop is ``lax.fori_loop`` over exactly ``max_tokens`` steps. With ``shape.stop`` it is the same body
    under ``lax.while_loop``, which ends when every row has ended. With ``shape.draft_tokens`` it is that of
    ``qwen2_core.drafts``.
    """
    if shape.draft_tokens:

        def read(token_ids: Array, cache: KVCache) -> tuple[ModelOutput | HookedOutput, Rows]:
            output = _forward(model, params, token_ids, None, cache, steering)
            return output, rows_of(output)

        return decode_with_drafts(read, shape.draft_tokens, state, sampling, sequence_ids)
    keys = sequence_keys(sampling.seed, sequence_ids)

    def body(state: DecodeState) -> DecodeState:
        return decode_one(model, params, state, state.cache.ar.index, sampling, keys, steering)

    if not shape.stop:
        return lax.fori_loop(0, shape.max_tokens, lambda _, state: body(state), state)
    return lax.while_loop(
        lambda state: (state.cache.ar.index < shape.max_tokens) & ~jnp.all(state.ended), body, state
    )


# --- The call ---------------------------------------------------------------------------------------------


def generate_single_task_jitted(  # noqa: PLR0913 - the public call; all but four have defaults
    model: QwenModel,
    params: Any,
    input_ids: Any,
    max_tokens: int,
    *,
    prompt_lengths: Any = None,
    attention_mask: Any = None,
    samples_per_prompt: int = 1,
    eos_token_ids: Any = (),
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    sequence_ids: Any = None,
    cache_dtype: Any = None,
    extract_activations: bool = True,
    extract_prompt: bool = False,
    interventions: Any = (),
    draft_tokens: int = 0,
) -> Generation:
    """Generates from P prompts, ``samples_per_prompt`` sequences each, and captures their activations.

    Args:
        model: ``create_model_with_hooks(config)``; a plain ``QwenModel`` only without activations.
        params: the parameter tree, from ``load_qwen2``.
        input_ids: [P, P_len] integers of numpy, jax or torch, lists, or what a tokenizer returns, its mask
            included. Each width compiles once: pad to a few (``pad_prompts``).
        max_tokens: tokens to generate at most; 0 with ``extract_prompt``, for the prompts' rows alone.
        prompt_lengths: [P] valid tokens of each right-padded prompt; the full width by default.
        attention_mask: instead, [P, P_len], 1 at tokens and 0 at padding, on the left or on the right.
        samples_per_prompt: sequences that continue each prompt.
        eos_token_ids: ids that end a row, or one id; it is generated, read and captured. Without any, every
            row gets exactly ``max_tokens`` tokens.
        sampling: how tokens are chosen; greedy by default.
        seed: 0 to 2**32 - 1. Random keys derive from (seed, the sequence's id, step).
        sequence_ids: [B] integers, 0..B-1 by default; own ones make tokens independent of the batch.
        cache_dtype: of the KV cache; the model's by default.
        extract_activations: False returns tokens and log-probabilities alone.
        extract_prompt: True returns the prompts' rows too.
        interventions: what to change on the way, of ``qwen2_core.interventions``.
        draft_tokens: tokens that each forward pass reads beyond the next one, copied from where the text says
            the same already. Faster where an answer repeats its prompt; the tokens are the same. For a single
            sequence only.

    Raises:
        ValueError: a prompt, a number, a type or a shape that cannot be, parameters of another model, a call
            inside ``jit``, a setting of JAX that results may depend on; before anything is compiled.
    """
    check_model(model)
    check_surroundings(params, input_ids, prompt_lengths, attention_mask, sequence_ids)
    capture = yes_or_no("extract_activations", extract_activations)
    if capture and not model.captures:
        way = "make it with create_model_with_hooks(config), or pass extract_activations=False"
        raise ValueError(f"This model returns no activations: {way}.")
    if not capture:
        model = QwenModel(model.config)
    prompt_rows = yes_or_no("extract_prompt", extract_prompt) and capture
    max_tokens = check_max_tokens(max_tokens, prompt_rows, "extract_prompt=True")
    samples_per_prompt = whole_number("samples_per_prompt", samples_per_prompt, 1)
    prompts = check_prompts(model.config, input_ids, prompt_lengths, max_tokens, attention_mask)
    ids = check_sequence_ids(len(prompts.lengths), samples_per_prompt, sequence_ids)
    draft_tokens = check_draft_tokens(draft_tokens, len(ids), max_tokens)
    traced = sampling_params(sampling, seed, eos_token_ids, model.config.vocab_size)
    shape = GenerateShape(
        num_prompts=len(prompts.lengths),
        prompt_width=prompts.input_ids.shape[1],
        max_tokens=max_tokens,
        samples_per_prompt=samples_per_prompt,
        cache_dtype=cache_dtype_of(cache_dtype),
        stop=bool((traced.eos_token_ids >= 0).any()),
        capture_prompt=prompt_rows,
        sampling=traced.shape,
        draft_tokens=draft_tokens,
    )
    steering = steer(interventions, model.config, shape.batch_size)
    check_prompt_strengths(steering, prompts.lengths)
    generation = compile_generate(model, params, shape, steering)(params, prompts, traced, ids, steering)
    rows = generation.prompt_activations, generation.prompt_points
    raise_on_nan(generation.logprobs if max_tokens else rows)
    return generation


# --- Its two programs -------------------------------------------------------------------------------------


def compile_generate(
    model: QwenModel, params: Any, shape: GenerateShape, interventions: Any = ()
) -> CompiledGenerate:
    """Compiles prefill and decode for one shape, from the weights' shapes alone; cached.

    ``generate_single_task_jitted`` calls this itself. Call it before to be warm, from several threads for
    several shapes at once. Of 0 tokens there is no decode. ``params`` may hold ``jax.ShapeDtypeStruct`` in
    place of arrays. Of the interventions only kinds, points, layers and shapes count.
    """
    check_params(model.config, params)
    steering = AbstractParams.of(steer(interventions, model.config, shape.batch_size))
    # pyright takes flax modules for unhashable.
    return _compile(model, shape, AbstractParams.of(params), steering)  # pyright: ignore[reportArgumentType]


@functools.lru_cache(maxsize=256)
@traced_apart
def _compile(
    model: QwenModel, shape: GenerateShape, params: AbstractParams, steering: AbstractParams
) -> CompiledGenerate:
    started = time.perf_counter()
    programs = tuple(compile_all(lower_generate(model, params.tree, shape, steering.tree)))
    seconds = time.perf_counter() - started
    return CompiledGenerate(shape, programs, seconds, model.capture_layers, model.capture_points)


@traced_apart
def lower_generate(
    model: QwenModel, params: Any, shape: GenerateShape, steering: Steering | None = None
) -> tuple[jax.stages.Lowered, ...]:
    """Traces prefill and decode as ``CompiledGenerate`` calls them, without compiling them.

    Of 0 tokens the prefill alone.
    """
    layout = layout_of(model.config, params)
    if shape.num_prompts % layout.data_parallel:
        raise ValueError(
            f"{shape.num_prompts} prompts cannot be shared among the {layout.data_parallel} groups of "
            "devices that the weights are on; give a multiple of prompts, or load the weights with "
            "mesh_shape=(1, ...)."
        )
    # The programs are traced with the sizes of one group of devices.
    shape = dataclasses.replace(shape, num_prompts=shape.num_prompts // layout.data_parallel)
    prompts = PromptBatch(
        layout.struct((shape.num_prompts, shape.prompt_width), jnp.int32, ROWS),  # pyright: ignore[reportArgumentType]
        layout.struct((shape.num_prompts,), jnp.int32, ROWS),  # pyright: ignore[reportArgumentType]
    )
    sampling = abstract_sampling_params(shape.sampling)
    sequence_ids = layout.struct((shape.batch_size,), jnp.uint32, ROWS)
    empty = jax.eval_shape(functools.partial(_empty_state, model, shape))
    state_axes = axes_of(empty)
    of_prompts, of_rows, steered = (), (), ()
    if steering is not None:
        of_prompts = (abstract_steering(layout, steering.placed, shape.num_prompts),)
        of_rows = (abstract_steering(layout, steering.placed, shape.batch_size),)
        steered = (STEERING,)
    prefill = layout.jit(
        functools.partial(run_prefill, model, shape),
        in_axes=(WHOLE, ROWS, WHOLE, ROWS, *steered),
        out_axes=(state_axes, ACTIVATIONS),
    )
    decode = layout.jit(
        functools.partial(run_decode, model, shape),
        in_axes=(WHOLE, state_axes, WHOLE, ROWS, *steered),
        out_axes=state_axes,
        donate_argnums=(1,),
    )
    reading = prefill.lower(params, prompts, sampling, sequence_ids, *of_prompts)
    if not shape.max_tokens:
        return (reading,)
    return reading, decode.lower(params, layout.structs(empty), sampling, sequence_ids, *of_rows)


def _empty_state(model: QwenModel, shape: GenerateShape) -> DecodeState:
    cache = create_kv_cache_buffers(shape.cache_config(model.config))
    rows = cache.ar.batch_size
    token, logprob = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32)
    seen = None
    if shape.sampling.repetition_penalty:
        seen = jnp.zeros((rows, model.config.vocab_size), bool)
    ended = jnp.zeros(rows, bool)
    state = start_decode_state(model, cache, token, logprob, ended, columns=shape.max_tokens, seen=seen)
    prompts = jnp.zeros((shape.num_prompts, shape.prompt_width), jnp.int32)
    history = start_history(prompts, shape.max_tokens, shape.draft_tokens)
    return dataclasses.replace(state, history=history)
