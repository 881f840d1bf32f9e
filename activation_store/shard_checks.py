"""What can be wrong with a shard and its index lines, and which of the lines cannot be relied on then."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from activation_store.format import SequenceRecord, StoreError, StoreSettings, sequence_key
from activation_store.reader import ActivationStore
from activation_store.recovery import shard_sha256
from activation_store.shard import Shard
from activation_store.statistics import LayerStatistics, measure
from activation_store.store_files import FileStatus
from qwen2_core.hook_points import RESID_POST, parse_name

# Stored norms and statistics are float32 sums taken in blocks; taken again in one order they agree to this.
_NORM_TOLERANCE = 1e-4
_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", RESID_POST)
WRONG_KEY = "its key is not that of its task, prompt and settings"


class IndexLine(NamedTuple):
    """An index line and where it is."""

    name: str  # of the index file
    number: int  # from 1
    record: SequenceRecord

    @property
    def place(self) -> tuple[str, int]:
        """The index file and the line's number."""
        return self.name, self.number


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a store, in a sentence, and what has to go so that it is right again."""

    text: str
    lines: frozenset[tuple[str, int]] = frozenset()  # index files and numbers of lines
    aside: str = ""  # a file or folder that nothing names
    host: int | None = None  # whose file (host_files.py) has to be written anew


def check_shard(
    store: ActivationStore, where: str, lines: Sequence[IndexLine], status: FileStatus | None
) -> Iterator[Finding]:
    """Yields findings about a shard and its index lines; every byte is read.

    Args:
        store: the store.
        where: the shard's name in it.
        lines: the shard's index lines, each key once.
        status: what is there; None without the shard.
    """
    all_lines = frozenset(line.place for line in lines)
    problem, fitting = _compare(store, where, lines, status)
    if problem:
        yield Finding(f"{where}: {problem}", all_lines - {line.place for line in fitting})
    if not fitting or status is None:
        return
    try:
        yield from _check_content(store, where, fitting, status.size)
    except StoreError as error:
        yield Finding(f"{where}: {error}", all_lines)


def _compare(
    store: ActivationStore, where: str, lines: Sequence[IndexLine], status: FileStatus | None
) -> tuple[str | None, Sequence[IndexLine]]:
    """Returns what is wrong with a shard's bytes or what lines say of them, and the lines that are right."""
    first = lines[0].record
    if status is None:
        return "missing", ()
    if status.oddity:
        return f"is {status.oddity}, not a file", ()
    of_size = [line for line in lines if line.record.shard_bytes == status.size]
    if not of_size:
        return f"has {status.size} bytes, {first.shard_bytes} were written", ()
    try:
        sha256 = shard_sha256(store.files, where, status.size)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})", ()
    true = [line for line in of_size if line.record.shard_sha256 == sha256]
    if not true:
        return "its bytes are not those that were written (checksum)", ()
    counts = Counter(line.record.shard_sequences for line in true)
    count = max(counts, key=lambda count: (counts[count], count == len(lines)))
    fitting = [line for line in true if line.record.shard_sequences == count]
    if len(fitting) < len(lines):
        return "its index lines name different sizes, checksums or sequence counts", fitting
    if len(lines) != count:
        return f"{len(lines)} of its {count} index lines are there", fitting
    return None, fitting


def _check_content(
    store: ActivationStore, where: str, lines: Sequence[IndexLine], size: int
) -> Iterator[Finding]:
    shard = store.open_shard(where, size)
    shard.check_layout()
    bad: set[tuple[str, int]] = set()
    for line in sorted(lines, key=lambda line: line.record.row_start):
        for problem in _sequence_problems(store.settings, line.record, shard):
            yield Finding(f"{where}: {line.record.label}: {problem}", frozenset({line.place}))
            bad.add(line.place)
    good = [line for line in lines if line.place not in bad]
    for finding in _prompt_findings(shard, where, good):
        yield finding
        bad |= finding.lines
    yield from _row_findings(store.settings, shard, where, [line for line in good if line.place not in bad])


def _sequence_problems(settings: StoreSettings, record: SequenceRecord, shard: Shard) -> Iterator[str]:
    rows = slice(record.row_start, record.row_start + record.n_rows)
    tokens, positions = shard.column("token_ids")[rows], shard.column("positions")[rows]
    logprobs, generated = shard.column("logprobs")[rows], shard.column("is_generated")[rows].astype(bool)
    prompt = shard.column("prompt_token_ids")[
        record.prompt_start : record.prompt_start + record.prompt_length
    ]
    prompt_rows, imported = record.prompt_rows, record.finish_reason == "imported"
    if not (len(tokens) == record.n_rows and len(prompt) == record.prompt_length):
        yield "its rows or prompt tokens end outside the shard"
        return
    allowed = {0, record.prompt_length} if settings.capture_prompt and settings.hook_names else {0}
    expected = range(settings.least_tokens, settings.max_output_tokens + 1)
    if prompt_rows not in allowed or record.generated_length not in expected:
        lengths = f"{record.prompt_length} prompt and {record.generated_length} generated tokens"
        yield f"{record.n_rows} rows for {lengths}"
        return
    if sequence_key(settings, record.identity(prompt)) != record.key or record.seed != settings.seed:
        yield WRONG_KEY
    of_rows = shard.column("sequence_index")
    order = of_rows[record.row_start]
    if (of_rows[rows] != order).any() or np.count_nonzero(of_rows == order) != record.n_rows:
        yield f"its rows are not all marked as sequence {order} of the shard, or not all of that sequence's"
    first = record.prompt_length - prompt_rows
    if (positions != np.arange(first, first + record.n_rows)).any():
        yield "its positions do not count up from the prompt's"
    if (generated != (np.arange(record.n_rows) >= prompt_rows)).any():
        yield "is_generated does not begin where the prompt ends"
    if (tokens[:prompt_rows] != prompt[:prompt_rows]).any():
        yield "the tokens of its prompt rows are not its prompt"
    if not np.isnan(logprobs[:prompt_rows]).all() or np.isfinite(logprobs[prompt_rows:]).all() == imported:
        yield "log-probabilities must be NaN on prompt rows and finite on generated ones"
    elif not imported and (logprobs[prompt_rows:] > 1e-4).any():
        yield "a log-probability is above 0"
    ends = np.isin(tokens[prompt_rows:], settings.eos_token_ids)
    if ends[:-1].any():
        yield f"rows after the end: token {int(np.argmax(ends))} of {record.generated_length} is EOS"
    elif not imported and (record.finish_reason == "stop") != bool(ends[-1:].any()):
        yield f"finish_reason is {record.finish_reason}, the last token is {tokens[-1]}"
    elif record.finish_reason == "length" and record.generated_length != settings.max_output_tokens:
        most = settings.max_output_tokens
        yield f"finish_reason is length after {record.generated_length} of {most} tokens"


