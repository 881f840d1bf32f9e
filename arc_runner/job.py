"""A run's job: what it is asked for, checked, and everything that follows from it without any weight."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from activation_store import (
    ActivationWriter,
    RetryPolicy,
    SequenceRecord,
    StoreSettings,
    hook_name,
)
from activation_store.interventions import interventions_sha256
from arc_puzzles import ArcTask, LoadedTasks, TaskFailure, load_tasks
from arc_puzzles.prompt_files import OWN_PROMPTS, LoadedPrompts, load_prompts
from arc_puzzles.thinking import opens_thinking
from arc_runner.cluster.figures import forget_figures
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.cluster.work import keys_of
from arc_runner.compilation_cache import use_compilation_cache
from arc_runner.console import say
from arc_runner.errors import UsageError
from arc_runner.hook_flags import points_of
from arc_runner.numerics import run_numerics, say_numerics
from arc_runner.options import NO_CACHE, RunOptions
from arc_runner.preflight import check_inputs, check_places, choose_devices, load_config, say_defaults
from arc_runner.report import Report
from arc_runner.steering_file import check_steering, read_steering
from arc_runner.store_check import check_store, say_changed_prompts
from arc_runner.tokenizer import check_thinking, load_tokenizer, tokenizer_sha256
from arc_runner.waiting import Waiting
from arc_runner.workload import build_requests
from qwen2_core.checkpoint_files import checkpoint_fingerprint, checkpoint_folder, is_hub_id
from qwen2_core.errors import CheckpointError
from qwen2_core.generation_config import checkpoint_sampling, eos_token_ids, unapplied_settings
from qwen2_core.hook_points import width_of
from qwen2_core.messages import masked
from qwen2_core.requests import SequenceRequest
from qwen2_core.sharding import Layout
from qwen2_core.weights import check_checkpoint
from qwen2_jax import QwenConfig

_RECORDED_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "safetensors")


@dataclasses.dataclass(frozen=True)
class Job:
    """Holds what a run is asked for, checked, and every sequence to make."""

    options: RunOptions
    config: QwenConfig
    layout: Layout
    tasks: Sequence[ArcTask]  # none with own prompts
    outline: Sequence[tuple[str, int]]  # id and number of tests of all that is asked, usable or not
    failures: Sequence[TaskFailure]  # tasks or own prompts that cannot be run
    tokenizer: Any
    eos: tuple[int, ...]
    settings: StoreSettings
    requests: Sequence[SequenceRequest]  # in the order of the predictions
    interventions: bytes | None = None  # the file of what is written into the model

    @property
    def numerics(self) -> dict[str, Any] | None:
        """What decides the last bits of the sequences that this process makes; None if it makes none."""
        return None if self.options.ray is not None else run_numerics(self.options, self.config, self.layout)

    @functools.cached_property
    def opens_thinking(self) -> bool:
        """Whether prompts end inside a model's thinking; all are laid out alike, so the first one tells."""
        first = next(iter(self.requests), None)
        return first is not None and opens_thinking(self.tokenizer, first.prompt_token_ids)

    def records(self, committed: Mapping[str, SequenceRecord]) -> list[SequenceRecord]:
        """Returns the records of the job's sequences that are committed, in the job's order."""
        return [committed[key] for key in keys_of(self.requests) if key in committed]

    def left(self, committed: Mapping[str, SequenceRecord]) -> int:
        """Returns how many of the job's sequences are not committed yet."""
        return sum(key not in committed for key in keys_of(self.requests))

    def part_of(self, process: ProcessInfo) -> Job:
        """Returns the part of the job that is assigned to a process: every ``count``-th task.

        They are counted from that with the longest prompts on. So all parts have as many tasks, and tasks of
        the same lengths.
        """
        tokens: Counter[str] = Counter()
        for request in self.requests:
            tokens[request.id.task_id] += len(request.id.prompt_token_ids)
        assigned = {task_id for task_id, _ in tokens.most_common()[process.index :: process.count]}
        own = [request for request in self.requests if request.id.task_id in assigned]
        return dataclasses.replace(self, requests=own)

    def open_writer(self, process: ProcessInfo, patiently: RetryPolicy | None) -> ActivationWriter:
        """Opens the store to write as this process; see ``ActivationWriter`` for what it raises."""
        numerics = self.numerics
        return ActivationWriter(
            self.options.activations_dir,
            self.settings,
            host_index=process.index,
            provenance=_provenance(self.options) | ({} if numerics is None else {"numerics": numerics}),
            numerics=numerics,
            patiently=patiently,
            interventions=self.interventions,
        )


