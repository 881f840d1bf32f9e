"""What plots of a store show, as plain arrays: norms by position, principal components, a run's course.

A store may be of any size: shards are looked through one by one, and no more rows are read than fill a plot.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from activation_store.format import MANIFEST, SequenceRecord, StoreUsageError
from activation_store.local_files import LocalFiles
from activation_store.reader import ActivationStore
from activation_store.rows import STORED

MOST_SHARDS = 64  # that are opened
MOST_NORM_ROWS = 400_000  # whose norms are read, in all layers
MOST_POINTS = 4_000  # of a scatter plot
_SINGLE_POSITIONS = 16  # that have a column each, so that attention sinks can be told apart
_MOST_COLUMNS = 48


@dataclass
class ShardUse:
    """What was committed with one shard."""

    host: int
    seconds: float  # when it was written, since 1970
    sequences: int = 0
    tokens: int = 0  # generated ones
    rows: int = 0


@dataclass(frozen=True)
class Survey:
    """What the index says of a store, shard by shard."""

    shards: dict[str, ShardUse]  # by path, in stored order
    failed: int  # sequences, which have no shard
    began: float | None  # seconds since 1970: when the manifest was written, None where that is not known

    @property
    def sequences(self) -> int:
        """How many sequences are stored."""
        return sum(shard.sequences for shard in self.shards.values())


def survey(store: ActivationStore) -> Survey:
    """Reads the whole index once; StoreUsageError where no sequence is stored."""
    shards: dict[str, ShardUse] = {}
    failed = 0
    for record in store:
        if record.failed:
            failed += 1
            continue
        shard = shards.setdefault(record.path, ShardUse(record.host, record.shard_mtime_ns / 1e9))
        shard.sequences += 1
        shard.tokens += record.generated_length
        shard.rows += record.n_rows
    if not shards:
        failures = f"; {failed} failed" if failed else ""
        raise StoreUsageError(
            f"{store.files.location} has no sequence that could be shown{failures}: run the main job first"
        )
    return Survey(shards, failed, _began(store, min(shard.seconds for shard in shards.values())))


def _began(store: ActivationStore, first_shard: float) -> float | None:
    """Returns the manifest's file time, unless the file was written anew or copied since."""
    if not isinstance(store.files, LocalFiles):
        return None
    written = (store.files.root / MANIFEST).stat().st_mtime
    return written if written <= first_shard else None


def sample_sequences(store: ActivationStore, found: Survey, seed: int = 0) -> list[SequenceRecord]:
    """Returns sequences from at most MOST_SHARDS shards, spread over the store, in stored order.

    They are all of the store's, or drawn with `seed` up to MOST_NORM_ROWS rows.
    """
    paths = list(found.shards)
    if len(paths) > MOST_SHARDS:
        paths = [paths[place] for place in np.linspace(0, len(paths) - 1, MOST_SHARDS).round().astype(int)]
    chosen = set(paths)
    share = min(1.0, MOST_NORM_ROWS / max(1, sum(found.shards[path].rows for path in chosen)))
    rng = np.random.default_rng(seed)
    kept = [
        record
        for record in store
        if record.path in chosen and not record.failed and (share == 1 or rng.random() < share)
    ]
    return kept or [next(iter(store.sequences()))]


# --- Norms --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormMap:
    """Mean norms [layers, columns] of rows by their position; NaN where a column has no row.

    Column c is of the positions from `starts[c]` to before `starts[c + 1]`.
    """

    starts: np.ndarray  # int64 [columns + 1]
    means: np.ndarray  # float64 [layers, columns]


@dataclass(frozen=True)
class Norms:
    """Norms of a store's rows, by position in the prompt and by step of the answer."""

    prompt: NormMap | None  # None where no prompt rows are stored
    generated: NormMap | None
    means: dict[str, np.ndarray]  # float64 [layers] of a kind of row, in words
    sequences: int  # that were read


def measure_norms(store: ActivationStore, records: Sequence[SequenceRecord]) -> Norms:
    """Reads the norms of the rows of `records`, which are in the shards beside the rows."""
    layers = len(store.layers)
    prompt = _Binned(max((record.prompt_rows for record in records), default=0), layers)
    generated = _Binned(max((record.generated_length for record in records), default=0), layers)
    for record in records:
        columns = store.columns(record, store.layers)
        norms = np.stack([columns.norms[layer] for layer in store.layers]).astype(np.float64)
        of_answer = columns.is_generated
        prompt.add(norms[:, ~of_answer], columns.positions[~of_answer])
        generated.add(norms[:, of_answer], columns.positions[of_answer] - record.prompt_length)
    means = {
        "first token of a prompt": prompt.mean(slice(0, 1)),
        "other tokens of a prompt": prompt.mean(slice(1, None)),
        "generated tokens": generated.mean(slice(None)),
    }
    return Norms(
        prompt.map(),
        generated.map(),
        {kind: mean for kind, mean in means.items() if np.isfinite(mean).all()},
        len(records),
    )


