"""The command line that looks after a store.

    python -m activation_store verify DIR [--dataset D] [--replay N] [--model_path M] [--report R] [--repair]
    python -m activation_store stats DIR
    python -m activation_store export DIR --layer 12 --context_size 128 --output OUT
    python -m activation_store import-legacy PICKLES --output DIR --hidden_size 896

Exit codes: 0 all well, 1 findings or an error, 2 bad usage, 130 interrupted.
"""

import argparse
import contextlib
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from activation_store.dataset_check import stale_sequences, verify_coverage, verify_prompts
from activation_store.format import SequenceRecord, StoreUsageError
from activation_store.legacy_import import import_legacy
from activation_store.reader import ActivationStore
from activation_store.repair import drop_sequences, repair_store
from activation_store.report_check import verify_report
from activation_store.rows import RowFilter
from activation_store.saelens_export import export_saelens
from activation_store.verify import store_notes, verify_store
from qwen2_core.messages import did_you_mean, masked, printable

if TYPE_CHECKING:
    from activation_store.prompts import Asked

Item = TypeVar("Item")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    if sys.stdout is None:  # it was closed, as in `... >&-`
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot print is no error
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except StoreUsageError as error:
        print(f"error: {_shown(str(error))}", file=sys.stderr)
        return 2
    except ValueError as error:  # StoreError, and those of the data set and the checkpoint
        print(f"error: {_shown(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output is gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {_shown(str(error))}", file=sys.stderr)
        return 1


def _shown(text: str) -> str:
    """Returns what is printed of a text that may quote a store or a URL."""
    return masked(printable(text))


def _path(text: str) -> str:
    """Returns a path or URL of the command line, with a leading ``~`` expanded."""
    if not text or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"{text!a} is no path")
    return os.path.expanduser(text)  # noqa: PTH111 - a URL would not outlive a Path


