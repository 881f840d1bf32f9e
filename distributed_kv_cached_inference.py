"""The main job: ARC tasks and a Qwen2 checkpoint in; activations, answers and a report out.

    python distributed_kv_cached_inference.py --model_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_path training.json --activations_dir activations --output_filepath submission.json

The same command again continues where a run stopped. What can be refused is refused before the weights
are read. Exit codes: 0 all done, 75 stopped early and resumable, 1 some tasks failed (they are listed;
the others are done), 2 bad usage.
"""

from __future__ import annotations

from run_signals import EXIT_RESUMABLE, STOPPED, StopRequest, end_on_signals

if __name__ == "__main__":
    end_on_signals()  # here, as the other imports take seconds

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from activation_store import (
    ActivationWriter,
    SequenceId,
    StoreError,
    StoreSettings,
    StoreWriteError,
    hook_name,
    sequence_key,
)
from arc_tasks import ArcFormatError, encode_prompt, load_tasks
from qwen2_config import is_hub_id
from qwen2_jax import CheckpointError, QwenConfig
from qwen2_jax_with_hooks import create_model_with_hooks
from qwen2_weights import check_checkpoint, checkpoint_fingerprint, resolve_file
from run_continuous import make_continuously
from run_generation import Clock, Generator, finished_sequences, keep_programs
from run_options import EXAMPLES, RunOptions, UsageError, parse_options
from run_plan import Call, Prompt, build_prompts, plan_calls
from run_report import Progress, Report, failure_entries, report_path, write_answers

EXIT_DONE, EXIT_TASKS_FAILED, EXIT_USAGE = 0, 1, 2
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_PROBE = "Input 0123456789"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        return run(parse_options(argv))
    except (UsageError, ArcFormatError, CheckpointError) as error:
        return _fail(f"error: {error}", EXIT_USAGE)
    except StoreError as error:
        hint = "; the same command continues" if isinstance(error, StoreWriteError) else ""
        return _fail(f"error: {error}{hint}", EXIT_RESUMABLE if hint else EXIT_USAGE)
    except KeyboardInterrupt:
        return _fail(STOPPED, EXIT_RESUMABLE)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        return _fail(
            f"error: the device failed ({reason}); the same command continues, with a smaller --batch_size "
            "if memory ran out",
            EXIT_RESUMABLE,
        )
    except BrokenPipeError:  # whoever read our output is gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_RESUMABLE
    except OSError as error:
        return _fail(f"error: {error}", EXIT_USAGE)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def run(options: RunOptions, stop: StopRequest | None = None) -> int:
    """One run of the main job, its report printed and written; the exit code.

    A signal while it generates ends it in good order; at any other moment nothing is lost by its end.

    Raises:
        UsageError, ArcFormatError, CheckpointError, StoreError: as soon as it is known, each a sentence.
    """
    stop = stop or StopRequest()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it retries in vain, we report
    _say_defaults(options)
    loaded = load_tasks(options.dataset_path, options.n_tasks)
    _check_places(options)
    if options.compilation_cache_dir is not None:
        keep_programs(options.compilation_cache_dir)
    config = _load_config(options)
    check_checkpoint(options.model_path, config)
    tokenizer = _load_tokenizer(options.model_path, config.vocab_size)
    eos = _eos_token_ids(options.model_path, tokenizer, config.vocab_size)
    prompts, failures = build_prompts(loaded.tasks, tokenizer, options, config.max_position_embeddings)
    report = Report(options.model_path, _device_name())
    report.tasks = len(loaded.tasks) + len(loaded.failures)
    report.tasks_failed = failure_entries([*loaded.failures, *failures])
    settings = _store_settings(options, config, eos)
    keys = [sequence_key(settings, sequence) for sequence in _all_sequences(prompts, options)]

    with ActivationWriter(options.activations_dir, settings, provenance=_provenance(options)) as writer:
        report.sequences_resumed = sum(key in writer.committed for key in keys)
        print(
            f"{report.tasks} tasks, {len(keys)} sequences (each test input in {options.augmentations} "
            f"augmentations x {options.samples_per_prompt} samples), {report.sequences_resumed} of them done "
            "already",
            flush=True,
        )
        if report.sequences_resumed < len(keys):
            _generate(prompts, options, eos, settings, writer, report, stop)
        writer.close()
        records = [writer.committed[key] for key in keys if key in writer.committed]

    report.sequences = len(records)
    report.bytes_stored = writer.bytes_written
    report.stopped_early = len(records) < len(keys)
    report.add_failed_sequences(records)
    report.measure_memory()
    write_answers(report, options, loaded.tasks, records, tokenizer)
    print(report.text())
    print(
        f"activations in {options.activations_dir}, answers in {options.output_filepath}, "
        f"report in {report_path(options)}",
        flush=True,
    )
    if report.stopped_early:
        return EXIT_RESUMABLE
    return EXIT_TASKS_FAILED if report.tasks_failed or report.sequences_failed else EXIT_DONE


