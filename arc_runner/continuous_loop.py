"""``--generation continuous``: a run's sequences through slots that are refilled, stored as they end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from activation_store import ActivationWriter, FinishedSequence
from arc_runner.cluster.work import Everything, Work
from arc_runner.compiling import Compiling
from arc_runner.console import say
from arc_runner.loaded_model import LoadedModel
from arc_runner.progress import Clock
from arc_runner.report import Report
from arc_runner.signals import StopRequest
from arc_runner.watch import LoopWatch
from qwen2_core.requests import SequenceRequest
from qwen2_engine import ContinuousEngine, Occupancy, PromptReader, RunningSlots, Stage

# A shard is committed once it has one of these: enough to be read well, little enough to be lost by a crash.
SHARD_BYTES = 64 * 2**20
SHARD_SEQUENCES = 256
SHARD_SECONDS = 60.0
HASTY_SHARD_SECONDS = 1.0  # where others wait for what has ended here
_LOOKED_SECONDS = 0.5  # between two looks at a shard's age while no sequence ends


def make_continuously(
    model: LoadedModel,
    writer: ActivationWriter,
    report: Report,
    stop: StopRequest,
    watch: LoopWatch,
    work: Work | None = None,
) -> None:
    """Generates what ``work`` hands out; stores each sequence soon after its end. Closes the writer.

    By default that is all of the job's requests that are not committed.
    """
    engine = make_engine(model)
    if work is None:
        work = Everything(engine.order(_missing(model.job.requests, writer)))
    stages = engine.stages(work.widths, model.job.options.max_output_tokens)
    compiling = Clock()
    current: tuple[Stage, RunningSlots | PromptReader] | None = None

    def count(window: Occupancy) -> None:
        report.slot_steps += window.slots * window.steps
        report.live_steps += window.live_steps
        report.generate_seconds = watch.generating.seconds
        in_use = -(-window.live_steps // max(window.steps, 1))
        watch.progress.count_steps(window.live_steps, window.slots, in_use)

    with ThreadPoolExecutor(1) as device:
        while not stop.requested and (width := work.next_width()) is not None:
            stage = next(one for one in stages if width in one.widths)
            if current is None or current[0] is not stage:
                current = None  # makes room for the next slots
                current = stage, _start(engine, stage, compiling, watch)
                report.programs += 1
                report.slots = max(report.slots, current[1].programs.all_slots)
                report.compile_seconds = compiling.seconds
            with stop.deferred(), watch.generation():
                finished = current[1].generate(
                    _checked(engine, work.requests(stage.widths)),
                    should_stop=lambda: stop.requested,
                    on_window=count,
                )
                _store(finished, device, work, writer, watch)
        with stop.deferred(), watch.generating, watch.phase("storing", "writing the last shards"):
            writer.close()
    report.generate_seconds = watch.generating.seconds


def _missing(requests: Sequence[SequenceRequest], writer: ActivationWriter) -> list[SequenceRequest]:
    return [request for request in requests if request.key not in writer.committed]


def _checked(
    engine: ContinuousEngine, requests: Iterator[SequenceRequest | None]
) -> Iterator[SequenceRequest | None]:
    """Yields requests as the engine takes them."""
    for request in requests:
        yield None if request is None else engine.order([request])[0]


def _start(
    engine: ContinuousEngine, stage: Stage, compiling: Clock, watch: LoopWatch
) -> RunningSlots | PromptReader:
    """Compiles a stage, and says what it is."""
    programs = Compiling()
    with compiling, watch.phase("compiling", programs):
        slots = engine.start(stage, programs.program)
    say(describe(slots))
    say(f"compiled side by side: {programs.summary()}")
    return slots


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


def _store(
    finished: Iterator[FinishedSequence],
    device: ThreadPoolExecutor,
    work: Work,
    writer: ActivationWriter,
    watch: LoopWatch,
) -> None:
    """Hands finished sequences to the writer, in shards."""
    shard: list[FinishedSequence] = []
    size, begun = 0, time.monotonic()
    # Python handles signals on the main thread alone, between two of its instructions. So another thread
    # waits for the device.
    try:
        coming = None
        while True:
            coming = coming or device.submit(next, finished, None)
            wait([coming], _LOOKED_SECONDS)
            if coming.done():
                sequence, coming = coming.result(), None
                if sequence is None:
                    return
                shard.append(sequence)
                captured = (sequence.rows, *sequence.points.values())
                size += sum(rows.nbytes for rows in captured if rows is not None)
                watch.add(sequence)
            age = time.monotonic() - begun
            is_late = age >= (HASTY_SHARD_SECONDS if work.hastens else SHARD_SECONDS)
            if size >= SHARD_BYTES or len(shard) >= SHARD_SEQUENCES or (shard and is_late):
                writer.submit(shard)
                shard, size, begun = [], 0, time.monotonic()
    finally:  # also what was finished before a device failed
        writer.submit(shard)
