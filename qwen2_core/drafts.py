"""Decodes one sequence several tokens a pass: drafts copied from the text, checked by one forward pass.

A draft is what followed the last few tokens where they stand earlier in the prompt or in the answer ("prompt
lookup", Saxena 2023). One forward pass reads the token that was chosen and the draft behind it. It gives the
choice after each of them. Draft tokens stay as long as they are the tokens chosen; then the first choice that
differs is the next token.

This is speculative decoding (Leviathan et al. 2023; Chen et al. 2023) with a draft that is certain of itself.
Its rule is to keep a draft token x with the model's probability p(x), or else to draw from p without x. Both
are done by one draw from p: it is x with probability p(x), and otherwise it is of p without x. The draw has
the key that the plain loop would draw with. So greedy and sampled tokens are those of the plain loop, but
for rounding: a product of several rows may differ from that of one in its last bits.

Keys and values of rejected tokens stay in the cache, past its index: nothing attends to them, and the next
pass writes over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32, Key, UInt32

from kvcache_utils import update_slice
from qwen2_core.inputs import whole_number
from qwen2_core.sampling import SamplingParams, sample_tokens, sequence_keys

MATCHED_TOKENS = 12  # last tokens that are looked for at most; a place in a grid takes more than a word

# Token ids [1, tokens] and the cache to the logits of each, the cache behind them, and their rows.
Read = Callable[[Array, Any], tuple[Any, Any]]


def check_draft_tokens(given: Any, sequences: int, max_tokens: int) -> int:
    """Returns how many tokens a pass drafts: as asked, and no more than could stay.

    Raises:
        ValueError: not a whole number from 0 on, or drafts for several sequences.
    """
    draft_tokens = whole_number("draft_tokens", given, 0)
    if draft_tokens and sequences > 1:
        raise ValueError(
            f"draft_tokens is for a single sequence, not for {sequences}: give one prompt with "
            "samples_per_prompt=1, or leave draft_tokens out."
        )
    return min(draft_tokens, max(max_tokens - 1, 0))


def start_history(
    input_ids: Int32[Array, "sequences width"], max_tokens: int, draft_tokens: int
) -> Int32[Array, "sequences positions"] | None:
    """Returns room for each sequence's text and a draft past its end, with the prompt at its start.

    None where nothing is drafted.
    """
    if not draft_tokens:
        return None
    return jnp.pad(input_ids, ((0, 0), (0, max_tokens + draft_tokens)))


def find_draft(
    history: Int32[Array, " positions"], length: Int32[Array, ""], draft_tokens: int
) -> Int32[Array, " draft_tokens"]:
    """Returns what followed the last tokens of the text where most of them stand earlier, the first time.

    What lies between that place and the end is repeated where it is shorter than the draft. A text that says
    none of it earlier is drafted from its beginning.

    Args:
        history: the text, and anything past its ``length``, which is not read.
    """
    places = jnp.arange(len(history), dtype=jnp.int32)
    run = places < length - 1  # earlier than the last token
    matched = jnp.zeros(len(history), jnp.int32)
    for back in range(MATCHED_TOKENS):
        at = length - 1 - back
        earlier = jnp.roll(history, back)
        run &= (earlier == history[jnp.maximum(at, 0)]) & (places >= back) & (at >= 0)
        matched += run
    # The longest match, and of those the first, is one maximum: argmax is scalar code on CPU.
    ranked = matched * len(history) + len(history) - 1 - places
    best = jnp.max(jnp.where(places < length - 1, ranked, 0))
    period = jnp.maximum(length - 1 - (len(history) - 1 - best % len(history)), 1)
    return history[length - period + jnp.arange(draft_tokens, dtype=jnp.int32) % period]


def tokens_that_stay(
    tokens: Int32[Array, " tokens"],
    chosen: Int32[Array, " tokens"],
    ends: Bool[Array, " tokens"],
    room: Int32[Array, ""],
) -> Int32[Array, ""]:
    """Returns how many of the tokens read stay: 1, and all drafted ones that were chosen.

    Args:
        tokens: the token that was chosen before, and the draft.
        chosen: the token chosen after each of them.
        ends: which of the tokens end the sequence; none stays after such a one.
        room: tokens that the sequence may still have, at least 1.
    """
    goes_on = (chosen[:-1] == tokens[1:]) & ~ends[:-1]
    return jnp.minimum(1 + jnp.sum(jnp.cumprod(goes_on.astype(jnp.int32))), room).astype(jnp.int32)


def seen_after_each(
    seen: Bool[Array, "1 vocab"] | None, tokens: Int32[Array, " tokens"]
) -> Bool[Array, "tokens vocab"] | None:
    """Returns which tokens the text has after each of ``tokens`` is read; None stays None."""
    if seen is None:
        return None
    row, column = jnp.indices((len(tokens), len(tokens)), jnp.int32)
    so_far = jnp.where(column <= row, tokens[None], seen.shape[1])  # no token: dropped
    return jnp.repeat(seen, len(tokens), axis=0).at[row, so_far].set(True, mode="drop")


def write_columns(
    buffer: Array, values: Array, axis: int, index: Int32[Array, ""], stay: Int32[Array, ""]
) -> Array:
    """Writes the first ``stay`` of the values at ``index`` of an axis that has room for all of them."""
    size = values.shape[axis]
    start = jnp.minimum(index, buffer.shape[axis] - size)
    place = start + jnp.arange(size, dtype=jnp.int32) - index
    written = ((place >= 0) & (place < stay)).reshape(-1, *[1] * (buffer.ndim - axis - 1))
    values = jnp.take(values, place, axis, mode="clip").astype(buffer.dtype)
    old = lax.dynamic_slice_in_dim(buffer, start, size, axis)
    starts = tuple(start if one == axis else 0 for one in range(buffer.ndim))
    return update_slice(buffer, jnp.where(written, values, old), starts)


def decode_with_draft(
    read: Read, draft_tokens: int, state: Any, sampling: SamplingParams, key: Key[Array, ""]
) -> Any:
    """Reads the next token and a draft behind it, keeps the rows of those that stay, and chooses the token
    after them.

    Args:
        state: the ``DecodeState`` of one sequence, with its history.
    """
    index = state.cache.ar.index
    place = state.cache.prefill.length[0] + index
    history = lax.dynamic_update_slice(state.history, state.next_token[None], (0, place))
    draft = find_draft(history[0], place + 1, draft_tokens)
    tokens = jnp.concatenate([state.next_token, draft])
    output, rows = read(tokens[None], state.cache)

    count = len(tokens)
    seen = seen_after_each(state.seen, tokens)
    steps = index + 1 + jnp.arange(count, dtype=jnp.int32)
    keys = jnp.broadcast_to(key, (count,))
    chosen, logprobs = sample_tokens(output.logits[0], sampling, keys, steps, seen)
    ends = jnp.any(tokens[:, None] == sampling.eos_token_ids, axis=-1)
    stay = tokens_that_stay(tokens, chosen, ends, state.token_ids.shape[1] - index)

    def keep(buffer: Array, values: Array) -> Array:
        return write_columns(buffer, values, 1, index, stay)

    ar = dataclasses.replace(output.cache.ar, index=index + stay)
    activations, points = jax.tree.map(keep, (state.activations, state.points), rows)
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(output.cache, ar=ar),
        next_token=chosen[stay - 1][None],
        next_logprob=logprobs[stay - 1][None],
        ended=jnp.any(ends & (jnp.arange(count) < stay))[None],
        token_ids=keep(state.token_ids, tokens[None]),
        logprobs=keep(state.logprobs, jnp.concatenate([state.next_logprob, logprobs[:-1]])[None]),
        lengths=state.lengths + stay,
        activations=activations,
        points=points,
        seen=None if seen is None else seen[stay - 1][None],
        history=lax.dynamic_update_slice(history, tokens[None], (0, place)),
    )


def decode_with_drafts(
    read: Read, draft_tokens: int, state: Any, sampling: SamplingParams, sequence_ids: UInt32[Array, 1]
) -> Any:
    """Runs from the prefill's state to the last token: ``max_tokens`` of them, or up to an EOS."""
    (key,) = sequence_keys(sampling.seed, sequence_ids)
    return lax.while_loop(
        lambda state: (state.cache.ar.index < state.token_ids.shape[1]) & ~state.ended[0],
        lambda state: decode_with_draft(read, draft_tokens, state, sampling, key),
        state,
    )
