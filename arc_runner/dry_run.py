"""``--dry_run``: what a run would do, said without doing it: nothing is compiled and nothing is written."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Container, Iterator, Sequence

import jax

from activation_store import ActivationStore
from activation_store.format import DTYPES, ROW_BYTES
from activation_store.hook_labels import hooks_text
from activation_store.shard import GROUPS
from arc_puzzles.data_files import shown
from arc_runner.answer_files import answer_files, local_store
from arc_runner.console import say
from arc_runner.continuous_loop import SHARD_BYTES, SHARD_SEQUENCES, make_engine
from arc_runner.job import Job, sequences_of
from arc_runner.loaded_model import LoadedModel
from arc_runner.preflight import nearest_folder
from arc_runner.report import Report
from arc_runner.steering_file import steering_lines
from arc_runner.workload import plan_calls
from qwen2_core.requests import SequenceRequest
from qwen2_core.sharding import bytes_on_device
from qwen2_engine.memory_plan import device_memory_budget

_LISTED = 20  # failures
_LINE_BYTES = 1024  # of an index line, at most with ids of usual length
_NORM_BYTES = _INT_BYTES = 4
_ENTRY_BYTES = 128  # of a tensor in a shard's header


def say_plan(job: Job, report: Report) -> None:
    """Prints what the run would do, and one whole prompt as text."""
    committed: Container[str | None] = ()
    if job.settings.model_fingerprint:  # it was read because there is a store
        committed = ActivationStore(job.options.activations_dir).index
    left = [request for request in job.requests if request.key not in committed]
    lines = ["dry run: nothing is generated, and nothing is written", *_work_lines(job, report, len(left))]
    if left:
        lines += [*_memory_lines(job, left, committed), *_disk_lines(job, left, committed)]
    say("\n".join([*lines, *_failure_lines(job, report)]))
    if job.requests:
        _say_prompt(job, report)


def _work_lines(job: Job, report: Report, left: int) -> Iterator[str]:
    options, config = job.options, job.config
    done = len(job.requests) - left
    yield (
        f"  model             {report.model} on {report.device}: {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {config.dtype.name}"
    )
    yield f"  {report.asked:<17s} {report.tasks} ({len(job.failures)} failed)"
    yield f"  sequences         {len(job.requests)} ({sequences_of(options)}), {done} of them done already"
    for number, steered in enumerate(steering_lines(job.interventions)):
        yield f"  {'steering' if number == 0 else '':<17s} {steered}"
    if job.requests:
        lengths = [len(request.prompt_token_ids) for request in job.requests]
        yield (
            f"  prompt tokens     {min(lengths)} to {max(lengths)}, median {statistics.median(lengths):.0f}; "
            f"{f'answers of up to {most}' if (most := options.max_output_tokens) else 'no answers'}"
        )


def _memory_lines(
    job: Job, left: Sequence[SequenceRequest], committed: Container[str | None]
) -> Iterator[str]:
    model = LoadedModel.without_weights(job)
    if job.options.generation != "continuous":
        calls = plan_calls(job.requests, job.options, committed)
        largest = _size(max(model.shape(call).nbytes(model.model) for call in calls))
        weights = sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(model.params))
        yield f"  calls             {len(calls)}, in {len({model.shape(call) for call in calls})} shapes"
        yield f"  memory            weights {_size(weights)}, KV cache and rows of a call up to {largest}"
        return
    engine = make_engine(model)
    groups = job.layout.data_parallel
    each = f" on each of {groups} groups of devices" if groups > 1 else ""
    for stage in engine.plan(left):
        shape = stage.shape
        if shape.reads_only:
            size = _size(engine.estimate(stage))
            yield (
                f"  prompts           of up to {shape.prompt_width} tokens, read one after the other{each}: "
                f"about {size}"
            )
            continue
        yield (
            f"  slots             {shape.slots}{each} for prompts of up to {shape.prompt_width} tokens, "
            f"windows of {shape.window} steps: about {_size(engine.estimate(stage))}"
        )
    budget = job.options.memory_budget
    yield (
        "  memory            "
        f"{_size(device_memory_budget(job.layout.devices) if budget is None else budget * 1e9)} may be taken"
        f"{' on each device' if job.layout.devices > 1 else ''}"
    )


def _disk_lines(job: Job, left: Sequence[SequenceRequest], committed: Container[str | None]) -> Iterator[str]:
    """Says what is to be stored at most, in how many shards at least: some are closed by the clock."""
    settings, options = job.settings, job.options
    rows = _bytes_of_sequences(job, left)
    shards = max(-(-rows // SHARD_BYTES), -(-len(left) // SHARD_SEQUENCES))
    if options.generation != "continuous":
        shards = len(plan_calls(job.requests, options, committed))
    bytes_expected = rows + shards * _bytes_of_a_shard(job) + len(job.interventions or b"")
    several = f"{shards} shards" if shards > 1 else "a shard"
    prompts = "with" if settings.capture_prompt else "without"
    yield (
        f"  to store          at most {_size(bytes_expected)} in {several}: "
        f"{hooks_text(settings.hook_names)} in {settings.dtype}, {prompts} the rows of prompts"
    )
    store = local_store(options)
    if store is None:
        yield f"  disk              how much is free at {options.activations_dir} is not known"
    else:
        free = shutil.disk_usage(nearest_folder(store)).free
        too_little = "; that may be too little" if free < bytes_expected else ""
        yield f"  disk              {_size(free)} free at {options.activations_dir}{too_little}"
    yield f"  answers           {', '.join(map(str, answer_files(options)))}"


def _bytes_of_sequences(job: Job, requests: Sequence[SequenceRequest]) -> int:
    """Returns what sequences take in a store, if each answer is as long as may be."""
    settings = job.settings
    widths = settings.hook_widths.values()
    row = ROW_BYTES + sum(width * DTYPES[settings.dtype].itemsize + _NORM_BYTES for width in widths)
    total = 0
    for request in requests:
        prompt = len(request.prompt_token_ids)
        rows = request.max_tokens + (prompt if request.capture_prompt else 0)
        total += rows * row + _INT_BYTES * prompt + _LINE_BYTES
    return total


def _bytes_of_a_shard(job: Job) -> int:
    """Returns what a shard takes beside its sequences: a header, and statistics of both groups of rows."""
    widths = job.settings.hook_widths.values()
    statistics_bytes = sum((2 * width + 1) * _NORM_BYTES for width in widths)
    return (len(widths) + 32) * _ENTRY_BYTES + len(GROUPS) * statistics_bytes


def _failure_lines(job: Job, report: Report) -> Iterator[str]:
    for failure in job.failures[:_LISTED]:
        yield f"  failed {report.asked[:-1]:<10s} {shown(failure.task_id)}: {shown(failure.reason, 2000)}"
    if len(job.failures) > _LISTED:
        yield f"  failed {report.asked[:-1]:<10s} and {len(job.failures) - _LISTED} more"


def _say_prompt(job: Job, report: Report) -> None:
    first = job.requests[0]
    name = shown(first.id.task_id)
    if report.asked == "tasks":
        name += f", test {first.id.test_index}, {first.id.augmentation}"
    say(f"the first prompt ({name}; {len(first.prompt_token_ids)} tokens):")
    say(job.tokenizer.decode(first.prompt_token_ids.tolist()))


def _size(count: float) -> str:
    """Returns bytes as a person reads them: "2.1 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