def _generate(
    prompts: Sequence[Prompt],
    options: RunOptions,
    eos: tuple[int, ...],
    settings: StoreSettings,
    writer: ActivationWriter,
    report: Report,
    stop: StopRequest,
) -> None:
    """Loads the weights and makes what is not committed yet, by the way that ``--generation`` names."""

    def is_done(sequence: SequenceId) -> bool:
        return sequence_key(settings, sequence) in writer.committed

    loading = Clock()
    with loading:
        generator = Generator.load(options, eos)
    report.load_seconds = loading.seconds
    if options.generation == "continuous":
        left = [sequence for sequence in _all_sequences(prompts, options) if not is_done(sequence)]
        make_continuously(left, generator, writer, report, stop)
    else:
        _make_calls(plan_calls(prompts, options, is_done), generator, settings, writer, report, stop)


def _make_calls(
    calls: Sequence[Call],
    generator: Generator,
    settings: StoreSettings,
    writer: ActivationWriter,
    report: Report,
    stop: StopRequest,
) -> None:
    """Makes the calls; each is stored while the next one computes."""
    options, compiling, generating = generator.options, Clock(), Clock()
    print(f"{len(calls)} calls to make", flush=True)
    if options.generation == "task":
        with compiling:
            report.programs = generator.compile(calls)
    progress = Progress(sum(len(call.sequences) for call in calls))
    # Signals are handled on the main thread, and only between two Python instructions: it must not be the
    # one that sits in a call.
    with stop.deferred(), generating, contextlib.closing(progress), ThreadPoolExecutor(1) as device:
        for call in calls:
            if stop.requested:
                break
            generation = device.submit(generator.generate, call).result()
            new = np.array([sequence_key(settings, s) not in writer.committed for s in call.sequences])
            writer.submit(
                lambda call=call, generation=generation, new=new: finished_sequences(
                    call, generation, options.extract_activations, new
                )
            )
            tokens = int(np.asarray(generation.lengths)[new].sum())
            del generation  # its buffers are the writer's; the next call needs the room
            report.tokens_generated += tokens
            progress.update(len(call.sequences), tokens)
        writer.close()
    report.compile_seconds, report.generate_seconds = compiling.seconds, generating.seconds


def _all_sequences(prompts: Sequence[Prompt], options: RunOptions) -> list[SequenceId]:
    """Every sequence of the run, in the order of the submission's attempts."""
    return [prompt.sequence(sample) for prompt in prompts for sample in range(options.samples_per_prompt)]


def _say_defaults(options: RunOptions) -> None:
    for name, what in (("model_path", "a tiny model with random weights"), ("dataset_path", "six puzzles")):
        if Path(getattr(options, name)).is_relative_to(EXAMPLES):
            print(f"no --{name} given: using the embedded example, {what}", flush=True)
    if is_hub_id(options.model_path):
        print(f"there is no directory {options.model_path}: asking the Hugging Face hub", flush=True)


def _check_places(options: RunOptions) -> None:
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


def _device_name() -> str:
    try:
        return jax.local_devices()[0].device_kind
    except (RuntimeError, AssertionError) as error:  # the second of JAX_PLATFORMS=cuda without its plugin
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UsageError(f"jax finds no device for JAX_PLATFORMS={platforms!r} ({error})") from error


def _load_config(options: RunOptions) -> QwenConfig:
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


def _load_tokenizer(model_path: str, vocab_size: int) -> Any:
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


def _eos_token_ids(model_path: str, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
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


def _store_settings(options: RunOptions, config: QwenConfig, eos: tuple[int, ...]) -> StoreSettings:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        with contextlib.suppress(CheckpointError):
            digest.update(resolve_file(options.model_path, name).read_bytes())
    layers = options.layers_to_extract if options.extract_activations else ()
    return StoreSettings(
        model_fingerprint=checkpoint_fingerprint(options.model_path),
        hook_names=tuple(hook_name(layer) for layer in layers),
        hidden_size=config.hidden_size,
        dtype=config.dtype.name,
        capture_prompt=options.extract_prompt,
        max_output_tokens=options.max_output_tokens,
        sampling={"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p},
        seed=options.random_seed,
        eos_token_ids=eos,
        tokenizer_sha256=digest.hexdigest(),
        prompt={
            "grid_encoder": options.grid_encoder,
            "prompt_version": options.prompt_version,
            "kv_cache_dtype": options.kv_cache_dtype or config.dtype.name,
        },
    )


def _provenance(options: RunOptions) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "numpy", "transformers", "safetensors")
    return {
        "model_id": options.model_path,
        "generation": options.generation,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


if __name__ == "__main__":
    sys.exit(main())
