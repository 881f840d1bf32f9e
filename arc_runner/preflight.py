"""Checks places, devices and the model's config before the weights are loaded; each flaw is one sentence."""

from __future__ import annotations

import itertools
import os
import shlex
import stat
import tempfile
from pathlib import Path

import jax

from arc_puzzles.solutions import solutions_beside
from arc_runner.answer_files import answer_files, local_store
from arc_runner.console import say
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS
from arc_runner.errors import UsageError
from arc_runner.hook_flags import beyond
from arc_runner.options import RunOptions
from qwen2_core.checkpoint_files import has_weights, is_hub_id
from qwen2_core.compilation import check_settings
from qwen2_core.hub import cached_snapshot
from qwen2_core.layers import missing_defaults
from qwen2_core.messages import did_you_mean
from qwen2_core.sharding import Layout, make_layout
from qwen2_core.weights import read_config
from qwen2_jax import QwenConfig
from qwen2_jax_with_hooks import create_model_with_hooks

_LARGEST_FILE = 2**30  # bytes; all public ARC tasks together have less than a tenth of it
_MOST_FILES = 200_000


def say_defaults(options: RunOptions) -> None:
    """Says where the embedded example is used, and where the hub will be asked.

    Raises:
        UsageError: the hub would be asked by a dry run; --revision of a folder.
    """
    examples = [("model_path", EXAMPLE_MODEL, "a tiny model that has learned eight rules")]
    if options.prompts is None:
        examples.append(("dataset_path", EXAMPLE_TASKS, "ten puzzles, two of them of rules it never saw"))
    for name, path, what in examples:
        if getattr(options, name) == str(path):
            say(f"no --{name} given: using the embedded example, {what}")
    revision = options.revision
    if revision is not None and Path(options.model_path).exists():
        raise UsageError(
            f"--revision {revision} is of a hub model, and {options.model_path} is on this machine: leave "
            "--revision out"
        )
    if is_hub_id(options.model_path):
        cached = cached_snapshot(options.model_path, revision)
        if options.dry_run and (cached is None or not has_weights(cached)):
            of_revision = "" if revision is None else f" --revision {shlex.quote(revision)}"
            raise UsageError(
                f"--dry_run downloads nothing, and there is neither a directory {options.model_path} nor all "
                f"of such a model in the hub's cache; fetch it first: hf download {options.model_path}"
                f"{of_revision}"
            )
        where = (
            f"the hub's cache has it, at commit {cached.name[:12]}"
            if cached
            else "asking the Hugging Face hub"
        )
        say(f"there is no directory {options.model_path}: {where}")


def check_inputs(options: RunOptions) -> None:
    """Checks that what is to be read is there, and is what can be read to its end.

    Raises:
        UsageError: nothing is there; says which name is like it. Or it is a device or pipe, or too much.
    """
    path, flag = Path(options.input_path), f"--{options.input_flag}"
    what = "tasks" if options.prompts is None else "prompts"
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            if options.prompts is not None:
                raise UsageError(f"{flag}: {path} is a directory; name a file of prompts")
            with os.scandir(path) as entries:
                many = sum(1 for _ in itertools.islice(entries, _MOST_FILES + 1)) > _MOST_FILES
            if many:
                raise UsageError(f"{flag}: {path} has more than {_MOST_FILES} files; is it of tasks?")
        elif not stat.S_ISREG(status.st_mode):
            place = "file or directory" if options.prompts is None else "file"
            raise UsageError(f"{flag}: {path} is a device or pipe; give a {place} of {what}")
        elif status.st_size > _LARGEST_FILE:
            several = ", or a directory with a file for each" if options.prompts is None else ""
            raise UsageError(
                f"{flag}: {path} has {status.st_size} bytes, more than {_LARGEST_FILE}; give fewer {what}"
                f"{several}"
            )
    except OSError as error:
        hint = did_you_mean(path)
        raise UsageError(f"{flag}: cannot read {path}: {error.strerror}{hint}") from error
    store = options.activations_dir
    if options.merge and "://" not in store and not Path(store).exists():
        raise UsageError(f"--activations_dir: there is no {store}, and so no answers{did_you_mean(store)}")


def check_places(options: RunOptions) -> None:
    """Checks that the answers and the store can be written where they are to be, and replace no input.

    Makes the directory of the answers, but for a dry run. The store's own directory is left to its writer.

    Raises:
        UsageError: a place cannot be written, or belongs to the data set.
    """
    output, dataset, store = (
        Path(options.output_filepath),
        Path(options.input_path),
        local_store(options),
    )
    files = answer_files(options)
    for path in (*files, files.metrics()):
        _check_answer_file(path, options)
    if dataset.is_dir() and store is not None and _is_same(dataset, store):
        raise UsageError(
            f"--activations_dir: in {dataset}, the data set, every .json file is a task; "
            "name another directory"
        )
    for path in (store, *store.parents) if store is not None else ():
        if path.is_file():
            raise UsageError(f"--activations_dir: {path} is a file; name a directory")
    if options.dry_run:
        _check_writable(options)
        return
    folder = output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for folder in {Path(os.path.realpath(path)).parent for path in (*files, files.metrics())}:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise UsageError(f"--output_filepath: cannot write in {folder}: {error.strerror}") from error


