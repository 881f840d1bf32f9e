"""What a checkpoint's ``generation_config.json`` decides here, and what it asks for that nothing applies.

Sampling is what a call or a command line says. Of the file only the EOS ids count by themselves; its lengths
are left to whoever generates. ``checkpoint_sampling`` is the sampling that it asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2_core.checkpoint_files import optional_file, read_json_object
from qwen2_core.errors import CheckpointError
from qwen2_core.sampling import Sampling

_NAME = "generation_config.json"
# Each of Transformers' settings that changes which tokens come, and the value that changes nothing.
_ALWAYS: dict[str, Any] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "sequence_bias": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": [],
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "stop_strings": [],
    "max_time": None,
    "guidance_scale": 1,
    "watermarking_config": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "remove_invalid_values": False,
}
_WHEN_SAMPLING: dict[str, Any] = {
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "top_h": 1,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}


def eos_token_ids(
    source: str | Path | None, tokenizer: Any, vocab_size: int, *, revision: str | None = None
) -> tuple[int, ...]:
    """Returns the token ids that end an answer, sorted.

    They are those of generation_config.json and config.json, the tokenizer's own, and ``<|im_end|>``, the end
    of a chat turn. ``source`` is the checkpoint's directory or hub id, of ``revision``; without one its files
    are not read.

    Raises:
        CheckpointError: one of them is no token of the vocabulary, or a file is no JSON object.
    """
    found = [tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")]
    for name in (_NAME, "config.json"):
        path = None if source is None else optional_file(source, name, revision=revision)
        if path is None:  # a checkpoint need not have the first
            continue
        value = read_json_object(path).get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    given = [token for token in found if token is not None]
    for token in given:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise CheckpointError(
                f"eos_token_id {token!r} of {source or 'the tokenizer'} is none of its {vocab_size} tokens"
            )
    return tuple(sorted(set(given)))


def checkpoint_sampling(source: str | Path, *, revision: str | None = None) -> Sampling:
    """Returns the sampling that a checkpoint's ``generation_config.json`` asks for; greedy without one.

    Transformers samples with its temperature, top_k, top_p and min_p only where it has ``do_sample``. What it
    does not name is off; there Transformers would take its own top_k of 50.

    Raises:
        CheckpointError: there is no such checkpoint, the file is no JSON object, or a value cannot be.
    """
    path = optional_file(source, _NAME, revision=revision)
    asked = {} if path is None else read_json_object(path)
    names = ["repetition_penalty"]
    values: dict[str, Any] = {}
    if asked.get("do_sample") is True:
        names += ["temperature", "top_k", "top_p", "min_p"]
        values["temperature"] = 1.0
    values |= {name: asked[name] for name in names if asked.get(name) is not None}
    try:
        return Sampling(**values)
    except ValueError as error:
        raise CheckpointError(f"{path} asks for a sampling that cannot be: {error}") from error


def unapplied_settings(
    source: str | Path, applied: Mapping[str, Any] | None = None, *, revision: str | None = None
) -> str | None:
    """Returns a sentence that names the settings of ``generation_config.json`` which are not applied.

    None where there are none: the file is missing, or its settings change nothing or are ``applied``.

    Args:
        source: the checkpoint's directory or hub id.
        applied: the values of ``Sampling`` that are used, if known.
        revision: branch, tag or commit of a hub model.

    Raises:
        CheckpointError: there is no such checkpoint, or the file is no JSON object.
    """
    path = optional_file(source, _NAME, revision=revision)
    if path is None:
        return None
    asked = read_json_object(path)
    applied = applied or {}
    neutral: dict[str, Any] = dict(_ALWAYS)
    named = []
    if asked.get("do_sample") is True:
        neutral |= _WHEN_SAMPLING
        if applied.get("temperature") == 0:
            named.append("do_sample true")
    for name, value in neutral.items():
        given = asked.get(name)
        if given is None or given == applied.get(name, value) or (given in ([], {}) and value == []):
            continue
        shown = repr(given)
        named.append(f"{name} {shown if len(shown) <= 40 else f'{shown[:40]}...'}")
    if not named:
        return None
    *others, last = named
    words = f"{', '.join(others)} and {last}" if others else last
    return f"{_NAME} asks for {words}, which {'are' if others else 'is'} not applied"
