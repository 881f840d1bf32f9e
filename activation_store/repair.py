"""Dropping everything that `verify_store` finds, so that a run makes it again."""

import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Collection

from activation_store.format import (
    MANIFEST,
    StoreError,
    host_name,
    host_number,
    sequence_key,
)
from activation_store.host_files import (
    Numerics,
    host_file_name,
    known_numerics,
    read_host_files,
    write_host_file,
)
from activation_store.index import SequenceIndex
from activation_store.manifest import SCHEMA_VERSION, encode_manifest, manifest_problem, manifest_version
from activation_store.reader import ActivationStore
from activation_store.recovery import drop_lines, drop_places, shard_sha256
from activation_store.remote_files import open_files
from activation_store.shard_checks import Finding
from activation_store.store_files import StoreFiles
from activation_store.verify import Progress, find_damage, silently


def repair_store(directory: str | os.PathLike[str], progress: Progress = silently) -> list[str]:
    """Drops whatever `verify_store` finds in any host of a store, and nothing that is intact.

    Index lines are dropped one by one, and the others of their shard stay. A file of which nothing is left,
    or that nothing names, gets a name that ends in `.damaged`; in an object store it is removed. A manifest
    whose checksum does not fit is sealed anew, once sequences are found to fit its settings.

    Returns:
        What was found, one phrase each.

    Raises:
        StoreError: a run writes to the store, or it cannot be used, or no sequence fits its settings, so that
            it is these that must have changed.
    """
    files = open_files(directory)
    with contextlib.ExitStack() as stack:
        for host in files.hosts():
            stack.callback(files.open_host(host))
        store = ActivationStore(directory)
        _require_settings(store)
        found = list(find_damage(store, progress, lambda host: False))  # we have taken all
        _seal_manifest(store)
        _drop(files, found)
        _describe_hosts(files, {finding.host for finding in found if finding.host is not None})
    return [finding.text for finding in found]


def drop_sequences(directory: str | os.PathLike[str], keys: Collection[str]) -> int:
    """Drops sequences that nobody wants any more, so that no reader finds them; returns how many there were.

    Their rows stay in their shards until no index line names any row of these.

    Raises:
        StoreError: a run writes to the store, or it cannot be used.
    """
    files = open_files(directory)
    dropped = 0
    with contextlib.ExitStack() as stack:
        for host in files.hosts():
            stack.callback(files.open_host(host))
        _seal_manifest(ActivationStore(directory))
        index = SequenceIndex(files)
        for host in files.hosts():
            places = index.lines_of(host, keys)
            drop_places(files, host, places)
            dropped += len({place.key for place in places})
    return dropped


def _require_settings(store: ActivationStore) -> None:
    """Raises StoreError where it is the manifest's settings that are wrong, and not the sequences."""
    compared = 0
    is_whole = functools.cache(functools.partial(_is_whole, store.files))
    for key in store.index:
        try:
            one = store[key]
            if not is_whole(one.host, one.shard, one.shard_bytes, one.shard_sha256):
                continue
            prompt = store.prompt_token_ids(one)
        except StoreError:  # damaged
            continue
        if sequence_key(store.settings, one.identity(prompt)) == key:
            return
        compared += 1
    if compared > 1 or (compared and manifest_problem(store.files.read(MANIFEST))):
        raise StoreError(
            f"no sequence in {store.directory} fits the settings in its {MANIFEST}: restore that file; "
            "nothing was dropped"
        )


def _is_whole(files: StoreFiles, host: int, shard: str, size: int, sha256: str) -> bool:
    there = files.shards(host).get(shard)
    try:
        return (
            there is not None
            and there.size == size
            and shard_sha256(files, f"{host_name(host)}/{shard}", size) == sha256
        )
    except OSError:
        return False


def _seal_manifest(store: ActivationStore) -> None:
    data = store.files.read(MANIFEST)
    if manifest_problem(data) or manifest_version(data) < SCHEMA_VERSION:
        store.files.replace(MANIFEST, encode_manifest(store.settings, store.provenance))


def _drop(files: StoreFiles, found: list[Finding]) -> None:
    of_index: dict[str, set[int]] = defaultdict(set)
    for host in files.hosts():
        for name in files.indexes(host):
            of_index[name] = set()
    for finding in found:
        for name, number in finding.lines:
            of_index[name].add(number)
    for name, numbers in of_index.items():
        host = host_number(name.partition("/")[0])
        assert host is not None  # as names of indexes begin so
        drop_lines(files, name, host, numbers)
    for finding in found:
        if finding.aside:
            files.set_aside(finding.aside)


def _describe_hosts(files: StoreFiles, damaged: set[int]) -> None:
    """Writes the files of hosts anew, as far as it is known what was in them."""
    described = read_host_files(files)[0]
    known = known_numerics(described)
    for host in sorted(damaged):
        files.set_aside(host_file_name(host))
        used = {record.numerics for record in SequenceIndex(files).records() if record.host == host} - {""}
        numerics: Numerics = {one: known.get(one) for one in sorted(used)}
        write_host_file(files, host, numerics | described.get(host, {}))
    for host in described:
        if not files.indexes(host) and not files.shards(host):
            files.set_aside(host_file_name(host))