def nearest_folder(path: Path) -> Path:
    """Returns the folder that is there already on the way to a path that may not be."""
    path = Path(os.path.realpath(path))
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _check_writable(options: RunOptions) -> None:
    """Checks without a trace that the answers and a local store could be made."""
    places = [("output_filepath", Path(os.path.realpath(path)).parent) for path in answer_files(options)]
    if (store := local_store(options)) is not None:
        places.append(("activations_dir", store))
    for flag, place in places:
        in_the_way = next((one for one in (place, *place.parents) if one.exists() and not one.is_dir()), None)
        if in_the_way is not None:
            raise UsageError(f"--{flag}: cannot write in {place}: {in_the_way} is not a directory")
        if not os.access(nearest_folder(place), os.W_OK | os.X_OK):
            raise UsageError(f"--{flag}: cannot write in {place}: {nearest_folder(place)} is read-only")


def _check_answer_file(path: Path, options: RunOptions) -> None:
    """Checks that a file of answers is one that may be written: none of the inputs, none of the store's."""
    if path.is_dir():
        raise UsageError(f"--output_filepath: {path} is a directory; name a file to write")
    if path.exists() and not path.is_file():
        raise UsageError(f"--output_filepath: {path} is not a regular file; name another")
    for flag, what in (
        (options.input_flag, "data set" if options.prompts is None else "file of the prompts"),
        ("solutions_path", "file of the solutions"),
        ("steer", "file of the interventions"),
    ):
        read = getattr(options, flag)
        if read is not None and _is_same(path, Path(read)):
            raise UsageError(f"--output_filepath: {path} is the {what}; name another file")
    beside = None if options.prompts is not None else solutions_beside(Path(options.dataset_path))
    if beside is not None and _is_same(path, beside):
        raise UsageError(f"--output_filepath: {path} is the file of the solutions; name another file")
    dataset, model, store = Path(options.input_path), Path(options.model_path), local_store(options)
    if dataset.is_dir() and _is_within(path, dataset):
        raise UsageError(
            f"--output_filepath: in {dataset}, the data set, every .json file is a task; "
            "name another directory"
        )
    if store is not None and _is_within(path, store):
        raise UsageError(f"--output_filepath: {path} lies in the store {store}; name a place outside of it")
    if model.is_dir() and _is_within(path, model):
        raise UsageError(f"--output_filepath: {path} lies in the model's directory; name another directory")


def _is_same(path: Path, other: Path) -> bool:
    """Tells whether two paths are one file, by whatever links."""
    same = os.path.realpath(path) == os.path.realpath(other)
    return same or (path.exists() and other.exists() and path.samefile(other))


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def choose_devices(options: RunOptions, config: QwenConfig) -> tuple[Layout, str]:
    """Returns where to generate, and its name for the report.

    By default ``--generation continuous`` runs on every accelerator of this process, each with all the
    weights; the other ways and the CPU use one device.

    Raises:
        UsageError: JAX finds no device, there are too few, the model cannot be split like that, or JAX has
            a setting with which results may differ.
    """
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX_PLATFORMS=cuda, no plugin
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UsageError(f"jax finds no device for JAX_PLATFORMS={platforms!r} ({error})") from error
    every_device = options.generation == "continuous" and devices[0].platform != "cpu"
    data, model = options.mesh_shape or (len(devices) if every_device else 1, 1)
    try:
        layout = make_layout(config, (data, model))
    except ValueError as error:
        raise UsageError(f"--mesh_shape {data} {model}: {error}") from error
    try:
        check_settings(mesh=layout.mesh is not None)
    except ValueError as error:
        raise UsageError(str(error)) from error
    kind = devices[0].device_kind
    if layout == Layout():
        if len(devices) > 1:
            say(f"using one of {len(devices)} devices ({kind})")
        return layout, kind
    say(layout.describe(config))
    return layout, f"{data} x {model} {kind}"


def load_config(options: RunOptions) -> QwenConfig:
    """Reads the model's config, in the dtypes that were asked for.

    Raises:
        CheckpointError: there is no such model, or it is not one that can be run.
        UsageError: no prompt would fit beside the answer, or the model lacks a layer to extract.
    """
    # The old loop is not compiled as a whole: it would compile a scan anew for each token.
    scan_layers = False if options.generation == "python" else None
    config = read_config(
        options.model_path, dtype=options.dtype, revision=options.revision, scan_layers=scan_layers
    )
    if options.residual_dtype not in ("float32", config.dtype.name):
        raise UsageError(
            f"--residual_dtype must be float32 or the dtype of the weights, {config.dtype.name}, not "
            f"{options.residual_dtype}"
        )
    config = config.replace(residual_dtype=options.residual_dtype)
    if options.max_output_tokens >= config.context_length:
        raise UsageError(
            f"--max_output_tokens {options.max_output_tokens} leaves no room for a prompt: the model's "
            f"context is {config.context_length}"
        )
    if options.extract_activations:
        if sentence := missing_defaults(options.layers_to_extract, config.num_hidden_layers):
            raise UsageError(f"--layers_to_extract: {sentence}")
        try:
            create_model_with_hooks(config, options.layers_to_extract)
        except ValueError as error:
            raise UsageError(f"--layers_to_extract: {error}") from error
    if missing := beyond(options.hook_points, config.num_hidden_layers):
        last = config.num_hidden_layers - 1
        raise UsageError(f"--hook_points: there is no {missing[0]}: the model has layers 0 to {last}")
    return config