class _Binned:
    """Sums norms [layers, rows] in columns of positions from 0 to below `length`."""

    def __init__(self, length: int, layers: int) -> None:
        self.starts = column_starts(length)
        self.sums = np.zeros((layers, len(self.starts) - 1))
        self.counts = np.zeros(len(self.starts) - 1)

    def add(self, norms: np.ndarray, positions: np.ndarray) -> None:
        if len(positions):
            columns = np.searchsorted(self.starts, positions, "right") - 1
            width = len(self.counts)
            self.counts += np.bincount(columns, minlength=width)
            for sums, of_layer in zip(self.sums, norms, strict=True):
                sums += np.bincount(columns, of_layer, minlength=width)

    def mean(self, columns: slice) -> np.ndarray:
        count = self.counts[columns].sum()
        return self.sums[:, columns].sum(axis=1) / (count or np.nan)

    def map(self) -> NormMap | None:
        if not self.counts.any():
            return None
        return NormMap(self.starts, self.sums / np.where(self.counts, self.counts, np.nan))


def column_starts(length: int) -> np.ndarray:
    """Returns where the columns of `length` positions begin, and where the last one ends.

    The first positions have a column each; after them columns grow evenly on a logarithmic scale.
    """
    singles = np.arange(min(length, _SINGLE_POSITIONS))
    if length <= _SINGLE_POSITIONS:
        return np.append(singles, length)
    growing = np.geomspace(_SINGLE_POSITIONS, length, _MOST_COLUMNS - _SINGLE_POSITIONS + 1)
    return np.unique(np.append(singles, growing.round().astype(int)))


# --- Principal components -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """The first two principal components of sampled rows of one layer."""

    layer: int
    points: np.ndarray  # float64 [rows, 2]
    explained: tuple[float, float]  # shares of the variance
    kinds: list[str]  # what each row is: "solved", "not solved", "answer" (not known) or "prompt"


def principal_components(
    store: ActivationStore,
    layer: int,
    records: Sequence[SequenceRecord],
    outcomes: Mapping[str, bool],
    seed: int = 0,
) -> Components:
    """Draws up to MOST_POINTS rows of a layer, as many of answers as of prompts, and projects them.

    The first token of a prompt is left out: as an attention sink it would be the first component.

    Raises:
        StoreUsageError: there are fewer than three rows.
    """
    rng = np.random.default_rng(seed)
    answers = _drawn(records, "answer", rng)
    prompts = _drawn(records, "prompt", rng)
    rows, kinds = [], []
    for record, answer, prompt in zip(records, answers, prompts, strict=True):
        if len(answer) or len(prompt):
            of_layer = store.rows(record, layer, dtype=STORED)
            rows.append(of_layer[np.concatenate([prompt, answer])].astype(np.float32))
            solved = {True: "solved", False: "not solved", None: "answer"}[outcomes.get(record.key)]
            kinds += ["prompt"] * len(prompt) + [solved] * len(answer)
    if len(kinds) < 3:
        raise StoreUsageError(f"{store.files.location} has too few rows of layer {layer} for a PCA")
    points, explained = project(np.concatenate(rows).astype(np.float64))
    return Components(layer, points, explained, kinds)


def _drawn(records: Iterable[SequenceRecord], kind: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns for each record the rows of an answer or a prompt that were drawn, MOST_POINTS / 2 in all."""
    ranges = [
        (record.prompt_rows, record.n_rows) if kind == "answer" else (1, max(1, record.prompt_rows))
        for record in records
    ]
    ends = np.cumsum([stop - start for start, stop in ranges])
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.sort(rng.choice(total, min(total, MOST_POINTS // 2), replace=False))
    pieces = np.split(chosen, np.searchsorted(chosen, ends)[:-1]) if len(ends) else []
    return [
        piece - (end - (stop - start)) + start
        for piece, end, (start, stop) in zip(pieces, ends, ranges, strict=True)
    ]


def project(rows: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Returns rows [n, hidden] in their first two principal components, and the variance that each explains.

    A component that rows do not have is zero.
    """
    centred = rows - rows.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(rows), 2))
    points[:, : len(singular)] = (left * singular)[:, :2]
    shares = np.zeros(2)
    variance = singular**2
    shares[: len(variance)] = (variance / (variance.sum() or 1))[:2]
    return points, (float(shares[0]), float(shares[1]))
