"""The main job: ARC tasks or own prompts and a Qwen2 checkpoint in; activations, answers and a report out.

    python distributed_kv_cached_inference.py --model_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_path training.json --activations_dir activations --output_filepath submission.json

Installed, it is also the command ``qwen2-arc-run``. The same command again continues where a run stopped.
What can be refused is refused before the weights are loaded. Exit codes: 0 all done, 75 stopped early and
resumable, 1 some tasks failed (they are listed; the others are done), 2 bad usage.
"""

from __future__ import annotations

from arc_runner.console import started_as_script, warnings_on_stderr
from arc_runner.signals import StopRequest, end_on_signals, let_end

if __name__ == "__main__" or started_as_script():  # here, as the other imports take seconds
    end_on_signals()
    from arc_runner.start import begin

    begin()

import sys

from activation_store import RetryPolicy
from arc_runner.cluster.barrier import telling_failure
from arc_runner.cluster.membership import find_process
from arc_runner.command_line import parse_options
from arc_runner.dry_run import say_plan
from arc_runner.errors import EXIT_DONE
from arc_runner.failures import EXPECTED, tell_failure
from arc_runner.finish import answer, answer_from_store, answer_together
from arc_runner.generation import generate_missing
from arc_runner.job import open_store, prepare
from arc_runner.options import RunOptions
from arc_runner.start import end as end_of_imports
from arc_runner.waiting import Waiting


def main(argv: list[str] | None = None) -> int:
    """Runs the command line, by default that of this process, and returns its exit code."""
    end_of_imports()
    with warnings_on_stderr():
        try:
            code = run(parse_options(argv))
        except EXPECTED as error:
            code = tell_failure(error)
    let_end()
    return code


def run(options: RunOptions, stop: StopRequest | None = None) -> int:
    """Does the main job once, prints and writes its report, and returns the exit code.

    A signal while it generates stops it once the running work is stored, and one while it waits for other
    processes ends the waiting. At other times the process ends at once; what is committed is safe.

    Raises:
        UsageError, ArcFormatError, CheckpointError, StoreError: as soon as it is known, each a sentence.
        ClusterError: the other processes did not come.
    """
    stop = stop or StopRequest()
    if options.dry_run:
        say_plan(*prepare(options))
        return EXIT_DONE
    if options.merge:
        return answer_from_store(*prepare(options))
    if options.ray is not None:
        from arc_runner.cluster.ray_driver import run_on_ray  # only with Ray is its code needed

        return run_on_ray(options, stop)
    process = find_process(options)
    with telling_failure(process):
        job, report = prepare(options)
        part = job.part_of(process)
        patiently = None  # alone, a directory that fails is told at once; a shared one may come back
        if process.count > 1:
            patiently = RetryPolicy(options.activations_dir, str(process), lambda: stop.requested)
        with open_store(job, part, report, process, patiently) as writer:
            generate_missing(part, writer, report, stop, process)
            with Waiting("writing the last shards"):
                writer.close()
        report.bytes_stored, report.tokens_generated = writer.bytes_written, writer.tokens_written
        if patiently is None:
            return answer(job, report, writer.committed)
        return answer_together(job, part, report, writer, process, stop, patiently)


if __name__ == "__main__":
    sys.exit(main())
