"""The generation of a run's sequences: the weights, and the loop that ``--generation`` names."""

from __future__ import annotations

from activation_store import ActivationWriter
from arc_runner.cluster.membership import ProcessInfo
from arc_runner.compilation_cache import use_own_cache
from arc_runner.continuous_loop import make_continuously
from arc_runner.job import Job
from arc_runner.loaded_model import LoadedModel
from arc_runner.progress import Clock
from arc_runner.report import Report
from arc_runner.signals import StopRequest
from arc_runner.task_loop import make_calls
from arc_runner.watch import Watch
from arc_runner.workload import plan_calls


def generate_missing(
    job: Job, writer: ActivationWriter, report: Report, stop: StopRequest, process: ProcessInfo
) -> None:
    """Loads the weights, and makes and stores the sequences of ``job`` that are not committed yet.

    Returns early once ``stop`` is requested. If nothing is missing the weights are not loaded.
    """
    if not job.left(writer.committed):
        return
    if job.options.compilation_cache_dir is None:
        use_own_cache()
    with Watch(job, writer, process) as watch:
        loading = Clock()
        with loading, watch.phase("loading", f"loading the weights of {job.options.model_path}"):
            model = LoadedModel.load(job)
        report.load_seconds = loading.seconds
        if job.options.generation == "continuous":
            make_continuously(model, writer, report, stop, watch)
        else:
            calls = plan_calls(job.requests, job.options, writer.committed)
            make_calls(calls, model, writer, report, stop, watch)
