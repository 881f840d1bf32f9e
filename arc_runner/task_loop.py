"""``--generation task`` and ``python``: sequences in calls, each stored while the next one computes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from activation_store import ActivationWriter
from arc_runner.cluster.work import Unit, Work, keys_of
from arc_runner.console import say
from arc_runner.loaded_model import LoadedModel, finished_sequences
from arc_runner.progress import Clock, Progress
from arc_runner.report import Report
from arc_runner.signals import StopRequest
from arc_runner.workload import Call


def make_calls(
    calls: Sequence[Call],
    model: LoadedModel,
    work: Work,
    writer: ActivationWriter,
    report: Report,
    stop: StopRequest,
) -> None:
    """Makes the calls that ``work`` hands out, and stores their sequences, until all are done or ``stop``."""
    compiling, generating = Clock(), Clock()
    say(f"{len(calls)} calls to make")
    units = [Unit(keys_of(call.requests), call) for call in calls]
    if model.job.options.generation == "task":
        with compiling:
            report.programs = model.compile(calls)
    progress = Progress(sum(len(call.requests) for call in calls))
    # Python handles signals on the main thread alone, between two of its instructions. So another thread
    # waits for the device.
    with stop.deferred(), contextlib.closing(progress), ThreadPoolExecutor(1) as device:
        while not stop.requested:
            with generating:
                for unit in work.take(units, 1):
                    progress.update(*_make(unit, model, device, writer))
                    work.progress()
                    if stop.requested:
                        break
            if not work.wait(units):
                break
        with generating:
            writer.close()
    report.compile_seconds, report.generate_seconds = compiling.seconds, generating.seconds


def _make(
    unit: Unit, model: LoadedModel, device: ThreadPoolExecutor, writer: ActivationWriter
) -> tuple[int, int]:
    """Makes a call and hands it to the writer; returns how many sequences and new tokens it has."""
    call = unit.work
    generation = device.submit(model.generate, call).result()
    new = [key not in writer.committed for key in unit.keys]
    writer.submit(lambda: finished_sequences(call, generation, new))
    return len(call.requests), int(np.asarray(generation.lengths)[new].sum())
