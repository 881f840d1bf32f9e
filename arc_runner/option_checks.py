"""What is refused of a command line by itself, before anything is read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from arc_puzzles import PROMPT_VERSIONS, ArcFormatError, choose_augmentations, create_grid_encoder
from arc_runner.errors import UsageError
from arc_runner.options import RunOptions, flag_of
from qwen2_core.messages import similar_name

_LEAST_TEMPERATURE = 1e-4  # below it the largest logit alone counts, as at 0, but for rounding
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})")


def check_options(options: RunOptions) -> None:
    """Checks everything that can be known from the options alone.

    Raises:
        UsageError: a value cannot be, or two of them contradict each other.
    """
    _check_paths(options)
    if options.prompts is not None:
        _check_own_prompts(options)
    _check_amounts(options)
    _check_processes(options)
    _check_generation(options)
    _check_prompts(options)


def _check_paths(options: RunOptions) -> None:
    if options.revision == "":
        raise UsageError("--revision is empty; leave the flag out or give it a value")
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.metadata["flag"].is_path and value is not None:
            _check_path(field.name, value)
    for name in ("model_path", "dataset_path", "prompts", "steer"):
        if "://" in (getattr(options, name) or ""):
            raise UsageError(f"--{name} {getattr(options, name)} is a URL; give a path of this machine")
    output = options.output_filepath
    if "://" in output or output.endswith("/") or Path(output).name in ("", ".."):
        raise UsageError(f"--output_filepath {output} is not the path of a local file")
    if Path(output) == Path(options.activations_dir):
        raise UsageError(f"--output_filepath and --activations_dir are both {output}")
    cache = options.compilation_cache_dir
    if cache is not None and "://" in cache:
        raise UsageError(f"--compilation_cache_dir {cache} is not a local directory")


def _check_own_prompts(options: RunOptions) -> None:
    """Refuses what is of puzzles alone, as far as it differs from its default."""
    if options.dataset_path != RunOptions.dataset_path:
        raise UsageError("--prompts and --dataset_path contradict each other: give one of the two")
    for name in ("solutions_path", "grid_encoder", "prompt_version"):
        if getattr(options, name) != getattr(RunOptions, name):
            raise UsageError(f"--{name} is of puzzles, and --prompts has none; leave it out")
    if options.augmentations != 1:
        raise UsageError(
            "--augmentations turns puzzles around, and --prompts has none; leave it out, "
            "--predictions_per_task is the number of samples"
        )


def _check_path(name: str, path: str) -> None:
    if not path:
        raise UsageError(f"--{name} is empty; leave the flag out or give it a value")
    if "\0" in path:
        raise UsageError(f"--{name} {path} has a NUL byte in it, which no path has")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--{name} {path} is not UTF-8 text; rename it, or set PYTHONUTF8=1 if the locale is another"
        ) from error
    if path.startswith("~"):  # what can be expanded is so by now
        raise UsageError(f"--{name} {path}: there is no user {path[1:].partition('/')[0]!r} with a home")


def _check_amounts(options: RunOptions) -> None:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            _check_limits(field.name, number)
    if 0 < options.temperature < _LEAST_TEMPERATURE:
        raise UsageError(
            f"--temperature must be 0, which is greedy, or at least {_LEAST_TEMPERATURE}, not "
            f"{options.temperature}"
        )
    if options.predictions_per_task % options.augmentations:
        raise UsageError(
            f"--predictions_per_task {options.predictions_per_task} is not a multiple of --augmentations "
            f"{options.augmentations}"
        )
    if options.max_output_tokens == 0 and options.samples_per_prompt > 1:
        raise UsageError(
            f"--max_output_tokens 0 generates nothing, so the {options.samples_per_prompt} samples of one "
            "prompt would be the same; leave out --temperature, or give a lower --predictions_per_task"
        )
    if options.temperature == 0 and options.samples_per_prompt > 1:
        remedy = (
            "or as many --augmentations as --predictions_per_task"
            if options.prompts is None
            else "or --predictions_per_task 1"
        )
        raise UsageError(
            f"at temperature 0 the {options.samples_per_prompt} samples of one prompt would be the same; "
            f"give a --temperature above 0 {remedy}"
        )


def _check_limits(name: str, number: float | None) -> None:
    """Refuses a number outside its flag's limits, and one that is none (NaN)."""
    limits = flag_of(name).limits
    if limits is None or number is None or limits.least <= number <= limits.most:
        return
    if number < limits.least:
        raise UsageError(f"--{name} must be at least {limits.least}, not {number}")
    raise UsageError(f"--{name} must be from {limits.least} to {limits.most}, not {number}")


