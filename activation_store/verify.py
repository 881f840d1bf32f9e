"""Checking a store against itself: every byte, every index line, every row, every file that should be there.

What is wrong is yielded as findings, one sentence each; a sound store has none.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol, TypeVar

from activation_store.format import (
    INTERVENTIONS,
    MANIFEST,
    StoreError,
    decode_line,
    host_name,
    host_number,
    shard_number,
)
from activation_store.host_files import host_file_name, host_file_number, read_host_files
from activation_store.index import index_lines
from activation_store.local_files import LOCK
from activation_store.manifest import MANIFEST_BYTES, manifest_problem
from activation_store.outcomes import OUTCOMES
from activation_store.reader import ActivationStore
from activation_store.shard_checks import Finding, IndexLine, check_shard
from activation_store.store_files import FIGURES, INDEX, INDEX_FOLDER

# "run" held what the processes of a run shared, up to version 0.1.
_OURS = {MANIFEST, INTERVENTIONS, OUTCOMES, "run", FIGURES, INDEX, INDEX_FOLDER, LOCK}

Item = TypeVar("Item")


class Progress(Protocol):
    """Shows somebody how far a loop over items has come, as `tqdm` does; it yields the items as they are."""

    def __call__(self, items: Collection[Item], name: str, unit: str) -> Iterable[Item]: ...


def silently(items: Collection[Item], name: str, unit: str) -> Iterable[Item]:
    """Yields the items and shows nothing: the `Progress` by default."""
    return items


def verify_store(store: ActivationStore, progress: Progress = silently) -> Iterator[str]:
    """Yields findings about everything that a store says of itself, one sentence each.

    They are about checksums, sizes, index against shards, lengths, finiteness, keys that are there twice,
    shards that no index line names, hosts that are gone, and numerics that nothing describes. Every byte is
    read. Another process may write to a local store meanwhile: what it is just committing is no finding.
    `progress` is called once a host with that host's shards.
    """
    try:
        store.interventions()
    except StoreError as error:
        yield str(error)
    for finding in find_damage(store, progress, store.files.in_use):
        yield finding.text


def find_damage(
    store: ActivationStore, progress: Progress, in_use: Callable[[int], bool]
) -> Iterator[Finding]:
    """Yields the findings of `verify_store`, each with what has to go so that the store is right again.

    `in_use` tells whether another process writes as a host, so that the last of it may be on its way.
    """
    if problem := manifest_problem(store.files.read(MANIFEST, 0, MANIFEST_BYTES)):
        yield Finding(f"{MANIFEST}: {problem}")
    described, problems = read_host_files(store.files)
    for host, problem in problems.items():
        yield Finding(problem, host=host)
    known = {numerics for of_host in described.values() for numerics in of_host}
    seen: dict[str, bool] = {}
    hosts = store.files.hosts()
    for host in hosts:
        yield from _check_host(store, host, known, seen, progress, in_use(host))
    for host in sorted({*described, *problems}):
        if not store.files.indexes(host) and not store.files.shards(host):
            name = host_file_name(host)
            yield Finding(f"{name}: host {host} has committed sequences; its index is gone", aside=name)
    for folder in ["", *map(host_name, hosts)]:
        for name in _foreign_names(store, folder):
            if name.startswith(("host-", "shard-", "index")):
                yield Finding(
                    f"{folder}{'/' * bool(folder)}{name}: not a name that this program gives; "
                    "nothing reads it",
                    aside=f"{folder}{'/' * bool(folder)}{name}",
                )


def store_notes(store: ActivationStore) -> Iterator[str]:
    """Yields what is worth knowing and no damage: sequences that failed, files that are not the store's."""
    for record in store.index.records():
        if record.failed:
            yield f"{record.label} failed: {record.failure}"
    for host, numerics in read_host_files(store.files)[0].items():
        for known, content in numerics.items():
            if content is None:
                yield f"{host_file_name(host)}: which numerics {known} are is not known any more"
    for folder in ["", *map(host_name, store.files.hosts())]:
        names = [n for n in _foreign_names(store, folder) if not n.startswith(("host-", "shard-", "index"))]
        if names:
            yield f"not part of the store: {', '.join(f'{folder}/{n}' if folder else n for n in names)}"


