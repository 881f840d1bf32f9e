"""Checking a store against itself: every byte, every index line, every row.

What is wrong is yielded as findings, one sentence each; a sound store has none.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from activation_store.format import (
    SequenceId,
    SequenceRecord,
    StoreError,
    StoreSettings,
    decode_line,
    host_name,
    sequence_key,
)
from activation_store.index import index_lines
from activation_store.reader import ActivationStore
from activation_store.shard import Shard
from activation_store.statistics import LayerStatistics, measure
from activation_store.store_files import FileStatus

# Stored norms and statistics are float32 sums taken in blocks; taken again in one order they agree to this.
_NORM_TOLERANCE = 1e-4

Item = TypeVar("Item")


class Progress(Protocol):
    """Shows somebody how far a loop over items has come, as `tqdm` does; it yields the items as they are."""

    def __call__(self, items: Collection[Item], name: str, unit: str) -> Iterable[Item]: ...


def silently(items: Collection[Item], name: str, unit: str) -> Iterable[Item]:
    """Yields the items and shows nothing: the `Progress` by default."""
    return items


def verify_store(store: ActivationStore, progress: Progress = silently) -> Iterator[str]:
    """Yields findings about checksums, sizes, index against shards, lengths, finiteness and duplicate keys.

    Every byte of the store is read. `progress` is called once a host with that host's shards.
    """
    seen: set[str] = set()
    for host in store.files.hosts():
        lines: dict[str, list[SequenceRecord]] = {}
        for name, status in store.files.indexes(host).items():
            for number, line in enumerate(index_lines(store.files, name, status.size), start=1):
                if not line.endswith(b"\n"):
                    yield f"{name}, line {number}: torn, {len(line)} bytes of it are there"
                    continue
                try:
                    record = decode_line(line, host)
                except StoreError as error:
                    yield f"{name}, line {number}: {error}"
                    continue
                if record.key in seen:
                    yield f"{name}, line {number}: key {record.key} occurs twice"
                seen.add(record.key)
                lines.setdefault(record.shard, []).append(record)
        lines.pop("", None)  # failed sequences: nothing is stored
        present = store.files.shards(host)
        for shard, records in progress(lines.items(), host_name(host), "shard"):
            where = f"{host_name(host)}/{shard}"
            try:
                for problem in _shard_problems(store, where, records, present.get(shard)):
                    yield f"{where}: {problem}"
            except StoreError as error:
                yield str(error)
            except OSError as error:  # of this shard; the next may be sound
                yield f"{where}: cannot be read: {error.strerror or error}"


def store_notes(store: ActivationStore) -> Iterator[str]:
    """Yields what is worth knowing and no damage: sequences that failed, shards that no index line names."""
    named: set[str] = set()
    for record in store.index.records():
        if record.failed:
            yield f"{record.label} failed: {record.failure}"
        named.add(record.path)
    for host in store.files.hosts():
        for shard in store.files.shards(host):
            if f"{host_name(host)}/{shard}" not in named:
                yield f"{host_name(host)}/{shard} is in no index: a crash left it, nothing reads it"


def verify_coverage(
    store: ActivationStore, expected: Collection[tuple[str, int]], where: str
) -> Iterator[str]:
    """Yields findings about puzzles that the store has no, or too few, sequences of, or should not have.

    Args:
        store: each (task_id, test_index) in it should have as many sequences as the others.
        expected: the (task_id, test_index) of each puzzle that the store should cover.
        where: what these were taken from, for messages.
    """
    found = Counter((record.task_id, record.test_index) for record in store.index.records())
    most = max(found.values(), default=0)
    wanted = set(expected)
    for task_id, test in sorted(wanted | set(found)):
        count = found[task_id, test]
        if (task_id, test) not in wanted:
            yield f"task {task_id} test {test} is not in {where}"
        elif count == 0:
            yield f"task {task_id} test {test} has no sequence"
        elif count < most:
            yield f"task {task_id} test {test} has {count} sequences, others have {most}"


def _shard_problems(
    store: ActivationStore, where: str, records: Sequence[SequenceRecord], status: FileStatus | None
) -> Iterator[str]:
    first = records[0]
    same = {(r.shard_bytes, r.shard_sha256, r.shard_sequences) for r in records}
    if len(same) > 1:
        yield "its index lines name different sizes, checksums or sequence counts"
        return
    if status is None:
        yield "missing"
        return
    if status.oddity:
        yield f"is {status.oddity}, not a file"
        return
    if status.size != first.shard_bytes:
        yield f"has {status.size} bytes, {first.shard_bytes} were written"
        return
    whole = store.files.open_file(where).view(0, status.size)
    if hashlib.sha256(whole.data).hexdigest() != first.shard_sha256:
        yield "its bytes are not those that were written (checksum)"
        return
    if len(records) != first.shard_sequences:
        yield f"{len(records)} of its {first.shard_sequences} index lines are there"
    shard = store.open_shard(where, status.size)
    shard.check_layout()
    yield from _tiling_problems(shard, records)
    for order, record in enumerate(sorted(records, key=lambda r: r.row_start)):
        for problem in _sequence_problems(store.settings, record, shard, order):
            yield f"{record.label}: {problem}"
    yield from _row_problems(store.settings, shard)


def _tiling_problems(shard: Shard, records: Sequence[SequenceRecord]) -> Iterator[str]:
    """Yields rows and prompt tokens that do not belong to exactly one sequence."""
    for what, spans, total in (
        ("rows", [(r.row_start, r.n_rows) for r in records], shard.place("token_ids").shape[0]),
        (
            "prompt tokens",
            [(r.prompt_start, r.prompt_length) for r in records],
            shard.place("prompt_token_ids").shape[0],
        ),
    ):
        end = 0
        for start, length in sorted(spans):
            if start != end:
                yield f"{what} {min(start, end)} to {max(start, end)} belong to no sequence or to two"
            end = start + length
        if end != total:
            yield f"the sequences have {end} {what}, the shard {total}"


def _sequence_problems(
    settings: StoreSettings, record: SequenceRecord, shard: Shard, order: int
) -> Iterator[str]:
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
    if prompt_rows not in allowed or not 1 <= record.generated_length <= settings.max_output_tokens:
        lengths = f"{record.prompt_length} prompt and {record.generated_length} generated tokens"
        yield f"{record.n_rows} rows for {lengths}"
        return
    identity = SequenceId(record.task_id, record.test_index, record.sample_index, record.augmentation, prompt)
    if sequence_key(settings, identity) != record.key or record.seed != settings.seed:
        yield "its key is not that of its task, prompt and settings"
    if (shard.column("sequence_index")[rows] != order).any():
        yield f"its rows are not all marked as sequence {order} of the shard"
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
    elif not imported and (record.finish_reason == "stop") != bool(ends[-1]):
        yield f"finish_reason is {record.finish_reason}, the last token is {tokens[-1]}"
    elif record.finish_reason == "length" and record.generated_length != settings.max_output_tokens:
        most = settings.max_output_tokens
        yield f"finish_reason is length after {record.generated_length} of {most} tokens"


def _row_problems(settings: StoreSettings, shard: Shard) -> Iterator[str]:
    """Yields rows that are not finite, all zero, or not those that norms and statistics were taken from."""
    generated = shard.column("is_generated").astype(bool)
    for place, hook in enumerate(settings.hook_names):
        rows = shard.layer(hook)
        measured, norms = measure(rows)
        if not np.isfinite(norms).all():
            yield f"{hook}: row {int(np.argmin(np.isfinite(norms)))} is not finite"
            continue
        if not norms.all():
            yield f"{hook}: row {int(np.argmin(norms))} is all zero"
        if not np.allclose(norms, shard.column("norms")[place], rtol=_NORM_TOLERANCE):
            yield f"{hook}: the rows do not have the norms that were stored with them"
        for group, mask in (("generated", generated), ("prompt", ~generated)):
            if not mask.any():
                continue
            of_group = measured if mask.all() else measure(rows[mask])[0]
            if not _same_statistics(shard, group, place, of_group):
                yield f"{hook}: the {group} rows do not have the statistics that were stored with them"


def _same_statistics(shard: Shard, group: str, place: int, measured: LayerStatistics) -> bool:
    if f"statistics.{group}.mean" not in shard:
        return False
    mean, variance, norm = (
        shard.column(f"statistics.{group}.{name}")[place] for name in ("mean", "variance", "norm")
    )
    scale = np.sqrt(measured.variance.mean() + (measured.mean**2).mean())
    return bool(
        np.allclose(mean, measured.mean, rtol=1e-3, atol=1e-4 * scale)
        and np.allclose(variance, measured.variance, rtol=1e-3, atol=1e-4 * scale**2)
        and np.isclose(norm, measured.mean_norm, rtol=1e-3)
    )
