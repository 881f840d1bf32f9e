"""The old generation path: a Python loop over a growing cache, one dispatch for each operation of the model.

It is the reference that the compiled path is tested against, and ``--generation python``. It takes the same
arguments and returns the same ``Generation``, slowly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from generate_jitted import Generation, Rows, rows_of
from qwen2_core.compilation import check_surroundings, defined_settings
from qwen2_core.inputs import whole_number, yes_or_no
from qwen2_core.parameter_checks import check_params
from qwen2_core.requests import check_max_tokens, check_prompts, check_sequence_ids
from qwen2_core.sampling import (
    Sampling,
    sample_tokens,
    sampling_params,
    sequence_keys,
    tokens_in,
    with_tokens,
)
from qwen2_core.steering import check_prompt_strengths, steer
from qwen2_jax import QwenModel, check_model

_sample = jax.jit(sample_tokens)


@defined_settings()
def generate_single_task_python(  # noqa: PLR0913 - as generate_single_task_jitted
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
    extract_prompt: bool = False,
    interventions: Any = (),
) -> Generation:
    """Generates as ``generate_single_task_jitted`` does, without compilation; activations where the model
    captures.

    Every sample has its own copy of its prompt.

    Raises:
        ValueError: as ``generate_single_task_jitted``.
    """
    check_model(model)
    check_surroundings(params, input_ids, prompt_lengths, attention_mask, sequence_ids)
    extract_prompt = yes_or_no("extract_prompt", extract_prompt)
    prompt_rows = extract_prompt and model.captures
    max_tokens = check_max_tokens(max_tokens, prompt_rows, "extract_prompt=True")
    samples_per_prompt = whole_number("samples_per_prompt", samples_per_prompt, 1)
    config = model.config
    prompts = check_prompts(config, input_ids, prompt_lengths, max_tokens, attention_mask)
    own_ids = check_sequence_ids(len(prompts.lengths), samples_per_prompt, sequence_ids)
    traced = sampling_params(sampling, seed, eos_token_ids, config.vocab_size)
    check_params(config, params)
    growing = model.clone(config=config.replace(use_fixed_cache=False))
    ids = np.repeat(prompts.input_ids, samples_per_prompt, axis=0)
    lengths = np.repeat(prompts.lengths, samples_per_prompt)
    batch, width = ids.shape
    keys = sequence_keys(traced.seed, jnp.asarray(own_ids))

    steering = steer(interventions, config, batch)
    check_prompt_strengths(steering, prompts.lengths)

    def forward(*inputs: Any) -> tuple[Array, Any, Rows]:
        output: Any = growing.apply(
            {"params": params},
            *inputs,
            interventions=steering,
            prompt_lengths=lengths,
            method=growing.forward,
        )
        return output.logits, output.cache, rows_of(output)

    mask = np.arange(width) < lengths[:, None]
    logits, caches, prompt_rows = forward(jnp.asarray(ids), mask)
    last = jnp.take_along_axis(logits, jnp.asarray(lengths - 1)[:, None, None], axis=1)[:, 0]
    seen = None
    if traced.repetition_penalty is not None:
        seen = tokens_in(jnp.asarray(ids), jnp.asarray(lengths), config.vocab_size)
    token, logprob = _sample(last, traced, keys, 0, seen)

    tokens = np.zeros((batch, max_tokens), np.int32)
    logprobs = np.zeros((batch, max_tokens), np.float32)
    counts, ended = np.zeros(batch, np.int32), np.zeros(batch, bool)
    buffers = growing.activation_buffer(max_tokens, batch), growing.point_buffers(max_tokens, batch)
    rows = jax.tree.map(lambda buffer: np.zeros(buffer.shape, buffer.dtype), buffers)
    for step in range(max_tokens):
        mask = np.concatenate([mask, np.ones((batch, 1), bool)], axis=1)
        logits, caches, captured = forward(token[:, None], mask, caches, lengths + step)
        live = ~ended
        tokens[live, step], logprobs[live, step] = np.asarray(token)[live], np.asarray(logprob)[live]
        for buffer, of_step in zip(jax.tree.leaves(rows), jax.tree.leaves(captured), strict=True):
            buffer[:, step, live] = np.asarray(of_step)[:, 0, live]
        counts += live
        ended |= live & np.isin(tokens[:, step], traced.eos_token_ids)
        if ended.all():
            break
        seen = with_tokens(seen, token)
        token, logprob = _sample(logits[:, 0], traced, keys, step + 1, seen)
    if extract_prompt:
        valid = (np.arange(width) < lengths[:, None])[::samples_per_prompt].T[None, :, :, None]
        prompt, prompt_points = jax.tree.map(
            lambda rows: jnp.where(valid, rows[:, :, ::samples_per_prompt], 0), prompt_rows
        )
    else:
        prompt, prompt_points = None, {}
    activations, points = jax.tree.map(jnp.asarray, rows)
    return Generation(
        token_ids=jnp.asarray(tokens),
        lengths=jnp.asarray(counts),
        finished=jnp.asarray(ended),
        logprobs=jnp.asarray(logprobs),
        activations=activations,
        prompt_activations=prompt,
        layers=model.capture_layers,
        points=points,
        prompt_points=prompt_points,
        point_layers=model.capture_points,
    )