def _check_generation(options: RunOptions) -> None:
    if options.kv_cache_dtype and options.generation == "python":
        raise UsageError(
            "--kv_cache_dtype is for the compiled ways of --generation; the old loop has no such choice"
        )
    data, model = options.mesh_shape or (1, 1)
    if data > 1 and options.generation != "continuous":
        raise UsageError(
            f"--mesh_shape {data} {model}: only --generation continuous shares its sequences among groups of "
            f"devices; with {options.generation} the first number must be 1"
        )
    if model > 1 and options.generation == "python":
        raise UsageError(f"--mesh_shape {data} {model}: the old loop of --generation python uses one device")
    if options.extract_prompt and not options.extract_activations:
        raise UsageError("--extract_prompt and --no_extract_activations contradict each other")
    if options.max_output_tokens == 0 and not options.extract_prompt:
        raise UsageError(
            "--max_output_tokens 0 generates nothing, and without --extract_prompt nothing would be stored: "
            "give --extract_prompt too"
        )
    if options.hook_points and not options.extract_activations:
        raise UsageError("--hook_points and --no_extract_activations contradict each other")
    if options.capture_before and options.steer is None:
        raise UsageError("--capture_before is about what --steer changes; leave it out or give both")
    if options.capture_before and not options.extract_activations:
        raise UsageError("--capture_before and --no_extract_activations contradict each other")


def _check_prompts(options: RunOptions) -> None:
    """Checks what only the modules that use these options can check: by calling them."""
    try:
        create_grid_encoder(options.grid_encoder)
        choose_augmentations(options.augmentations, options.random_seed)
    except (ValueError, ArcFormatError) as error:
        raise UsageError(str(error)) from error
    if options.prompt_version not in PROMPT_VERSIONS:
        known = ", ".join(PROMPT_VERSIONS)
        hint = similar_name(options.prompt_version, PROMPT_VERSIONS)
        raise UsageError(f"unknown --prompt_version {options.prompt_version!r}; known are {known}{hint}")


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
    if options.merge and options.dry_run:
        raise UsageError("--merge and --dry_run contradict each other: --merge writes the answers")
    if options.merge and (options.coordinator_address or options.num_shards) is not None:
        raise UsageError("--merge works alone; leave out what says which of several processes this is")
    _check_ray(options)
    address = options.coordinator_address
    if address is not None and not _is_address(address):
        raise UsageError(
            f"--coordinator_address {address} is not of the form HOST:PORT, with a port from 1 to 65535 and "
            "an IPv6 address in brackets"
        )
    for index, count in (("process_id", "num_processes"), ("shard_index", "num_shards")):
        number, total = getattr(options, index), getattr(options, count)
        if total is not None and not 0 <= number < total:
            raise UsageError(f"--{index} {number} is none of --{count} {total}, which are counted from 0")


def _check_ray(options: RunOptions) -> None:
    if options.ray is None:
        if options.ray_workers is not None:
            raise UsageError("--ray_workers is about --ray; leave it out or give both")
        return
    for name in ("num_shards", "coordinator_address", "merge", "dry_run"):
        if getattr(options, name):
            raise UsageError(f"--ray and --{name} contradict each other; leave one of them out")
    if options.generation != "continuous":
        raise UsageError(f"--ray is for --generation continuous alone, not {options.generation}")
    if "://" in options.ray:
        raise UsageError(
            f"--ray {options.ray} is for Ray's client; run the command on a machine of the cluster and give "
            "the head's HOST:PORT"
        )
    if options.ray and not _is_address(options.ray):
        raise UsageError(f"--ray {options.ray} is not of the form HOST:PORT, with a port from 1 to 65535")


def _is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    return match is not None and 1 <= int(match[2]) <= 65535
