"""The old generation path: a Python loop over a growing cache, one dispatch for each operation of the model.

It is kept as the reference that the compiled path is tested against, and for ``--generation python``.
It takes the same arguments and returns the same ``Generation``, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from generate_jitted import Generation
from qwen2_core.requests import check_request
from qwen2_core.sampling import Sampling, sample_tokens, sequence_keys
from qwen2_jax import QwenModel

_sample = jax.jit(sample_tokens)


def generate_single_task_python(
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
    extract_prompt: bool = False,
) -> Generation:
    """``generate_single_task_jitted`` without compilation; every sample has its own copy of its prompt.

    Raises:
        ValueError: as ``generate_single_task_jitted``.
    """
    request = check_request(
        model.config,
        input_ids,
        max_tokens,
        prompt_lengths=prompt_lengths,
        samples_per_prompt=samples_per_prompt,
        eos_token_ids=eos_token_ids,
        seed=seed,
        sequence_ids=sequence_ids,
    )
    growing = model.clone(config=model.config.replace(use_fixed_cache=False))
    variables = {"params": params}
    ids = np.repeat(request.input_ids, samples_per_prompt, axis=0)
    lengths = np.repeat(request.prompt_lengths, samples_per_prompt)
    batch, width = ids.shape
    keys = sequence_keys(request.seed, jnp.asarray(request.sequence_ids))

    mask = np.arange(width) < lengths[:, None]
    logits, caches, prompt_rows = growing.apply(variables, jnp.asarray(ids), mask)  # type: ignore[misc]
    last = jnp.take_along_axis(logits, jnp.asarray(lengths - 1)[:, None, None], axis=1)[:, 0]
    token, logprob = _sample(last, sampling.traced(), keys, 0)

    tokens = np.zeros((batch, max_tokens), np.int32)
    logprobs = np.zeros((batch, max_tokens), np.float32)
    counts, ended = np.zeros(batch, np.int32), np.zeros(batch, bool)
    rows = np.zeros((prompt_rows.shape[0], max_tokens, batch, prompt_rows.shape[3]), prompt_rows.dtype)
    for step in range(max_tokens):
        mask = np.concatenate([mask, np.ones((batch, 1), bool)], axis=1)
        logits, caches, activations = growing.apply(  # type: ignore[misc]
            variables, token[:, None], mask, caches, lengths + step
        )
        live = ~ended
        tokens[live, step], logprobs[live, step] = np.asarray(token)[live], np.asarray(logprob)[live]
        rows[:, step, live] = np.asarray(activations)[:, 0, live]
        counts += live
        ended |= live & np.isin(tokens[:, step], request.eos_token_ids)
        if ended.all():
            break
        token, logprob = _sample(logits[:, 0], sampling.traced(), keys, step + 1)
    prompt = None
    if extract_prompt:
        valid = (np.arange(width) < lengths[:, None])[::samples_per_prompt].T
        prompt = jnp.where(valid[None, :, :, None], prompt_rows[:, :, ::samples_per_prompt], 0)
    return Generation(
        token_ids=jnp.asarray(tokens),
        lengths=jnp.asarray(counts),
        finished=jnp.asarray(ended),
        logprobs=jnp.asarray(logprobs),
        activations=jnp.asarray(rows),
        prompt_activations=prompt,
    )
