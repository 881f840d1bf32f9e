"""The runner's command line: what may be asked, its defaults, and what is refused before any work."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, NoReturn

from arc_puzzles import PROMPT_VERSIONS, ArcFormatError, choose_augmentations, create_grid_encoder
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS
from qwen2_core.sampling import Sampling
from qwen2_jax_with_hooks import FIXED_EXTRACT_LAYERS

# Flags of the old runner that are gone, and what to do without them.
_RETIRED = {
    "--use_kv_cache": "the KV cache is always on",
    "--no_kv_cache": "the KV cache is always on",
    "--use_rope_cache": "rotary angles are always computed once per step",
    "--no_rope_cache": "rotary angles are always computed once per step",
    "--compile_prefill": "the prefill is always compiled",
    "--use_scan_loop": "the decode loop is always compiled; --generation python is the old loop",
    "--prefill_chunk_size": "long prompts are processed in blocks by themselves",
    "--save_every_n_batches": "every batch is stored as soon as it is done",
    "--upload_to_cloud": "give a URL as --activations_dir",
    "--cloud_bucket": "give a URL as --activations_dir",
}


class UsageError(ValueError):
    """What was asked for cannot be done; one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """One run of the main job; fields are the flags of the same names."""

    model_path: str = str(EXAMPLE_MODEL)
    dataset_path: str = str(EXAMPLE_TASKS)
    activations_dir: str = "activations"
    output_filepath: str = "submission.json"
    n_tasks: int | None = None
    grid_encoder: str = "GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))"
    prompt_version: str = "output-from-examples-v0"
    batch_size: int = 8
    max_output_tokens: int = 1100
    predictions_per_task: int = 8
    augmentations: int = 8
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    random_seed: int = 0
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    mesh_shape: tuple[int, int] | None = None
    layers_to_extract: tuple[int, ...] = FIXED_EXTRACT_LAYERS
    extract_activations: bool = True
    extract_prompt: bool = False
    generation: str = "continuous"
    memory_budget: float | None = None
    compilation_cache_dir: str | None = None
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    num_shards: int | None = None
    shard_index: int | None = None
    merge: bool = False

    @property
    def samples_per_prompt(self) -> int:
        return self.predictions_per_task // self.augmentations

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def parse_options(argv: list[str] | None = None) -> RunOptions:
    """The command line as ``RunOptions``.

    Raises:
        UsageError: unknown or retired flags, and values that cannot be.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(argv)
    for flag in (word.split("=")[0] for word in unknown):
        if flag in _RETIRED:
            raise UsageError(f"{flag} no longer exists: {_RETIRED[flag]}")
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser.flags(), 1)
        hint = f"did you mean {close[0]}?" if close else "--help lists the flags"
        raise UsageError(f"unknown argument {unknown[0]}; {hint}")
    values: dict[str, Any] = vars(given)
    values["layers_to_extract"] = tuple(sorted(values["layers_to_extract"]))
    if values["mesh_shape"] is not None:
        values["mesh_shape"] = tuple(values["mesh_shape"])
    if values["augmentations"] is None:
        # Greedy samples of one prompt are all the same, so greedy predictions differ by augmentation.
        values["augmentations"] = values["predictions_per_task"] if values["temperature"] == 0 else 1
    options = RunOptions(**values)
    _check(options)
    return options


def _check(options: RunOptions) -> None:
    for name in ("model_path", "dataset_path", "activations_dir", "output_filepath"):
        if not getattr(options, name):
            raise UsageError(f"--{name} is empty; leave the flag out or give it a value")
    output = options.output_filepath
    if "://" in output or output.endswith("/") or Path(output).name in ("", ".."):
        raise UsageError(f"--output_filepath {output} is not the path of a local file")
    if Path(output) == Path(options.activations_dir):
        raise UsageError(f"--output_filepath and --activations_dir are both {output}")
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
    if options.compilation_cache_dir is not None and "://" in options.compilation_cache_dir:
        raise UsageError(f"--compilation_cache_dir {options.compilation_cache_dir} is not a local directory")
    _check_processes(options)
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
        raise UsageError("--coordinator_address and --num_shards contradict each other: shards work unmet")
    if options.merge and (options.coordinator_address or options.num_shards) is not None:
        raise UsageError("--merge works alone; leave out what says which of several processes this is")
    address = options.coordinator_address
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise UsageError(f"--coordinator_address {address} is not of the form HOST:PORT")
    for index, count in (("process_id", "num_processes"), ("shard_index", "num_shards")):
        place, total = getattr(options, index), getattr(options, count)
        if total is not None and not 0 <= place < total:
            raise UsageError(f"--{index} {place} is none of --{count} {total}, which are counted from 0")


def _parser() -> _Parser:
    parser = _Parser(
        prog="distributed_kv_cached_inference.py",
        description="ARC tasks and a Qwen2 checkpoint in; activations, answers and a report out. "
        "The same command again continues where a run stopped.",
        allow_abbrev=False,
    )
    defaults = {field.name: field.default for field in dataclasses.fields(RunOptions)}

    def add(group: Any, name: str, help_text: str, shown: str | None = "%(default)s", **kwargs: Any) -> None:
        """One flag; ``shown`` is its default in --help, None where the text says it already."""
        kwargs = {"default": defaults[name], "metavar": name.split("_")[-1].upper(), **kwargs}
        text = f"{help_text} (default: {shown})" if shown and kwargs["default"] is not None else help_text
        group.add_argument(f"--{name}", help=text, **kwargs)

    paths = parser.add_argument_group("what to read and write")
    add(
        paths,
        "model_path",
        "directory in Hugging Face layout or hub id; a tiny example if left out",
        shown=None,
    )
    add(
        paths,
        "dataset_path",
        "ARC tasks: JSON file, JSONL file or directory of task files; six examples if left out",
        shown=None,
    )
    add(paths, "activations_dir", "where the activation store is, or is to be: a directory or URL")
    add(paths, "output_filepath", "the submission; the report goes beside it")
    add(paths, "n_tasks", "use the first N tasks only", type=int, metavar="N")

    prompts = parser.add_argument_group("prompts")
    add(prompts, "grid_encoder", "how grids are written, nested by name")
    add(prompts, "prompt_version", f"the words around the puzzle: {' or '.join(PROMPT_VERSIONS)}", shown=None)
    add(prompts, "predictions_per_task", "predictions for each test input", type=int, metavar="N")
    add(
        prompts,
        "augmentations",
        "flipped, rotated and recoloured variants among the predictions, the first unchanged; "
        "by default all predictions at temperature 0, else 1",
        type=int,
        metavar="N",
        default=None,
    )

    generation = parser.add_argument_group("generation")
    add(
        generation,
        "batch_size",
        "sequences generated at once, on each group of devices; any size continues a run",
        type=int,
    )
    add(generation, "max_output_tokens", "tokens per answer at most", type=int)
    add(generation, "temperature", "0 is greedy", type=float)
    add(generation, "top_k", "sample among the K likeliest tokens; 0: all", type=int)
    add(generation, "top_p", "sample among the likeliest tokens of this total probability", type=float)
    add(generation, "random_seed", "of sampling and recolouring", type=int)
    dtypes = ["float32", "bfloat16"]
    of_choices: dict[str, Any] = {"choices": dtypes, "metavar": None}
    add(generation, "dtype", "of weights and activations; the checkpoint's own if left out", **of_choices)
    add(generation, "kv_cache_dtype", "of the KV cache; that of the weights if left out", **of_choices)
    add(
        generation,
        "mesh_shape",
        "DATA groups of MODEL devices each: every group generates --batch_size sequences at once, and splits "
        "the weights among its devices (default: each accelerator of this process by itself)",
        shown=None,
        type=int,
        nargs=2,
        metavar=("DATA", "MODEL"),
    )
    add(
        generation,
        "generation",
        "continuous: slots that take the next sequence as soon as one has ended; task: one compiled call per "
        "ARC task; python: the old uncompiled loop, slow, for comparison",
        choices=["continuous", "task", "python"],
        metavar=None,
    )
    add(
        generation,
        "memory_budget",
        "GB that --generation continuous may take on the device; where --batch_size sequences at once would "
        "take more, there are fewer (default: nearly all of an accelerator's, half of the machine's on CPU)",
        type=float,
        metavar="GB",
    )

    add(
        generation,
        "compilation_cache_dir",
        "keep compiled programs in this directory of yours, for runs of the same shapes",
    )

    processes = parser.add_argument_group(
        "several processes", "found out by themselves on TPU pods, SLURM, Kubernetes and Open MPI"
    )
    add(processes, "coordinator_address", "where process 0 waits for the others", metavar="HOST:PORT")
    add(processes, "num_processes", "how many there are", type=int, metavar="N")
    add(processes, "process_id", "which one this is, from 0", type=int, metavar="I")
    add(
        processes,
        "num_shards",
        "split the tasks in N fixed shares, without a cluster",
        type=int,
        metavar="N",
    )
    add(processes, "shard_index", "the share to make, from 0", type=int, metavar="I")

    processes.add_argument(
        "--merge",
        action="store_true",
        help="write the answers of what is in the store; generate nothing",
    )

    capture = parser.add_argument_group("capture")
    layers = FIXED_EXTRACT_LAYERS
    add(
        capture,
        "layers_to_extract",
        "decoder blocks whose outputs are stored, counted from 0",
        shown=f"{layers[0]} to {layers[-1]}",
        type=int,
        nargs="+",
        metavar="LAYER",
    )
    capture.add_argument("--extract_activations", action="store_true", default=True, help="the default")
    capture.add_argument(
        "--no_extract_activations",
        dest="extract_activations",
        action="store_false",
        default=argparse.SUPPRESS,
        help="store tokens and log-probabilities only",
    )
    capture.add_argument(
        "--extract_prompt", action="store_true", help="store the rows of the prompts' tokens too"
    )
    return parser