def _whole(least: int, most: int) -> Callable[[str], int]:
    """Returns what reads a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!a} is no whole number from {least} to {most}")
        return number

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m activation_store", description="Look after a store.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    verify = commands.add_parser("verify", help="check every byte and row; one line a finding")
    verify.set_defaults(run=_verify)
    verify.add_argument("directory", type=_place)
    verify.add_argument("--dataset", type=_existing, help="puzzles or own prompts to be covered")
    verify.add_argument(
        "--replay", type=_whole(0, 10**9), metavar="N", default=0, help="recompute N random sequences"
    )
    verify.add_argument(
        "--model_path",
        type=_path,
        help="checkpoint, a directory or hub id: to recompute with, and to make the prompts of --dataset "
        "again (default for these: the one that the store was made with, if it is there)",
    )
    verify.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="which sequences --replay draws")
    verify.add_argument(
        "--report", type=_existing, help="a run's report, to be checked with the answers beside it"
    )
    verify.add_argument(
        "--repair",
        action="store_true",
        help="first drop what is damaged, and with --dataset what was made of prompts that have changed",
    )

    stats = commands.add_parser("stats", help="rows, mean norm and variance of each layer")
    stats.set_defaults(run=_stats)
    stats.add_argument("directory", type=_place)

    export = commands.add_parser("export", help="write one layer as a SAELens cached-activations dataset")
    export.set_defaults(run=_export)
    export.add_argument("directory", type=_place)
    export.add_argument("--layer", type=_whole(0, 9_999), required=True)
    export.add_argument("--context_size", type=_whole(1, 2**20), required=True, help="rows in a window")
    export.add_argument("--output", type=_path, required=True, help="new directory")
    export.add_argument(
        "--first_position", type=_whole(0, 2**31 - 1), default=0, help="leave out earlier positions"
    )
    export.add_argument("--generated_only", action="store_true", help="leave out prompt rows")

    legacy = commands.add_parser("import-legacy", help="make a store of layer_<l>_batch_<n>.pkl files")
    legacy.set_defaults(run=_import_legacy)
    legacy.add_argument("source", type=_place, help="directory of the pickles")
    legacy.add_argument("--output", type=_path, required=True, help="new store")
    legacy.add_argument(
        "--hidden_size", type=_whole(1, 2**20), required=True, help="the model's; other widths are refused"
    )
    return parser


def _place(text: str) -> str:
    """Returns the path of a directory, or a URL."""
    path = _path(text)
    if "://" not in path and not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {_shown(path + did_you_mean(path))}")
    return path


def _existing(text: str) -> str:
    """Returns the path of a file or directory that is there."""
    path = _path(text)
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"there is no file {_shown(path + did_you_mean(path))}")
    return path


def _verify(options: argparse.Namespace) -> int:
    if options.replay and not options.model_path:
        raise StoreUsageError("--replay needs --model_path")
    tasks = _tasks(options)  # before anything is changed
    if options.repair:
        for finding in repair_store(options.directory, _bar):
            print(f"repaired: {_shown(finding)}")
    store = ActivationStore(options.directory)
    if options.repair and (stale := _stale(store, options, tasks)):
        drop_sequences(options.directory, {record.key for record in stale})
        for text in _tell_stale(stale, options.dataset):
            print(f"dropped: {_shown(text)}")
        store = ActivationStore(options.directory)
    findings = 0
    for finding in _findings(store, options, tasks):
        tqdm.write(_shown(finding))  # beside the progress bars of a terminal
        sys.stdout.flush()
        findings += 1
    for note in store_notes(store):
        print(f"note: {_shown(note)}")
    print(f"{len(store)} sequences, {findings} findings")
    return 1 if findings else 0


def _tasks(options: argparse.Namespace) -> "Sequence[Asked] | None":
    """Returns the puzzles or own prompts of --dataset."""
    if not options.dataset:
        return None
    from activation_store.prompts import load_dataset  # nothing else here knows of ARC

    return load_dataset(options.dataset, options.directory)


def _findings(
    store: ActivationStore, options: argparse.Namespace, tasks: "Sequence[Asked] | None"
) -> Iterator[str]:
    yield from verify_store(store, _bar)
    if tasks is not None:
        from activation_store.prompts import expected_tests

        yield from verify_coverage(store, expected_tests(tasks))
        stale = _stale(store, options, tasks)
        if stale is None:
            yield from verify_prompts(store)
        else:
            yield from _tell_stale(stale, options.dataset)
    if options.replay:
        from activation_store.replay import replay_store  # needs jax and the model; nothing else here does

        yield from replay_store(store, options.model_path, options.replay, options.seed, _bar)
    if options.report:
        yield from verify_report(options.report, store.settings)


def _stale(
    store: ActivationStore, options: argparse.Namespace, tasks: "Sequence[Asked] | None"
) -> list[SequenceRecord] | None:
    """Returns the sequences of prompts that the data set does not give now; None if that is not known."""
    if tasks is None:
        return None
    from activation_store.prompts import load_tokenizer, sequences_now  # needs transformers

    path = options.model_path or str(store.provenance.get("model_id", ""))
    if not path or not (options.model_path or Path(path).is_dir()):
        return None
    with contextlib.closing(load_tokenizer(path)) as tokenizer:
        now = sequences_now(store, tasks, tokenizer)
    return stale_sequences(store.index, store.settings, now)


def _tell_stale(stale: Iterable[SequenceRecord], dataset: str) -> Iterator[str]:
    for task_id, count in sorted(Counter(record.task_id for record in stale).items()):
        yield f"task {task_id}: {count} sequences are of other prompts than {dataset} gives now"


def _bar(items: Collection[Item], name: str, unit: str) -> Iterable[Item]:
    """Draws a progress bar while the items are drawn, on a terminal only."""
    return tqdm(items, name, unit=unit, disable=None, leave=False)


def _stats(options: argparse.Namespace) -> int:
    store = ActivationStore(options.directory)
    print("layer  group      rows        mean norm   rms of a value   rms without the mean")
    for layer in store.layers:
        for group in ("generated", "prompt"):
            with contextlib.suppress(StoreUsageError):  # no such rows
                of_layer = store.statistics(layer, group)
                spread = of_layer.variance.mean()
                print(
                    f"{layer:5d}  {group:9s}  {of_layer.count:<10d}  {of_layer.mean_norm:<10.4g}  "
                    f"{(spread + (of_layer.mean**2).mean()) ** 0.5:<15.4g}  {spread**0.5:.4g}"
                )
    return 0


def _export(options: argparse.Namespace) -> int:
    rows = RowFilter(prompt=not options.generated_only, first_position=options.first_position)
    store = ActivationStore(options.directory)
    windows = export_saelens(store, options.layer, options.output, options.context_size, rows)
    print(f"{windows} windows of {options.context_size} rows in {_shown(options.output)}")
    return 0


def _import_legacy(options: argparse.Namespace) -> int:
    count = import_legacy(options.source, options.output, options.hidden_size)
    failed = list(ActivationStore(options.output).sequences(failed=True))
    for record in failed:
        print(f"{_shown(record.label)} is not imported: {_shown(str(record.failure))}")
    print(f"{count} sequences in {_shown(options.output)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
