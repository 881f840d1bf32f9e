"""The options of a run: one definition of each flag, its default, its limits and its help.

Does not import JAX, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from arc_puzzles import PROMPT_VERSIONS
from arc_runner.data import EXAMPLE_MODEL, EXAMPLE_TASKS
from qwen2_core.layers import FIXED_EXTRACT_LAYERS

if TYPE_CHECKING:
    from qwen2_core.sampling import Sampling

PATHS = "what to read and write"
PROMPTS = "prompts"
GENERATION = "generation"
PROCESSES = "several processes"
CAPTURE = "capture"
NO_CACHE = "none"  # --compilation_cache_dir
_DTYPES = ("float32", "bfloat16", "float16")


class Limits(NamedTuple):
    """The least and the most that a number may be."""

    least: float
    most: float


_COUNT = Limits(1, 10**9)  # of tasks: as many as there are
_PROCESS_COUNT = Limits(1, 100_000)  # host folders have five digits
_PROCESS_INDEX = Limits(0, 99_999)


@dataclasses.dataclass(frozen=True)
class Flag:
    """Describes the flag ``--name`` of the field that carries it.

    ``default_text`` is the default as --help shows it: None to show the field's own, "" where ``help`` says
    it already. Each of a flag's numbers is within ``limits``. ``is_path`` is true where it names a file or
    directory; a leading ``~`` is then the home directory. ``arguments`` are those of
    ``argparse.ArgumentParser.add_argument``.
    """

    group: str
    help: str
    default_text: str | None
    limits: Limits | None
    is_path: bool
    arguments: dict[str, Any]


def _flag(
    group: str,
    default: Any,
    help: str,
    default_text: str | None = None,
    limits: Limits | None = None,
    **arguments: Any,
) -> Any:
    """Returns a dataclass field with its flag in the metadata."""
    flag = Flag(group, help, default_text, limits, False, arguments)
    return dataclasses.field(default=default, metadata={"flag": flag})


def _path(
    group: str, default: str | None, help: str, default_text: str | None = None, **arguments: Any
) -> Any:
    """Returns a dataclass field whose flag names a file or directory."""
    flag = Flag(group, help, default_text, None, True, arguments)
    return dataclasses.field(default=default, metadata={"flag": flag})


def flag_of(name: str) -> Flag:
    """Returns the flag of the field ``name``."""
    return RunOptions.__dataclass_fields__[name].metadata["flag"]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Holds what one run of the main job is asked for; each field is the flag of the same name."""

    model_path: str = _path(
        PATHS,
        str(EXAMPLE_MODEL),
        "directory in Hugging Face layout or hub id; a tiny trained example if left out",
        default_text="",
    )
    revision: str | None = _flag(
        PATHS,
        None,
        "branch, tag or commit of a hub model; what the cache has of the main branch if left out",
        default_text="",
        metavar="REVISION",
    )
    dataset_path: str = _path(
        PATHS,
        str(EXAMPLE_TASKS),
        "ARC tasks: a JSON or JSONL file or a directory of task files; ten small examples if left out",
        default_text="",
    )
    prompts: str | None = _path(
        PATHS,
        None,
        "prompts of your own instead of ARC tasks: a JSONL file with messages, prompt or text a line",
    )
    solutions_path: str | None = _path(
        PATHS,
        None,
        "right answers as Kaggle has them; *_solutions.json beside *_challenges.json is found by itself",
    )
    activations_dir: str = _path(
        PATHS,
        "activations",
        "where the activation store is, or is to be: a directory or URL (default: activations; with "
        "--prompts prompt-activations)",
        default_text="",
    )
    output_filepath: str = _path(
        PATHS,
        "submission.json",
        "the submission; predictions and report go beside it (default: submission.json; with --prompts "
        "completions.jsonl)",
        default_text="",
    )
    n_tasks: int | None = _flag(
        PATHS, None, "use the first N tasks or prompts only", "all", _COUNT, type=int, metavar="N"
    )
    dry_run: bool = _flag(
        PATHS,
        False,
        "check everything, print the plan and one whole prompt; generate nothing and write nothing",
        action="store_true",
    )

    grid_encoder: str = _flag(
        PROMPTS,
        "GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))",
        "how grids are written, nested by name",
    )
    prompt_version: str = _flag(
        PROMPTS,
        "output-from-examples-v0",
        f"the words around the puzzle: {' or '.join(PROMPT_VERSIONS)}",
    )
    enable_thinking: str | None = _flag(
        PROMPTS,
        None,
        "whether a model that can think first (Qwen3) does; for chat templates that take enable_thinking, "
        "which decide it themselves if left out",
        choices=("true", "false"),
        metavar=None,
    )
    predictions_per_task: int = _flag(
        PROMPTS,
        8,
        "predictions for each test input, or samples of each of --prompts (default: 8; with --prompts 1)",
        default_text="",
        limits=Limits(1, 100_000),
        type=int,
        metavar="N",
    )
    augmentations: int = _flag(
        PROMPTS,
        8,
        "flipped, rotated and recoloured variants among the predictions, the first unchanged; "
        "by default all predictions at temperature 0, else 1",
        default_text="",
        limits=Limits(1, 100_000),
        type=int,
        metavar="N",
    )

    batch_size: int = _flag(
        GENERATION,
        8,
        "sequences generated at once, on each group of devices; any size continues a run",
        limits=Limits(1, 2**16),
        type=int,
    )
    max_output_tokens: int = _flag(
        GENERATION,
        1100,
        "tokens per answer at most; 0 with --extract_prompt: store the prompts' rows, generate nothing",
        None,
        Limits(0, 2**20),
        type=int,
    )
    temperature: float = _flag(GENERATION, 0.0, "0 is greedy", None, Limits(0, 10_000), type=float)
    top_k: int = _flag(
        GENERATION, 0, "sample among the K likeliest tokens; 0: all", None, Limits(0, 2**31 - 1), type=int
    )
    top_p: float = _flag(
        GENERATION,
        1.0,
        "sample among the likeliest tokens of this total probability",
        limits=Limits(1e-6, 1),
        type=float,
    )
    min_p: float = _flag(
        GENERATION,
        0.0,
        "sample among the tokens of at least this share of the likeliest one's probability",
        limits=Limits(0, 1),
        type=float,
    )
    repetition_penalty: float = _flag(
        GENERATION,
        1.0,
        "above 1: make the tokens less likely that the prompt or the answer has already; 1: no penalty",
        default_text="",
        limits=Limits(0.01, 100),
        type=float,
    )
    random_seed: int = _flag(
        GENERATION, 0, "of sampling and recolouring", None, Limits(0, 2**32 - 1), type=int
    )
    dtype: str | None = _flag(
        GENERATION,
        None,
        "of weights and activations; the checkpoint's own if left out",
        choices=_DTYPES,
        metavar=None,
    )
    residual_dtype: str = _flag(
        GENERATION,
        "float32",
        "of the residual stream and of what lies between products; that of the weights rounds as "
        "Transformers does",
        choices=_DTYPES,
        metavar=None,
    )
    kv_cache_dtype: str | None = _flag(
        GENERATION, None, "of the KV cache; that of the weights if left out", choices=_DTYPES, metavar=None
    )
    mesh_shape: tuple[int, int] | None = _flag(
        GENERATION,
        None,
        "DATA groups of MODEL devices each: every group generates --batch_size sequences at once, and splits "
        "the weights among its devices (default: each accelerator of this process by itself)",
        limits=Limits(1, 2**16),
        type=int,
        nargs=2,
        metavar=("DATA", "MODEL"),
    )
    generation: str = _flag(
        GENERATION,
        "continuous",
        "continuous: slots that take the next sequence as soon as one has ended; task: one compiled call per "
        "ARC task; python: the old uncompiled loop, slow, for comparison",
        choices=("continuous", "task", "python"),
        metavar=None,
    )
    memory_budget: float | None = _flag(
        GENERATION,
        None,
        "GB that --generation continuous may take on the device; where --batch_size sequences at once would "
        "take more, there are fewer (default: nearly all of an accelerator's, half of the machine's on CPU)",
        limits=Limits(0.001, 1e6),
        type=float,
        metavar="GB",
    )
    steer: str | None = _path(
        GENERATION,
        None,
        "change the model's values as this safetensors file of interventions says; it is kept in the store",
        metavar="FILE",
    )
    compilation_cache_dir: str | None = _path(
        GENERATION,
        None,
        "keep compiled programs in this directory of yours, for runs of the same shapes; 'none' keeps none "
        "(default: in your cache folder, at most 1 GB)",
        default_text="",
    )

    coordinator_address: str | None = _flag(
        PROCESSES, None, "where process 0 waits for the others", metavar="HOST:PORT"
    )
    num_processes: int | None = _flag(
        PROCESSES, None, "how many there are", None, _PROCESS_COUNT, type=int, metavar="N"
    )
    process_id: int | None = _flag(
        PROCESSES, None, "which one this is, from 0", None, _PROCESS_INDEX, type=int, metavar="I"
    )
    num_shards: int | None = _flag(
        PROCESSES,
        None,
        "split the tasks in N fixed shares, without a cluster",
        limits=_PROCESS_COUNT,
        type=int,
        metavar="N",
    )
    shard_index: int | None = _flag(
        PROCESSES, None, "the share to make, from 0", None, _PROCESS_INDEX, type=int, metavar="I"
    )
    ray: str | None = _flag(
        PROCESSES,
        None,
        "generate on the workers of the Ray cluster whose head is at HOST:PORT; without it on that of "
        "RAY_ADDRESS, or of `ray start` on this machine, or on one that is started here for this run",
        nargs="?",
        const="",
        metavar="HOST:PORT",
    )
    ray_workers: int | None = _flag(
        PROCESSES,
        None,
        "workers with --ray at most; on CPUs also more than one on a machine (default: one for each TPU host "
        "or GPU, or each machine where there are none)",
        default_text="",
        limits=_PROCESS_COUNT,
        type=int,
        metavar="N",
    )
    merge: bool = _flag(
        PROCESSES,
        False,
        "write the answers of what is in the store; generate nothing",
        action="store_true",
    )

    layers_to_extract: tuple[int, ...] = _flag(
        CAPTURE,
        FIXED_EXTRACT_LAYERS,
        "decoder blocks whose outputs are stored, counted from 0, as 10 12, 10,12 or 10-12",
        default_text=f"{FIXED_EXTRACT_LAYERS[0]} to {FIXED_EXTRACT_LAYERS[-1]}",
        limits=Limits(0, 9_999),
        type=int,
        nargs="+",
        metavar="LAYER",
    )
    hook_points: tuple[str, ...] = _flag(
        CAPTURE,
        (),
        "other points to store beside these, by TransformerLens' names, as attn.hook_z:10,12-14 or "
        "blocks.12.hook_resid_mid or ln_final.hook_normalized",
        default_text="",
        nargs="+",
        metavar="POINT",
    )
    capture_before: bool = _flag(
        CAPTURE,
        False,
        "store values as they are before --steer changes them at their own point, not after",
        action="store_true",
    )
    extract_activations: bool = _flag(CAPTURE, True, "the default", action="store_true")
    extract_prompt: bool = _flag(
        CAPTURE, False, "store the rows of the prompts' tokens too", action="store_true"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata["flag"].is_path and value is not None:
                value = os.path.expanduser(value)  # noqa: PTH111 - a URL would not outlive a Path
            elif isinstance(value, float):
                value += 0.0  # no -0.0, which is written otherwise than 0.0
            object.__setattr__(self, field.name, value)

    @property
    def input_flag(self) -> str:
        """Returns the name of the flag that says what is asked: "prompts" or "dataset_path"."""
        return "dataset_path" if self.prompts is None else "prompts"

    @property
    def input_path(self) -> str:
        """Returns the path of what is asked: own prompts, or the data set of puzzles."""
        return self.dataset_path if self.prompts is None else self.prompts

    @property
    def thinking(self) -> bool | None:
        """Returns what the chat template is told as ``enable_thinking``; None for nothing."""
        return None if self.enable_thinking is None else self.enable_thinking == "true"

    @property
    def samples_per_prompt(self) -> int:
        """Returns how often each prompt is sampled: predictions are augmentations times samples."""
        return self.predictions_per_task // self.augmentations

    @property
    def sampling(self) -> Sampling:
        """Returns how tokens are drawn."""
        from qwen2_core.sampling import Sampling  # imports JAX

        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
