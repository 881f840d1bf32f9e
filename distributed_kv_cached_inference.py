"""The main job: ARC tasks and a Qwen2 checkpoint in; activations, answers and a report out.

    python distributed_kv_cached_inference.py --model_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_path training.json --activations_dir activations --output_filepath submission.json

The same command again continues where a run stopped. What can be refused is refused before the weights
are read. Exit codes: 0 all done, 75 stopped early and resumable, 1 some tasks failed (they are listed;
the others are done), 2 bad usage.
"""

from __future__ import annotations

from arc_runner.signals import EXIT_RESUMABLE, STOPPED, StopRequest, end_on_signals

if __name__ == "__main__":
    end_on_signals()  # here, as the other imports take seconds

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from activation_store import (
    ActivationStore,
    ActivationWriter,
    Patience,
    SequenceId,
    SequenceRecord,
    StoreError,
    StoreSettings,
    StoreWriteError,
    at_once,
    check_settings,
    hook_name,
    sequence_key,
)
from arc_puzzles.tasks import ArcFormatError, ArcTask, load_tasks
from arc_runner.cluster.claims import Claims
from arc_runner.cluster.membership import ClusterError, Place, find_place
from arc_runner.cluster.merge import answer_once, forget_figures, gather_figures, leave_figures, merge_figures
from arc_runner.cluster.shared_files import SharedFiles
from arc_runner.cluster.work import Alone, Shared, Work
from arc_runner.continuous_loop import make_continuously
from arc_runner.loaded_model import Clock, Generator, keep_programs
from arc_runner.options import RunOptions, UsageError, parse_options
from arc_runner.preflight import (
    check_places,
    choose_devices,
    eos_token_ids,
    load_config,
    load_tokenizer,
    say_defaults,
)
from arc_runner.report import Report, failure_entries, report_path, write_answers
from arc_runner.task_loop import make_calls
from arc_runner.workload import Keyed, Prompt, build_prompts, plan_calls
from qwen2_core.checkpoint_files import checkpoint_fingerprint, resolve_file
from qwen2_core.weights import check_checkpoint
from qwen2_jax import CheckpointError, QwenConfig

