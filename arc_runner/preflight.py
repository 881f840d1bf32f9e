"""What a run reads and where it writes, looked at before the weights are read: each flaw is one sentence."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from arc_puzzles import encode_prompt
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS
from arc_runner.options import RunOptions, UsageError
from arc_runner.report import report_path
from qwen2_core.checkpoint_files import is_hub_id, resolve_file
from qwen2_core.sharding import Layout, make_layout
from qwen2_jax import CheckpointError, QwenConfig
from qwen2_jax_with_hooks import create_model_with_hooks

_PROBE = "Input 0123456789"


def say_defaults(options: RunOptions) -> None:
    for name, path, what in (
        ("model_path", EXAMPLE_MODEL, "a tiny model with random weights"),
        ("dataset_path", EXAMPLE_TASKS, "six puzzles"),
    ):
        if getattr(options, name) == str(path):
            print(f"no --{name} given: using the embedded example, {what}", flush=True)
    if is_hub_id(options.model_path):
        print(f"there is no directory {options.model_path}: asking the Hugging Face hub", flush=True)


def check_places(options: RunOptions) -> None:
    """What is written can be, and is no part of what is read."""
    output, store, dataset = (
        Path(path) for path in (options.output_filepath, options.activations_dir, options.dataset_path)
    )
    for path in (output, report_path(options)):
        if path.is_dir():
            raise UsageError(f"--output_filepath: {path} is a directory; name a file to write")
        if path.resolve() == dataset.resolve():
            raise UsageError(f"--output_filepath: {path} is the data set; name another file")
    if dataset.is_dir() and dataset.resolve() in (output.parent.resolve(), store.resolve()):
        flag = "activations_dir" if dataset.resolve() == store.resolve() else "output_filepath"
        raise UsageError(
            f"--{flag}: in {dataset}, the data set, every .json file is a task; name another directory"
        )
    if "://" not in options.activations_dir:
        for path in (store, *store.parents):
            if path.is_file():
                raise UsageError(f"--activations_dir: {path} is a file; name a directory")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UsageError(f"--output_filepath: cannot write in {output.parent}: {error.strerror}") from error


def choose_devices(options: RunOptions, config: QwenConfig) -> tuple[tuple[int, int], str]:
    """The mesh to generate on, by default each accelerator of this process by itself, and what it is called.

    Raises:
        UsageError: there is no such mesh here, or the model cannot be split so.
    """
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the second of JAX_PLATFORMS=cuda without its plugin
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UsageError(f"jax finds no device for JAX_PLATFORMS={platforms!r} ({error})") from error
    by_itself = options.generation == "continuous" and devices[0].platform != "cpu"
    data, model = options.mesh_shape or (len(devices) if by_itself else 1, 1)
    try:
        layout = make_layout(config, (data, model))
    except ValueError as error:
        raise UsageError(f"--mesh_shape {data} {model}: {error}") from error
    kind = devices[0].device_kind
    if layout == Layout():
        if len(devices) > 1:
            print(f"using one of {len(devices)} devices ({kind})", flush=True)
        return (1, 1), kind
    print(layout.describe(config), flush=True)
    return (data, model), f"{data} x {model} {kind}"


def load_config(options: RunOptions) -> QwenConfig:
    config = QwenConfig.from_hf(options.model_path)
    if options.dtype is not None:
        config = config.replace(dtype=options.dtype)
    if options.max_output_tokens >= config.max_position_embeddings:
        raise UsageError(
            f"--max_output_tokens {options.max_output_tokens} leaves no room for a prompt: the model's "
            f"context is {config.max_position_embeddings}"
        )
    if options.extract_activations:
        try:
            create_model_with_hooks(config, options.layers_to_extract)
        except ValueError as error:
            raise UsageError(f"--layers_to_extract: {error}") from error
    return config


def load_tokenizer(model_path: str, vocab_size: int) -> Any:
    """The checkpoint's tokenizer, tried out: of a missing vocabulary transformers makes an empty one."""
    # It would warn that torch is missing, which is not needed, and of prompts beyond the tokenizer's limit,
    # where the model's counts.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer  # takes seconds; bad usage is told at once

    resolve_file(model_path, "tokenizer_config.json")
    directory = Path(model_path).expanduser()
    try:
        source = directory if directory.is_dir() else model_path
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        token_ids = encode_prompt(
            tokenizer, [{"role": role, "content": _PROBE} for role in ("system", "user")]
        )
        if tokenizer.decode(token_ids.tolist()).count(_PROBE) != 2:
            raise ValueError(f"it does not give back the text {_PROBE!r} (is its vocabulary there?)")
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # many kinds, of transformers, tokenizers and the chat template
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the tokenizer of {model_path} cannot be used: {reason}") from error
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of {model_path} has token ids up to {largest}, the model a vocabulary of "
            f"{vocab_size}: they do not belong together"
        )
    return tokenizer


def eos_token_ids(model_path: str, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Where an answer ends: the checkpoint's own EOS ids, the tokenizer's, and the end of a chat turn."""
    found = [tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")]
    for name in ("generation_config.json", "config.json"):
        try:
            path = resolve_file(model_path, name)
        except CheckpointError:  # a checkpoint need not have the first
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a JSON object ({error})") from error
        found += value if isinstance(value, list) else [value]
    given = [token for token in found if token is not None]
    for token in given:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise CheckpointError(
                f"eos_token_id {token!r} of {model_path} is none of its {vocab_size} tokens"
            )
    return tuple(sorted(set(given)))
