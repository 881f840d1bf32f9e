"""``--generation continuous``: a run's sequences through slots that are refilled, stored as they end."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from activation_store import ActivationWriter, FinishedSequence
from arc_runner.cluster.work import Unit, Work, keys_of, left
from arc_runner.compiling import Compiling
from arc_runner.console import say
from arc_runner.loaded_model import LoadedModel
from arc_runner.progress import Clock
from arc_runner.report import Report
from arc_runner.signals import StopRequest
from arc_runner.watch import Watch
from qwen2_core.requests import SequenceRequest
from qwen2_engine import ContinuousEngine, Occupancy, PromptReader, RunningSlots

# A shard is committed once it has one of these: enough to be read well, little enough to be lost by a crash.
SHARD_BYTES = 64 * 2**20
SHARD_SEQUENCES = 256
SHARD_SECONDS = 60.0


def make_continuously(
    model: LoadedModel,
    work: Work,
    writer: ActivationWriter,
    report: Report,
    stop: StopRequest,
    watch: Watch,
) -> None:
    """Generates what ``work`` hands out of the job's requests; stores each sequence soon after its end."""
    engine = make_engine(model)
    units = _units(engine.order(model.job.requests))
    compiling = Clock()

    def count(window: Occupancy) -> None:
        report.slot_steps += window.slots * window.steps
        report.live_steps += window.live_steps
        in_use = -(-window.live_steps // max(window.steps, 1))
        watch.progress.count_steps(window.live_steps, window.slots, in_use)
        work.progress()

    with ThreadPoolExecutor(1) as device:
        while not stop.requested:
            there = left(units, writer)
            for stage in engine.plan([request for unit in there for request in _to_make(unit, writer)]):
                of_stage = [unit for unit in there if stage.takes(unit.work[0])]
                taken = work.take(of_stage, stage.shape.slots * engine.layout.data_parallel)
                first = next(taken, None)
                if first is None:
                    continue
                programs = Compiling()
                with compiling, watch.phase("compiling", programs):
                    slots = engine.start(stage, programs.program)
                say(describe(slots))
                say(f"compiled side by side: {programs.summary()}")
                report.programs += 1
                report.slots = max(report.slots, slots.programs.all_slots)
                with stop.deferred(), watch.generation():
                    finished = slots.generate(
                        (one for unit in itertools.chain([first], taken) for one in _to_make(unit, writer)),
                        should_stop=lambda: stop.requested,
                        on_window=count,
                    )
                    _store(finished, device, writer, watch)
                if stop.requested:
                    break
            with stop.deferred():
                if not work.wait(units):
                    break
        with stop.deferred(), watch.generating, watch.phase("storing", "writing the last shards"):
            writer.close()
    report.compile_seconds, report.generate_seconds = compiling.seconds, watch.generating.seconds


def make_engine(model: LoadedModel) -> ContinuousEngine:
    """Makes the engine of a run. Its settings follow from the options alone, not from what is left to do."""
    options = model.job.options
    return ContinuousEngine(
        model.model,
        model.params,
        slots=options.batch_size,
        max_tokens=options.max_output_tokens,
        eos_token_ids=model.job.eos,
        sampling=options.sampling,
        seed=options.random_seed,
        cache_dtype=options.kv_cache_dtype,
        capture_prompt=options.extract_prompt,
        memory_budget=None if options.memory_budget is None else int(options.memory_budget * 1e9),
        interventions=model.interventions,
    )


def describe(slots: RunningSlots | PromptReader) -> str:
    """Says in a line what the slots of a stage are, or that it has none, and which memory it takes."""
    shape, layout, memory = slots.programs.shape, slots.programs.layout, slots.memory
    parts = {
        "weights": memory.weights,
        "KV cache": memory.kv_cache,
        "windows, prefill and temporaries": memory.working,
    }
    detail = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
    groups = f" on each of {layout.data_parallel} groups of devices" if layout.data_parallel > 1 else ""
    each = " a device" if layout.devices > 1 else ""
    what = f"{shape.slots} slots{groups} for prompts of up to {shape.prompt_width} tokens, windows of "
    what += f"{shape.window} steps"
    if shape.reads_only:
        what = f"prompts of up to {shape.prompt_width} tokens, read one after the other{groups}"
    return (
        f"{what}: {memory.on_device / 1e6:.0f} MB{each} expected ({detail}); "
        f"on the host up to {memory.host_rows / 1e6:.0f} MB of unfinished rows"
    )


def _units(ordered: Sequence[SequenceRequest]) -> list[Unit]:
    """Groups requests, in the order in which they are made, by width and task."""
    grouped = itertools.groupby(ordered, lambda request: (request.width, request.id.task_id))
    members = [list(group) for _, group in grouped]
    return [Unit(keys_of(requests), requests) for requests in members]


def _to_make(unit: Unit, writer: ActivationWriter) -> list[SequenceRequest]:
    return [request for request in unit.work if request.key not in writer.committed]


def _store(
    finished: Iterator[FinishedSequence],
    device: ThreadPoolExecutor,
    writer: ActivationWriter,
    watch: Watch,
) -> None:
    """Hands finished sequences to the writer, in shards."""
    shard: list[FinishedSequence] = []
    size, begun = 0, time.monotonic()
    # Python handles signals on the main thread alone, between two of its instructions. So another thread
    # waits for the device.
    try:
        while (sequence := device.submit(next, finished, None).result()) is not None:
            shard.append(sequence)
            captured = (sequence.rows, *sequence.points.values())
            size += sum(rows.nbytes for rows in captured if rows is not None)
            watch.add(sequence)
            age = time.monotonic() - begun
            if size >= SHARD_BYTES or len(shard) >= SHARD_SEQUENCES or age >= SHARD_SECONDS:
                writer.submit(shard)
                shard, size, begun = [], 0, time.monotonic()
    finally:  # also what was finished before a device failed
        writer.submit(shard)