EXIT_DONE, EXIT_TASKS_FAILED, EXIT_USAGE = 0, 1, 2
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        return run(parse_options(argv))
    except (UsageError, ArcFormatError, CheckpointError) as error:
        return _fail(f"error: {error}", EXIT_USAGE)
    except StoreError as error:
        hint = "; the same command continues" if isinstance(error, StoreWriteError) else ""
        return _fail(f"error: {error}{hint}", EXIT_RESUMABLE if hint else EXIT_USAGE)
    except ClusterError as error:
        return _fail(f"error: {error}; the same command continues", EXIT_RESUMABLE)
    except KeyboardInterrupt:
        return _fail(STOPPED, EXIT_RESUMABLE)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        return _fail(
            f"error: the device failed ({reason}); the same command continues, with a smaller --batch_size "
            "if memory ran out",
            EXIT_RESUMABLE,
        )
    except BrokenPipeError:  # whoever read our output is gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_RESUMABLE
    except OSError as error:
        return _fail(f"error: {error}", EXIT_USAGE)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a run is asked for, checked."""

    options: RunOptions
    tasks: Sequence[ArcTask]
    tokenizer: Any
    eos: tuple[int, ...]
    settings: StoreSettings
    prompts: Sequence[Prompt]
    sequences: Sequence[Keyed]  # in the order of the submission's attempts

    def records(self, committed: Mapping[str, SequenceRecord]) -> list[SequenceRecord]:
        """Those that are done."""
        return [committed[one.key] for one in self.sequences if one.key in committed]

    def share(self, place: Place) -> _Job:
        """What of it this process may make: all, or of every ``count`` tasks the one with its index."""
        if place.claims:
            return self
        task_ids = list(dict.fromkeys(prompt.task_id for prompt in self.prompts))
        mine = set(task_ids[place.index :: place.count])
        return dataclasses.replace(
            self,
            prompts=[prompt for prompt in self.prompts if prompt.task_id in mine],
            sequences=[one for one in self.sequences if one.id.task_id in mine],
        )


def run(options: RunOptions, stop: StopRequest | None = None) -> int:
    """One run of the main job, its report printed and written; the exit code.

    A signal while it generates ends it in good order; at any other moment nothing is lost by its end.

    Raises:
        UsageError, ArcFormatError, CheckpointError, StoreError: as soon as it is known, each a sentence.
        ClusterError: the other processes did not come.
    """
    stop = stop or StopRequest()
    place = Place() if options.merge else find_place(options)
    job, report = _prepare(options)
    if options.merge:
        return _merge(job, report)
    with contextlib.ExitStack() as stack:
        # Alone, a directory that fails is told at once; with others it may be shared, and come back.
        shared = place.count > 1
        patiently = Patience(options.activations_dir, str(place), lambda: stop.requested) if shared else None
        writer = stack.enter_context(
            ActivationWriter(
                options.activations_dir,
                job.settings,
                host_index=place.index,
                provenance=_provenance(options),
                patiently=patiently,
            )
        )
        report.sequences_resumed = sum(one.key in writer.committed for one in job.sequences)
        print(
            f"{report.tasks} tasks, {len(job.sequences)} sequences (each test input in "
            f"{options.augmentations} augmentations x {options.samples_per_prompt} samples), "
            f"{report.sequences_resumed} of them done already",
            flush=True,
        )
        mine, work, claims = job.share(place), Alone(writer), None
        if patiently is not None:
            files = SharedFiles(options.activations_dir, patiently)
            claims = stack.enter_context(Claims(files, place.index))
            forget_figures(files, place.index)
            print(f"{place}", flush=True)
        if claims is not None and place.claims:
            work = Shared(writer, claims, place, stop)
        if any(one.key not in writer.committed for one in mine.sequences):
            _generate(mine, work, writer, report, stop)
        writer.close()
        if claims is not None:
            claims.files.patiently(writer.refresh)
        report.bytes_stored = writer.bytes_written
        if claims is None:
            return _answer(job, report, writer.committed)
        return _answer_together(job, mine, report, writer, claims, place)


def _prepare(options: RunOptions) -> tuple[_Job, Report]:
    """Everything that can be refused without reading weights."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it retries in vain, we report
    say_defaults(options)
    loaded = load_tasks(options.dataset_path, options.n_tasks)
    check_places(options)
    if options.compilation_cache_dir is not None:
        keep_programs(options.compilation_cache_dir)
    config = load_config(options)
    check_checkpoint(options.model_path, config)
    tokenizer = load_tokenizer(options.model_path, config.vocab_size)
    eos = eos_token_ids(options.model_path, tokenizer, config.vocab_size)
    prompts, failures = build_prompts(loaded.tasks, tokenizer, options, config.max_position_embeddings)
    mesh_shape, devices = choose_devices(options, config)
    report = Report(options.model_path, devices)
    report.tasks = len(loaded.tasks) + len(loaded.failures)
    report.tasks_failed = failure_entries([*loaded.failures, *failures])
    settings = _store_settings(options, config, eos)
    ids = (prompt.sequence(sample) for prompt in prompts for sample in range(options.samples_per_prompt))
    sequences = [Keyed(sequence_key(settings, one), one) for one in ids]
    options = dataclasses.replace(options, mesh_shape=mesh_shape)
    return _Job(options, loaded.tasks, tokenizer, eos, settings, prompts, sequences), report


def _generate(job: _Job, work: Work, writer: ActivationWriter, report: Report, stop: StopRequest) -> None:
    """Loads the weights and makes what is not committed yet, by the way that ``--generation`` names."""

    def key_of(sequence: SequenceId) -> str:
        return sequence_key(job.settings, sequence)

    loading = Clock()
    with loading:
        generator = Generator.load(job.options, job.eos)
    report.load_seconds = loading.seconds
    if job.options.generation == "continuous":
        make_continuously(job.sequences, generator, work, writer, report, stop)
    else:
        calls = plan_calls(job.prompts, job.options, lambda one: key_of(one) in writer.committed)
        make_calls(calls, key_of, generator, work, writer, report, stop)