def prepare(options: RunOptions) -> tuple[Job, Report]:
    """Checks everything before the weights are loaded; returns the job, and its report as far as it is known.

    The weights' bytes are read once, for their fingerprint.

    Raises:
        UsageError, ArcFormatError, CheckpointError, StoreError: what was asked for cannot be done.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it retries in vain, we report
    say_defaults(options)
    check_inputs(options)
    interventions = None if options.steer is None else read_steering(options.steer)
    with Waiting(f"reading {options.input_path}"):
        loaded = _load(options)
    for notice in loaded.notices:
        say(notice)
    check_places(options)
    if options.compilation_cache_dir not in (None, NO_CACHE) and not options.dry_run:
        use_compilation_cache(options.compilation_cache_dir)
    with Waiting(f"looking at the model {options.model_path}"):
        config = load_config(options)
        check_steering(interventions, config)
        check_checkpoint(options.model_path, config, revision=options.revision)
    layout, devices = Layout(), "Ray"  # its workers choose among their devices
    if options.ray is None:
        with Waiting("looking for devices"):
            layout, devices = choose_devices(options, config)
    with Waiting(f"loading the tokenizer of {options.model_path}"):
        chats = not isinstance(loaded, LoadedPrompts) or loaded.has_chats
        tokenizer = load_tokenizer(
            options.model_path, config.vocab_size, chats=chats, revision=options.revision
        )
    with contextlib.closing(tokenizer):
        check_thinking(options, tokenizer, chats=chats)
        eos = eos_token_ids(options.model_path, tokenizer, config.vocab_size, revision=options.revision)
        _say_unapplied_settings(options)
        settings = _store_settings(options, config, eos, interventions)
        is_there = check_store(options.activations_dir, settings)
        if is_there or not options.dry_run:  # whose plan needs no keys where no store has any
            with Waiting(f"reading the weights of {options.model_path} for their fingerprint"):
                fingerprint = checkpoint_fingerprint(options.model_path, revision=options.revision)
            settings = dataclasses.replace(settings, model_fingerprint=fingerprint)
            check_store(options.activations_dir, settings)
        requests, unusable = build_requests(loaded, tokenizer, options, settings, config.context_length)
    report = Report(options.model_path, devices)
    report.tasks = len(loaded.outline)
    failures = (*loaded.failures, *unusable)
    tasks = () if isinstance(loaded, LoadedPrompts) else loaded.tasks
    if isinstance(loaded, LoadedPrompts):
        report.asked = "prompts"
        if not requests:
            raise UsageError(
                f"--prompts {options.prompts} has no prompt that can be used: {failures[0].reason}"
            )
    asked = (tasks, loaded.outline, failures)
    job = Job(options, config, layout, *asked, tokenizer, eos, settings, requests, interventions)
    return job, report


def _say_unapplied_settings(options: RunOptions) -> None:
    """Says what generation_config.json asks for and the flags do not, and which flags would."""
    model, revision, sampling = options.model_path, options.revision, options.sampling
    unapplied = unapplied_settings(model, dataclasses.asdict(sampling), revision=revision)
    if not unapplied:
        return
    try:
        asked = checkpoint_sampling(model, revision=revision)
    except CheckpointError:  # values that no flag has
        asked = sampling
    changes = [
        f"--{name} {value:.12g}" for name, value in vars(asked).items() if value != getattr(sampling, name)
    ]
    remedy = f"; give {' '.join(changes)} to sample as it asks" if changes else ""
    say(f"{unapplied}: sampling is what the flags say{remedy}")


def _load(options: RunOptions) -> LoadedTasks | LoadedPrompts:
    if options.prompts is not None:
        return load_prompts(options.prompts, options.n_tasks)
    return load_tasks(options.dataset_path, options.n_tasks, options.solutions_path)


@contextlib.contextmanager
def open_store(
    job: Job, part: Job, report: Report, process: ProcessInfo, patiently: RetryPolicy | None
) -> Iterator[ActivationWriter]:
    """Opens the job's store for the time of the body, which makes ``part``, and says what there is to do.

    Raises:
        StoreError: see ``ActivationWriter``.
    """
    with Waiting(f"opening the store {job.options.activations_dir}"):
        opened = job.open_writer(process, patiently)
    with opened as writer:
        say_start(job, report, writer.committed)
        say_changed_prompts(job.requests, writer.committed, report.asked)
        if job.numerics is not None and part.left(writer.committed):
            say_numerics(job.numerics, writer.earlier_numerics)
        if process.count > 1:
            forget_figures(job.options.activations_dir, process.index, patiently)
            say(f"{process}")
        try:
            yield writer
        except BaseException:
            if patiently is not None:
                patiently.give_up()
            raise


def say_start(job: Job, report: Report, committed: Mapping[str, SequenceRecord]) -> None:
    """Says what there is to do, and counts in the report what an earlier run has made."""
    report.sequences_resumed = len(job.records(committed))
    say(
        f"{report.tasks} {report.asked}, {len(job.requests)} sequences ({sequences_of(job.options)}), "
        f"{report.sequences_resumed} of them done already"
    )


def sequences_of(options: RunOptions) -> str:
    """Says in a few words which sequences are made of each task or own prompt."""
    samples = options.samples_per_prompt
    if options.prompts is not None:
        return f"{samples} sample{'s' if samples > 1 else ''} of each"
    return f"each test input in {options.augmentations} augmentations x {samples} samples"


def _store_settings(
    options: RunOptions, config: QwenConfig, eos: tuple[int, ...], interventions: bytes | None
) -> StoreSettings:
    """Returns everything that decides what a sequence is, but for the fingerprint, which takes time.

    A store holds sequences of one setting only.
    """
    layers = options.layers_to_extract if options.extract_activations else ()
    return StoreSettings(
        model_fingerprint="",
        hook_names=(*map(hook_name, layers), *options.hook_points),
        hidden_size=config.hidden_size,
        dtype=config.dtype.name,
        capture_prompt=options.extract_prompt,
        max_output_tokens=options.max_output_tokens,
        sampling=options.sampling.settings,
        seed=options.random_seed,
        eos_token_ids=eos,
        tokenizer_sha256=tokenizer_sha256(options.model_path, revision=options.revision),
        prompt=_prompt_settings(options) | {"kv_cache_dtype": options.kv_cache_dtype or config.dtype.name},
        widths={point: width_of(point, config) for point in points_of(options.hook_points)},
        interventions="" if interventions is None else interventions_sha256(interventions),
        capture_before=options.capture_before,
        residual_dtype=config.residual_dtype.name,
    )


def _prompt_settings(options: RunOptions) -> dict[str, str]:
    """Returns how prompts are laid out. Own prompts have no grids."""
    choice = {} if options.enable_thinking is None else {"enable_thinking": options.enable_thinking}
    if options.prompts is not None:
        return {"prompt_version": OWN_PROMPTS} | choice
    return {"grid_encoder": options.grid_encoder, "prompt_version": options.prompt_version} | choice


def _provenance(options: RunOptions) -> dict[str, Any]:
    """Returns what the store notes about how its rows were made; it decides nothing."""
    model, revision = options.model_path, options.revision
    commit = checkpoint_folder(model, revision=revision).name if is_hub_id(model) else None
    return {
        **({} if commit is None else {"model_commit": commit}),
        **({} if revision is None else {"model_revision": revision}),
        "model_id": masked(model),
        **({"dataset": str(Path(options.dataset_path).resolve())} if options.dataset_path else {}),
        "generation": options.generation,
        "versions": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
    }