def _prompt_findings(shard: Shard, where: str, lines: Sequence[IndexLine]) -> Iterator[Finding]:
    """Yields lines that name the prompt tokens of another sequence, which may be equal to theirs."""
    of_rows = shard.column("sequence_index")
    if not len(of_rows):
        return
    starts = np.concatenate([[0], np.flatnonzero(np.diff(of_rows)) + 1])
    if (of_rows[starts] != np.arange(len(starts))).any():
        yield Finding(
            f"{where}: its rows are not sequence after sequence", frozenset(line.place for line in lines)
        )
        return
    prompt_rows = np.add.reduceat(shard.column("is_generated") == 0, starts, dtype=np.int64)
    lengths = shard.column("positions")[starts] + prompt_rows
    there = shard.place("prompt_token_ids").shape[0]
    if lengths.sum() != there:
        text = f"{where}: its sequences have {lengths.sum()} prompt tokens, it holds {there}"
        yield Finding(text, frozenset(line.place for line in lines))
        return
    prompt_starts = np.cumsum(lengths) - lengths
    for line in lines:
        expected = prompt_starts[of_rows[line.record.row_start]]
        if line.record.prompt_start != expected:
            text = f"its prompt tokens begin at {expected}, not at {line.record.prompt_start}"
            yield Finding(f"{where}: {line.record.label}: {text}", frozenset({line.place}))


def _row_findings(
    settings: StoreSettings, shard: Shard, where: str, lines: Sequence[IndexLine]
) -> Iterator[Finding]:
    """Yields rows that are not finite, all zero, or not those that norms and statistics were taken from.

    Rows that no line names are left out. The statistics are of all rows, so they are compared only where
    lines name all.
    """
    generated = shard.column("is_generated").astype(bool)
    named = np.full(len(generated), -1)
    for place, line in enumerate(lines):
        named[line.record.row_start : line.record.row_start + line.record.n_rows] = place
    is_whole = bool((named >= 0).all())
    rows_named = np.flatnonzero(named >= 0)
    if not len(rows_named):
        return
    for place, hook in enumerate(settings.hook_names):
        rows = shard.layer(hook) if is_whole else shard.layer(hook)[rows_named]
        measured, norms = measure(rows)
        stored = shard.column("norms")[place][rows_named]
        is_right = True
        for mask, text in (
            (~np.isfinite(norms), "row {} is not finite"),
            (_empty(settings, hook, norms), "row {} is all zero"),
            (
                np.isfinite(norms) & ~np.isclose(norms, stored, rtol=_NORM_TOLERANCE),
                "the rows do not have the norms that were stored with them, row {} for one",
            ),
        ):
            if mask.any():
                at = rows_named[mask]
                is_right = False
                yield Finding(
                    f"{where}: {hook}: {text.format(at[0])}",
                    frozenset(lines[one].place for one in np.unique(named[at])),
                )
        if not (is_whole and is_right):
            continue
        for group, mask in (("generated", generated), ("prompt", ~generated)):
            if not mask.any():
                continue
            of_group = measured if mask.all() else measure(rows[mask])[0]
            if not _same_statistics(shard, group, place, of_group):
                text = f"the {group} rows do not have the statistics that were stored with them"
                yield Finding(f"{where}: {hook}: {text}", frozenset(line.place for line in lines))


def _empty(settings: StoreSettings, hook: str, norms: np.ndarray) -> np.ndarray:
    """Returns which rows are zero and should not be, by their norms.

    Anything may have been written into a model. Without that no row of the residual stream is zero, and of
    what a block adds to it either all are, as in a layer that does nothing, or none.
    """
    point, _ = parse_name(hook)
    if settings.interventions or not (point in _RESIDUAL or norms.any()):
        return np.zeros(len(norms), bool)
    return norms == 0


def _same_statistics(shard: Shard, group: str, place: int, measured: LayerStatistics) -> bool:
    if f"statistics.{group}.mean" not in shard:
        return False
    mean, variance, norm = shard.statistics(group, place)
    scale = np.sqrt(measured.variance.mean() + (measured.mean**2).mean())
    return bool(
        np.allclose(mean, measured.mean, rtol=1e-3, atol=1e-4 * scale)
        and np.allclose(variance, measured.variance, rtol=1e-3, atol=1e-4 * scale**2)
        and np.isclose(norm, measured.mean_norm, rtol=1e-3)
    )