def _check_host(
    store: ActivationStore,
    host: int,
    known: Collection[str],
    seen: dict[str, bool],
    progress: Progress,
    is_written_to: bool,
) -> Iterator[Finding]:
    """Yields the findings of one host.

    Args:
        store: the store.
        host: its index.
        known: the ids of all numerics that a host's file describes.
        seen: whether the line was right of each key met so far; those of this host are added.
        progress: called with the host's shards.
        is_written_to: whether the last of it may be on its way.
    """
    listed = store.files.shards(host)  # before the index: what is committed from now on is not looked for
    lines: list[IndexLine] = []
    bad: set[tuple[str, int]] = set()
    for finding in _read_lines(store, host, lines, is_written_to):
        yield finding
        bad |= finding.lines
    unknown = {line.record.numerics for line in lines} - {"", *known}
    for numerics in sorted(unknown):
        yield Finding(f"{host_name(host)}: no host's file says what its numerics {numerics} are", host=host)
    by_shard: dict[str, dict[str, IndexLine]] = {}
    for line in lines:
        if line.record.shard:
            by_shard.setdefault(line.record.shard, {}).setdefault(line.record.key, line)
    named = set(by_shard)
    if is_written_to and by_shard:  # its last lines may just be on their way
        last, of_last = next(reversed(by_shard.items()))
        if len(of_last) < next(iter(of_last.values())).record.shard_sequences:
            del by_shard[last]
    present = store.files.shards(host)
    for shard, of_shard in progress(by_shard.items(), host_name(host), "shard"):
        where = f"{host_name(host)}/{shard}"
        for finding in check_shard(store, where, list(of_shard.values()), present.get(shard)):
            yield finding
            bad |= finding.lines
    newest = max(listed, key=lambda name: shard_number(name) or 0, default="")
    for shard in listed:
        if shard not in named and not (is_written_to and shard == newest):
            where = f"{host_name(host)}/{shard}"
            yield Finding(
                f"{where}: no index line names it: its lines were lost, or a commit was interrupted",
                aside=where,
            )
    for line in lines:
        key = line.record.key
        if key in seen:
            # Where the first one is damaged, this one is to stay.
            drop = frozenset({line.place} if seen[key] else ())
            yield Finding(f"{line.name}, line {line.number}: key {key} occurs twice", drop)
        seen[key] = seen.get(key, False) or line.place not in bad


def _read_lines(
    store: ActivationStore, host: int, lines: list[IndexLine], is_written_to: bool
) -> Iterator[Finding]:
    """Appends the lines of a host's indexes to `lines`; yields those that are none."""
    for name, status in store.files.indexes(host).items():
        for number, line in enumerate(index_lines(store.files, name, status.size), start=1):
            where, place = f"{name}, line {number}", frozenset({(name, number)})
            if not line.endswith(b"\n"):
                if not is_written_to:
                    yield Finding(f"{where}: torn, {len(line)} bytes of it are there", place)
                continue
            try:
                lines.append(IndexLine(name, number, decode_line(line, host)))
            except StoreError as error:
                yield Finding(f"{where}: {error}", place)


def _foreign_names(store: ActivationStore, folder: str) -> list[str]:
    """Returns what lies in the store's folder, or in a host's, and is not ours or what we have left there."""
    return [
        name
        for name in store.files.names(folder)
        if not (
            (name in _OURS and (name != INTERVENTIONS or bool(store.settings.interventions)))
            or name.endswith((".damaged", ".tmp"))
            or (shard_number(name) if folder else host_number(name)) is not None
            or (not folder and host_file_number(name) is not None)
        )
    ]
