"""What is refused of a command line by itself, before anything is read."""

from __future__ import annotations

import re
from pathlib import Path

from arc_puzzles import PROMPT_VERSIONS, ArcFormatError, choose_augmentations, create_grid_encoder
from arc_runner.errors import UsageError
from arc_runner.options import RunOptions
from qwen2_core.sampling import Sampling


def check_options(options: RunOptions) -> None:
    """Checks everything that can be known from the options alone.

    Raises:
        UsageError: a value cannot be, or two of them contradict each other.
    """
    _check_paths(options)
    _check_amounts(options)
    _check_processes(options)
    _check_generation(options)
    _check_sampling_and_prompts(options)


def _check_paths(options: RunOptions) -> None:
    for name in ("model_path", "dataset_path", "solutions_path", "activations_dir", "output_filepath"):
        if getattr(options, name) == "":
            raise UsageError(f"--{name} is empty; leave the flag out or give it a value")
    output = options.output_filepath
    if "://" in output or output.endswith("/") or Path(output).name in ("", ".."):
        raise UsageError(f"--output_filepath {output} is not the path of a local file")
    if Path(output) == Path(options.activations_dir):
        raise UsageError(f"--output_filepath and --activations_dir are both {output}")
    cache = options.compilation_cache_dir
    if cache is not None and "://" in cache:
        raise UsageError(f"--compilation_cache_dir {cache} is not a local directory")


def _check_amounts(options: RunOptions) -> None:
    for name in ("batch_size", "max_output_tokens", "predictions_per_task", "augmentations"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.n_tasks is not None and options.n_tasks < 1:
        raise UsageError(f"--n_tasks must be at least 1, not {options.n_tasks}")
    if not 0 <= options.random_seed < 2**32:
        raise UsageError(f"--random_seed must be between 0 and 2**32 - 1, not {options.random_seed}")
    if options.predictions_per_task % options.augmentations:
        raise UsageError(
            f"--predictions_per_task {options.predictions_per_task} is not a multiple of --augmentations "
            f"{options.augmentations}"
        )
    if options.temperature == 0 and options.samples_per_prompt > 1:
        raise UsageError(
            f"at temperature 0 the {options.samples_per_prompt} samples of one prompt would be the same; "
            "give a --temperature above 0 or as many --augmentations as --predictions_per_task"
        )
    if options.memory_budget is not None and not options.memory_budget > 0:
        raise UsageError(f"--memory_budget must be above 0, not {options.memory_budget}")


def _check_generation(options: RunOptions) -> None:
    if options.kv_cache_dtype and options.generation == "python":
        raise UsageError(
            "--kv_cache_dtype is for the compiled ways of --generation; the old loop has no such choice"
        )
    data, model = options.mesh_shape or (1, 1)
    if min(data, model) < 1:
        raise UsageError(f"--mesh_shape {data} {model}: both must be at least 1")
    if data > 1 and options.generation != "continuous":
        raise UsageError(
            f"--mesh_shape {data} {model}: only --generation continuous shares its sequences among groups of "
            f"devices; with {options.generation} the first number must be 1"
        )
    if model > 1 and options.generation == "python":
        raise UsageError(f"--mesh_shape {data} {model}: the old loop of --generation python uses one device")
    if options.extract_prompt and not options.extract_activations:
        raise UsageError("--extract_prompt and --no_extract_activations contradict each other")


def _check_sampling_and_prompts(options: RunOptions) -> None:
    """Checks what only the modules that use these options can check: by calling them."""
    try:
        Sampling(options.temperature, options.top_k, options.top_p)
        create_grid_encoder(options.grid_encoder)
        choose_augmentations(options.augmentations, options.random_seed)
    except (ValueError, ArcFormatError) as error:
        raise UsageError(str(error)) from error
    if options.prompt_version not in PROMPT_VERSIONS:
        known = ", ".join(PROMPT_VERSIONS)
        raise UsageError(f"unknown --prompt_version {options.prompt_version!r}; known are {known}")


def _check_processes(options: RunOptions) -> None:
    for names in (("coordinator_address", "num_processes", "process_id"), ("num_shards", "shard_index")):
        missing = [name for name in names if getattr(options, name) is None]
        if missing and len(missing) < len(names):
            flags = ", ".join(f"--{name}" for name in names)
            raise UsageError(f"{flags} go together: --{missing[0]} is missing")
    if options.coordinator_address is not None and options.num_shards is not None:
        raise UsageError(
            "--coordinator_address and --num_shards contradict each other: shards need no coordinator"
        )
    if options.merge and (options.coordinator_address or options.num_shards) is not None:
        raise UsageError("--merge works alone; leave out what says which of several processes this is")
    address = options.coordinator_address
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise UsageError(f"--coordinator_address {address} is not of the form HOST:PORT")
    for index, count in (("process_id", "num_processes"), ("shard_index", "num_shards")):
        number, total = getattr(options, index), getattr(options, count)
        if total is not None and not 0 <= number < total:
            raise UsageError(f"--{index} {number} is none of --{count} {total}, which are counted from 0")
