"""What the page of a store shows, as plain JSON values: sequences, their tokens, numbers of their rows."""

import base64
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from activation_store.format import SequenceRecord, StoreUsageError
from activation_store.hook_labels import hooks_text
from activation_store.output_places import store_name
from activation_store.probes import Probe
from activation_store.reader import ActivationStore

MOST_VALUES = 1_500_000  # on a page, about 6 bytes each: numbers, and tokens of prompts
SINK = 4  # times the median norm: what is beyond would leave no tint for the rest


class Reader(Protocol):
    """Makes text and grids of tokens, as far as tokenizer and data set are there (`view_text.py`)."""

    notes: list[str]  # what is not there, a sentence each

    def token(self, token_id: int) -> str:
        """Returns the text of one token."""
        ...

    def puzzle(self, record: SequenceRecord, prompt: Sequence[int]) -> dict[str, Any] | None:
        """Returns train pairs, test input and right answer of a prompt, where it is a puzzle's."""
        ...

    def answer(self, record: SequenceRecord, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Returns the text of an answer to a prompt, and the grid in it."""
        ...


@dataclass(frozen=True)
class ViewChoice:
    """Which sequences and numbers are on a page."""

    task_ids: Sequence[str] | None = None  # None for all
    n: int = 50  # sequences at most
    layers: Sequence[int] | None = None  # whose norms; None for all that are stored
    probes: tuple[Probe, ...] = ()


@dataclass
class Tint:
    """One number of each row, and the scale that it is drawn on."""

    label: str
    kind: str  # "logprob", "norm", "direction" or "feature"
    layer: int | None
    low: float = 0.0  # the scale
    high: float = 0.0
    least: float = 0.0  # the numbers themselves
    most: float = 0.0


def page_data(store: ActivationStore, reader: Reader, choice: ViewChoice) -> dict[str, Any]:
    """Returns everything on the page of a store.

    Numbers are float32 in base64, one a row in the order of the tokens. What had to be left out is said in
    `notes`.

    Raises:
        StoreUsageError: a layer is not stored, a task has no sequence, or nothing is stored at all.
    """
    layers = store.layers if choice.layers is None else tuple(choice.layers)
    for layer in (*layers, *(probe.layer for probe in choice.probes)):
        store.require_layer(layer)
    records, notes = choose_sequences(store, choice)
    tints = [Tint("log-probability", "logprob", None)]
    tints += [Tint(f"norm of layer {layer}", "norm", layer) for layer in layers]
    for probe in choice.probes:
        tints.append(Tint(f"{probe.label} (layer {probe.layer})", probe.kind, probe.layer))
    prompts = _Prompts(store, reader)
    numbers: list[list[np.ndarray]] = [[] for _ in tints]
    room = MOST_VALUES
    for count, record in enumerate(records):
        room -= record.n_rows * len(tints) + record.prompt_length
        if room < 0 and count:
            notes.append(
                f"{len(records) - count:,} more would make the page too large: choose --layers or --task"
            )
            break
        values = list(_numbers(store, record, layers, choice.probes))
        for found, column in zip(numbers, values, strict=True):
            found.append(column)
        prompts.add(record, values)
    for tint, columns in zip(tints, numbers, strict=True):
        set_scale(tint, np.concatenate(columns))
    listed = prompts.sorted()
    return {
        "name": store_name(store),
        "about": _about(store),
        "notes": [*notes, *_row_notes(store), *reader.notes],
        "tints": [asdict(tint) for tint in tints],
        "vocabulary": {token: reader.token(token) for token in sorted(_all_tokens(listed))},
        "prompts": listed,
    }


class _Prompts:
    """Gathers sequences by their prompts."""

    def __init__(self, store: ActivationStore, reader: Reader) -> None:
        self._store = store
        self._reader = reader
        self._outcomes = store.outcomes()
        self._found: dict[Any, dict[str, Any]] = {}

    def add(self, record: SequenceRecord, values: Sequence[np.ndarray]) -> None:
        """Adds a sequence with the numbers of its rows, tint by tint."""
        prompt_ids = self._store.prompt_token_ids(record).tolist()
        name = (record.task_id, record.test_index, record.augmentation, tuple(prompt_ids))
        if name not in self._found:
            self._found[name] = {
                "task": record.task_id,
                "test": record.test_index,
                "augmentation": record.augmentation,
                "tokens": prompt_ids,
                "values": None,
                "puzzle": self._reader.puzzle(record, prompt_ids),
                "samples": [],
            }
        prompt = self._found[name]
        split = record.prompt_rows
        if split:
            prompt["values"] = [_packed(column[:split]) for column in values]
        tokens = self._store.generated_tokens(record).tolist()
        answer = self._reader.answer(record, prompt["tokens"], tokens)
        prompt["samples"].append(
            {
                "sample": record.sample_index,
                "finish": record.finish_reason,
                "solved": _solved(self._outcomes.get(record.key), answer, prompt["puzzle"]),
                "tokens": tokens,
                "values": [_packed(column[split:]) for column in values],
                **answer,
            }
        )

    def sorted(self) -> list[dict[str, Any]]:
        """Returns the prompts by task, test and augmentation, each with its samples in order."""
        for prompt in self._found.values():
            prompt["samples"].sort(key=lambda sample: sample["sample"])
        return sorted(self._found.values(), key=lambda one: (one["task"], one["test"], one["augmentation"]))


def choose_sequences(store: ActivationStore, choice: ViewChoice) -> tuple[list[SequenceRecord], list[str]]:
    """Returns the sequences of a page, one of each puzzle before the second of any, and what is left out.

    Raises:
        StoreUsageError: a task has no sequence, or there is none at all.
    """
    seen: Counter[tuple[str, int]] = Counter()
    tasks = None if choice.task_ids is None else set(choice.task_ids)
    failed = 0

    def ranked() -> Iterator[tuple[int, int, SequenceRecord]]:
        nonlocal failed
        for number, record in enumerate(store):
            if tasks is not None and record.task_id not in tasks:
                continue
            failed += record.failed
            if not record.failed:
                puzzle = record.task_id, record.test_index
                seen[puzzle] += 1
                yield seen[puzzle], number, record

    chosen = heapq.nsmallest(choice.n, ranked(), key=lambda one: one[:2])
    missing = sorted((tasks or set()) - {task_id for task_id, _ in seen})
    if missing:
        raise StoreUsageError(f"{store.files.location} has no sequence of task {missing[0]}")
    if not chosen:
        raise StoreUsageError(
            f"{store.files.location} has no sequence that could be shown: run the main job first"
        )
    notes = []
    if (total := sum(seen.values())) > len(chosen):
        notes.append(f"{len(chosen):,} of {total:,} sequences are on this page: --task and --n choose others")
    if failed:
        notes.append(f"failed sequences, which have nothing to show: {failed:,}")
    return [record for _, _, record in chosen], notes


def _numbers(
    store: ActivationStore, record: SequenceRecord, layers: Sequence[int], probes: Sequence[Probe]
) -> Iterator[np.ndarray]:
    """Yields the numbers of a sequence's rows, float32 [rows], tint by tint."""
    columns = store.columns(record, layers) if layers else store.columns(record)
    yield columns.logprobs
    for layer in layers:
        yield columns.norms[layer]
    rows = {layer: store.rows(record, layer) for layer in {probe.layer for probe in probes}}
    for probe in probes:
        yield probe.measure(rows[probe.layer])


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def set_scale(tint: Tint, values: np.ndarray) -> None:
    """Sets the ends of a tint's scale so that the few largest numbers do not take all of it.

    Norms and features end where attention sinks begin, log-probabilities begin below 99 of 100 of them,
    directions reach as far to both sides.
    """
    values = values[np.isfinite(values)].astype(np.float64)
    if not len(values):
        return
    tint.least, tint.most = float(values.min()), float(values.max())
    if tint.kind == "logprob":
        tint.low = float(np.percentile(values, 1))
    elif tint.kind == "direction":
        tint.high = float(np.percentile(np.abs(values), 99))
        tint.low = -tint.high
    else:
        active = values[values > 0]
        tint.low = tint.least
        tint.high = float(active[active <= SINK * np.median(active)].max()) if len(active) else tint.least


def _solved(noted: bool | None, answer: Mapping[str, Any], puzzle: Mapping[str, Any] | None) -> bool | None:
    """Returns whether an answer is right, as the store notes it, else as grid and right answer say."""
    if noted is None and puzzle and puzzle["truth"]:
        return answer["grid"] == puzzle["truth"]
    return noted


def _about(store: ActivationStore) -> str:
    model = str(store.provenance.get("model_id", "")).rstrip("/").rpartition("/")[2]
    settings = store.settings
    width = "" if settings.widths else f" of width {settings.hidden_size}"
    kept = f"{hooks_text(settings.hook_names)}{width}, stored as {settings.dtype}"
    kept = kept if settings.hook_names else "no activations"
    return f"{len(store):,} sequences of {model or 'a model that is not named'}; {kept}"


def _row_notes(store: ActivationStore) -> list[str]:
    if store.layers and not store.settings.capture_prompt:
        return ["prompt tokens have no rows: the run was made without --extract_prompt"]
    return []


def _all_tokens(prompts: Sequence[Mapping[str, Any]]) -> set[int]:
    of_prompts = (prompt["tokens"] for prompt in prompts)
    of_answers = (sample["tokens"] for prompt in prompts for sample in prompt["samples"])
    return set(itertools.chain.from_iterable(itertools.chain(of_prompts, of_answers)))
