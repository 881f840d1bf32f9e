"""What the commands of `python -m activation_store` do; each returns its exit code."""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from activation_store.command_line import shown
from activation_store.dataset_check import stale_sequences, verify_coverage, verify_prompts
from activation_store.format import SequenceRecord, StoreUsageError
from activation_store.legacy_import import import_legacy as import_pickles
from activation_store.reader import ActivationStore
from activation_store.repair import drop_sequences, repair_store
from activation_store.report_check import verify_report
from activation_store.rows import RowFilter
from activation_store.saelens_export import export_saelens
from activation_store.verify import store_notes, verify_store

if TYPE_CHECKING:
    from activation_store.prompts import Asked

Item = TypeVar("Item")


def verify(options: argparse.Namespace) -> int:
    if options.replay and not options.model_path:
        raise StoreUsageError("--replay needs --model_path")
    tasks = _tasks(options)  # before anything is changed
    if options.repair:
        for finding in repair_store(options.directory, _bar):
            print(f"repaired: {shown(finding)}")
    store = ActivationStore(options.directory)
    if options.repair and (stale := _stale(store, options, tasks)):
        drop_sequences(options.directory, {record.key for record in stale})
        for text in _tell_stale(stale, options.dataset):
            print(f"dropped: {shown(text)}")
        store = ActivationStore(options.directory)
    findings = 0
    for finding in _findings(store, options, tasks):
        tqdm.write(shown(finding))  # beside the progress bars of a terminal
        sys.stdout.flush()
        findings += 1
    for note in store_notes(store):
        print(f"note: {shown(note)}")
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


def stats(options: argparse.Namespace) -> int:
    store = ActivationStore(options.directory)
    print("layer  group      rows        mean norm   rms of a value   rms without the mean")
    for layer in store.choose_layers(None).layers:
        for group in ("generated", "prompt"):
            with contextlib.suppress(StoreUsageError):  # no such rows
                of_layer = store.statistics(layer, group)
                spread = of_layer.variance.mean()
                print(
                    f"{layer:>5}  {group:9s}  {of_layer.count:<10d}  {of_layer.mean_norm:<10.4g}  "
                    f"{(spread + (of_layer.mean**2).mean()) ** 0.5:<15.4g}  {spread**0.5:.4g}"
                )
    return 0


def export(options: argparse.Namespace) -> int:
    rows = RowFilter(prompt=not options.generated_only, first_position=options.first_position)
    store = ActivationStore(options.directory)
    windows = export_saelens(store, options.layer, options.output, options.context_size, rows)
    print(f"{windows} windows of {options.context_size} rows in {shown(options.output)}")
    return 0


def import_legacy(options: argparse.Namespace) -> int:
    count = import_pickles(options.source, options.output, options.hidden_size)
    failed = list(ActivationStore(options.output).sequences(failed=True))
    for record in failed:
        print(f"{shown(record.label)} is not imported: {shown(str(record.failure))}")
    print(f"{count} sequences in {shown(options.output)}")
    return 1 if failed else 0


def plot(options: argparse.Namespace) -> int:
    from activation_store.plots import plot_store  # needs matplotlib

    store = ActivationStore(options.directory)
    for path in plot_store(store, options.output, options.layer or ()):
        print(shown(str(path)))
    return 0


def view(options: argparse.Namespace) -> int:
    if options.sae and not options.feature:
        raise StoreUsageError("--sae needs --feature: which of its features, such as --feature 3,17")
    if options.feature and not options.sae:
        raise StoreUsageError("--feature needs --sae, the folder of the SAE")
    from activation_store.probes import load_directions, load_features
    from activation_store.view import write_page
    from activation_store.view_data import ViewChoice
    from activation_store.view_text import open_reader

    store = ActivationStore(options.directory)
    hidden = store.settings.hidden_size
    probes = [probe for path in options.direction for probe in load_directions(path, hidden, options.layer)]
    if options.sae:
        probes += load_features(options.sae, options.feature, hidden, options.layer)
    with open_reader(store, options.model_path, options.dataset) as reader:
        choice = ViewChoice(options.task, options.n, options.layers, tuple(probes))
        size = write_page(store, options.output, reader, choice)
    print(f"{shown(options.output)} ({size / 1e6:.1f} MB): open it in a browser")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "verify": verify,
    "stats": stats,
    "plot": plot,
    "view": view,
    "export": export,
    "import-legacy": import_legacy,
}
