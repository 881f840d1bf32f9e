"""``--generation task`` and ``python``: sequences in calls, each stored while the next one computes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from activation_store import ActivationWriter, FinishedSequence
from arc_runner.console import say
from arc_runner.loaded_model import LoadedModel, finished_sequences
from arc_runner.progress import Clock
from arc_runner.report import Report
from arc_runner.signals import StopRequest
from arc_runner.watch import Watch
from arc_runner.workload import Call
from qwen2_core.compilation import to_host


def make_calls(
    calls: Sequence[Call],
    model: LoadedModel,
    writer: ActivationWriter,
    report: Report,
    stop: StopRequest,
    watch: Watch,
) -> None:
    """Makes calls and stores their sequences, until all are done or ``stop``. Closes the writer."""
    compiling = Clock()
    say(f"{len(calls)} calls to make")
    if model.job.options.generation == "task":
        with compiling, watch.phase("compiling"):
            report.programs = model.compile(calls)
    # Python handles signals on the main thread alone, between two of its instructions. So another thread
    # waits for the device.
    with stop.deferred(), ThreadPoolExecutor(1) as device:
        with watch.generation():
            for call in calls:
                if stop.requested:
                    break
                _make(call, model, device, writer, watch)
        with watch.generating, watch.phase("storing", "writing the last shards"):
            writer.close()
    report.compile_seconds, report.generate_seconds = compiling.seconds, watch.generating.seconds


def _make(
    call: Call, model: LoadedModel, device: ThreadPoolExecutor, writer: ActivationWriter, watch: Watch
) -> None:
    """Makes a call and hands it to the writer."""
    generation = device.submit(model.generate, call).result()
    new = [request.key not in writer.committed for request in call.requests]
    tokens = int(to_host(generation.lengths)[new].sum())
    watch.progress.count_steps(tokens, len(call.requests), len(call.requests))

    def finished() -> list[FinishedSequence]:
        sequences = finished_sequences(call, generation, new)
        for one in sequences:
            watch.add(one)
        return sequences

    writer.submit(finished)
