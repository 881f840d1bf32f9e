"""``--generation continuous``: a run's sequences through slots that are refilled, stored as they end."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from activation_store import ActivationWriter, FinishedSequence
from arc_runner.cluster.work import Unit, Work, left
from arc_runner.loaded_model import LoadedModel
from arc_runner.progress import Clock, Progress
from arc_runner.report import Report
from arc_runner.signals import StopRequest
from arc_runner.workload import Keyed, sampling_id
from qwen2_core.requests import bucket_length
from qwen2_core.sharding import layout_of
from qwen2_engine.continuous_batching import (
    Drawing,
    FinishedItem,
    Occupancy,
    WorkItem,
    order_items,
    run_slots,
)
from qwen2_engine.decode_window import SlotShape
from qwen2_engine.memory_plan import Stage, device_memory_budget, plan_stages, start_stage

# A shard is committed once it has one of these: enough to be read well, little enough to be lost by a crash.
SHARD_BYTES = 64 * 2**20
SHARD_SEQUENCES = 256
SHARD_SECONDS = 60.0


def make_continuously(
    sequences: Sequence[Keyed],
    generator: LoadedModel,
    work: Work,
    writer: ActivationWriter,
    report: Report,
    stop: StopRequest,
) -> None:
    """Generates what ``work`` gives out of ``sequences`` and stores each soon after it has ended."""
    options, model = generator.options, generator.model
    layout = layout_of(model.config, generator.params)
    drawing = Drawing.check(model.config, generator.eos_token_ids, options.sampling, options.random_seed)
    units = _units(generator, sequences)
    compiling, generating = Clock(), Clock()
    progress = Progress(sum(len(_to_make(unit, writer)) for unit in units))

    def count(window: Occupancy) -> None:
        report.slot_steps += window.slots * window.steps
        report.live_steps += window.live_steps
        work.progress()

    with contextlib.closing(progress), ThreadPoolExecutor(1) as device:
        while not stop.requested:
            there = left(units, writer)
            items = [item for unit in there for item in _to_make(unit, writer)]
            for stage in _stages(generator, items):
                of_stage = [unit for unit in there if _width(unit) in stage.widths]
                taken = work.take(of_stage, stage.shape.slots * layout.groups)
                first = next(taken, None)
                if first is None:
                    continue
                with compiling:
                    programs, slots = start_stage(
                        model,
                        generator.params,
                        stage,
                        capture_prompt=options.extract_prompt,
                        eos_slots=len(drawing.eos_token_ids),
                    )
                report.programs += 1
                report.slots = max(report.slots, programs.all_slots)
                with stop.deferred(), generating:
                    finished = run_slots(
                        programs,
                        slots,
                        generator.params,
                        (item for unit in itertools.chain([first], taken) for item in _to_make(unit, writer)),
                        drawing,
                        should_stop=lambda: stop.requested,
                        on_window=count,
                    )
                    del slots  # they are the windows' now
                    _store(finished, device, writer, report, progress)
                if stop.requested:
                    break
            with stop.deferred():
                if not work.wait(units):
                    break
        with stop.deferred(), generating:
            writer.close()
    report.compile_seconds, report.generate_seconds = compiling.seconds, generating.seconds


def _units(generator: LoadedModel, sequences: Sequence[Keyed]) -> list[Unit]:
    """Items in the order in which they are made, in units of one task and one width."""
    options = generator.options
    items = order_items(
        generator.model.config,
        (
            WorkItem(
                keyed.id.prompt_token_ids,
                sampling_id(keyed.id),
                options.max_output_tokens,
                options.extract_prompt and keyed.id.sample_index == 0,
                keyed,
            )
            for keyed in sequences
        ),
    )
    grouped = itertools.groupby(items, lambda item: (bucket_length(len(item.prompt)), item.name.id.task_id))
    members = [list(group) for _, group in grouped]
    return [Unit(tuple(item.name.key for item in of_unit), of_unit) for of_unit in members]


def _width(unit: Unit) -> int:
    return bucket_length(len(unit.work[0].prompt))


def _to_make(unit: Unit, writer: ActivationWriter) -> list[WorkItem]:
    return [item for item in unit.work if item.name.key not in writer.committed]


def _stages(generator: LoadedModel, items: Sequence[WorkItem]) -> list[Stage]:
    options = generator.options
    cache_dtype = None if options.kv_cache_dtype is None else np.dtype(options.kv_cache_dtype)
    budget = device_memory_budget(layout_of(generator.model.config, generator.params).devices)
    if options.memory_budget is not None:
        budget = int(options.memory_budget * 1e9)
    return plan_stages(
        generator.model,
        generator.params,
        {bucket_length(len(item.prompt)) for item in items},
        SlotShape(options.batch_size, 1, options.max_output_tokens, cache_dtype=cache_dtype),
        budget,
        options.extract_prompt,
    )


def _store(
    finished: Iterator[FinishedItem],
    device: ThreadPoolExecutor,
    writer: ActivationWriter,
    report: Report,
    progress: Progress,
) -> None:
    """Hands finished sequences to the writer, in shards."""
    shard: list[FinishedSequence] = []
    size, begun = 0, time.monotonic()
    # Signals are handled on the main thread, and only between two Python instructions: it must not be the
    # one that waits for a window.
    try:
        while (item := device.submit(next, finished, None).result()) is not None:
            sequence = item.item.name.id
            shard.append(
                FinishedSequence(sequence, item.token_ids, item.logprobs, item.finish_reason, item.rows)
            )
            size += 0 if item.rows is None else item.rows.nbytes
            report.tokens_generated += len(item.token_ids)
            progress.update(1, len(item.token_ids))
            age = time.monotonic() - begun
            if size >= SHARD_BYTES or len(shard) >= SHARD_SEQUENCES or age >= SHARD_SECONDS:
                writer.submit(shard)
                shard, size, begun = [], 0, time.monotonic()
    finally:  # also what was finished before a device failed
        writer.submit(shard)