def _answer(
    job: _Job, report: Report, committed: Mapping[str, SequenceRecord], patiently: Patience | None = None
) -> int:
    """Writes submission and report of what is done; the exit code."""
    options, records = job.options, (patiently or at_once)(lambda: job.records(committed))
    report.sequences = len(records)
    report.stopped_early = len(records) < len(job.sequences)
    report.add_failed_sequences(records)
    if not report.processes:
        report.measure_memory()
    write_answers(report, options, job.tasks, records, job.tokenizer, patiently)
    print(report.text())
    print(
        f"activations in {options.activations_dir}, answers in {options.output_filepath}, "
        f"report in {report_path(options)}",
        flush=True,
    )
    return _exit_code(job, report, records)


def _exit_code(job: _Job, report: Report, records: Sequence[SequenceRecord]) -> int:
    if len(records) < len(job.sequences):
        return EXIT_RESUMABLE
    failed = report.tasks_failed or any(record.failed for record in records)
    return EXIT_TASKS_FAILED if failed else EXIT_DONE


def _answer_together(
    job: _Job, mine: _Job, report: Report, writer: ActivationWriter, claims: Claims, place: Place
) -> int:
    """Leaves this process's figures and, where it is the last one, the answers; the exit code."""
    report.measure_memory()
    patiently = claims.files.patiently
    written = leave_figures(claims.files, place.index, report, writer.sequences_written)
    made = f"{place}: {writer.sequences_written} sequences made"
    undone = sum(one.key not in writer.committed for one in job.sequences)
    if undone:
        print(f"{made}; {undone} of all are left, the answers are written once all are done", flush=True)
    else:

        def answer() -> None:
            figures = gather_figures(claims.files, place.count)
            if place.claims and len(figures) == 1 and not claims.sees_others():
                print(
                    f"{place}: no other process has been seen in {job.options.activations_dir}; unless they "
                    "were stopped, compare their --activations_dir",
                    flush=True,
                )
            merge_figures(report, figures)
            _answer(job, report, writer.committed, patiently)

        by = answer_once(claims, str(place), written, answer)
        if by != str(place):
            print(f"{made}; the answers are written by {by}", flush=True)
    return _exit_code(mine, report, patiently(lambda: mine.records(writer.committed)))


def _merge(job: _Job, report: Report) -> int:
    """``--merge``: the answers of what is in the store, whoever made it."""
    directory = job.options.activations_dir
    store = ActivationStore(directory)
    check_settings(store.settings, job.settings, directory)
    report.sequences_resumed = len(job.records(store.index))
    merge_figures(report, gather_figures(SharedFiles(directory)))
    return _answer(job, report, store.index)


def _store_settings(options: RunOptions, config: QwenConfig, eos: tuple[int, ...]) -> StoreSettings:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        with contextlib.suppress(CheckpointError):
            digest.update(resolve_file(options.model_path, name).read_bytes())
    layers = options.layers_to_extract if options.extract_activations else ()
    return StoreSettings(
        model_fingerprint=checkpoint_fingerprint(options.model_path),
        hook_names=tuple(hook_name(layer) for layer in layers),
        hidden_size=config.hidden_size,
        dtype=config.dtype.name,
        capture_prompt=options.extract_prompt,
        max_output_tokens=options.max_output_tokens,
        sampling={"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p},
        seed=options.random_seed,
        eos_token_ids=eos,
        tokenizer_sha256=digest.hexdigest(),
        prompt={
            "grid_encoder": options.grid_encoder,
            "prompt_version": options.prompt_version,
            "kv_cache_dtype": options.kv_cache_dtype or config.dtype.name,
        },
    )


def _provenance(options: RunOptions) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "numpy", "transformers", "safetensors")
    return {
        "model_id": options.model_path,
        "generation": options.generation,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


if __name__ == "__main__":
    sys.exit(main())
