"""Names and kinds of file in a store that somebody else made: nothing outside is opened, or moved."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from activation_fakes import SETTINGS, batch, make_two_shards, read_index, write_index
from store_readers import problems, problems_of_reading, sentences

from activation_store import (
    ActivationStore,
    ActivationWriter,
    ShuffledBatches,
    StoreError,
    repair_store,
    verify_store,
)

SHARD = "host-00000/shard-000000.safetensors"
INDEX = "host-00000/index.jsonl"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_two_shards(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "store")


# --- Names and kinds of file ----------------------------------------------------------------------------


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


OUTSIDE = (
    "../../victim.txt",
    "../victim.txt",
    "/etc/hostname",
    "victim.txt",
    "./shard-000000.safetensors",
    "shard-000000.safetensors/../../../victim.txt",
    "shard-000000.safetensors\n",
    "shard-0.safetensors",
    "shard-0000000.safetensors",
    "shard-" + "\N{ARABIC-INDIC DIGIT ZERO}" * 6 + ".safetensors",
    "index.jsonl",
    "../manifest.json",
    "..",
    "a" * 5000,
    "shard-000000.safetensors\x00",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_anywhere_else_is_never_opened_moved_or_removed(store: Path, name: str):
    (store.parent / "victim.txt").write_text("mine")
    (store / "victim.txt").write_text("mine")
    (store / "host-00000" / "victim.txt").write_text("mine")
    lines = read_index(store)
    size = {"shard_bytes": 10_000, "shard_mtime_ns": 0}
    write_index(
        store,
        [
            line | {"shard": name} | size if line["shard"].endswith("0.safetensors") else line
            for line in lines
        ],
    )
    before = tree(store.parent)
    said = problems_of_reading(store)
    assert tree(store.parent) == before
    assert any("line 1: not an index line (shard: " in one for one in said), said
    assert len(repair_store(store)) >= 4  # the lines
    with ActivationWriter(store, SETTINGS, provenance={}):
        pass
    changed = {
        path for path, data in tree(store.parent).items() if before.get(path) != data
    } | before.keys() - tree(store.parent).keys()
    # The shard that no line names any more is set aside.
    lock = "store/host-00000/writer.lock"  # notes who holds it
    assert changed <= {f"store/{INDEX}", f"store/{SHARD}", f"store/{SHARD}.damaged", lock}


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may be 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("x")


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


ODD = {
    "pipe": make_pipe,
    "socket": make_socket,
    "folder": make_folder,
    "zero": link_to("/dev/zero"),
    "loop": link_to_itself,
    "nowhere": link_to("nothing"),
    "copy": lambda path: path.symlink_to(aside(path)),
}


def aside(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "store").parent / "aside"


def replace_by(odd: str, path: Path) -> None:
    path.rename(aside(path))
    ODD[odd](path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["manifest.json", INDEX])
def test_a_manifest_or_an_index_that_is_no_file_is_named_and_not_waited_for(store: Path, name: str, odd: str):
    replace_by(odd, store / name)
    for act in (
        lambda: ActivationStore(store),
        lambda: ActivationWriter(store, SETTINGS, provenance={}),
        lambda: repair_store(store) if name == INDEX else ActivationStore(store),
    ):
        with pytest.raises(StoreError, match=f"{name} is a.*, which a store never has there: move it away"):
            act()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("odd", ODD)
def test_a_shard_that_is_no_file_is_a_finding_and_made_again(store: Path, odd: str):
    replace_by(odd, store / SHARD)
    before = aside(store / SHARD).read_bytes()
    opened = ActivationStore(store)
    with pytest.raises(StoreError, match="which a store never has there"):
        list(opened.iterate(11))
    with pytest.raises(StoreError, match=f"{SHARD} is a"):
        ShuffledBatches(opened, 11, 8)
    (finding,) = verify_store(opened)
    assert finding.startswith(f"{SHARD}: is a")
    with ActivationWriter(store, SETTINGS, provenance={}) as writer:
        assert writer.dropped[0].startswith(f"{SHARD}: the shard is a")
        writer.submit(batch("a", "bb"))
    assert list(verify_store(ActivationStore(store))) == []
    assert aside(store / SHARD).read_bytes() == before


def test_a_host_folder_that_is_a_link_is_refused_by_everybody(store: Path):
    replace_by("copy", store / "host-00000")
    before = tree(aside(store / SHARD))
    for act in (
        lambda: ActivationStore(store),
        lambda: ActivationWriter(store, SETTINGS, provenance={}),
        lambda: ActivationWriter(store, SETTINGS, host_index=1, provenance={}),
        lambda: repair_store(store),
    ):
        with pytest.raises(StoreError, match="host-00000 is a symbolic link, which a store never has there"):
            act()
    assert tree(aside(store / SHARD)) == before


def test_an_index_folder_that_is_a_link_is_refused(store: Path):
    (store.parent / "aside").mkdir()
    shutil.copy(store / INDEX, store.parent / "aside" / "000000.jsonl")
    (store / "host-00000" / "index").symlink_to(store.parent / "aside")
    with pytest.raises(StoreError, match="index is a symbolic link"):
        ActivationStore(store)


@pytest.mark.parametrize("odd", ["pipe", "zero", "copy", "folder", "nowhere"])
def test_a_lock_that_is_no_file_is_refused_and_not_followed(store: Path, odd: str):
    (store / "host-00000" / "writer.lock").write_text("mine")
    replace_by(odd, store / "host-00000" / "writer.lock")
    for act in (lambda: ActivationWriter(store, SETTINGS, provenance={}), lambda: repair_store(store)):
        with pytest.raises(StoreError, match=r"writer\.lock is a"):
            act()
    assert aside(store / SHARD).read_text() == "mine"
    assert not (store / "host-00000" / "nothing").exists()


def test_a_temporary_file_that_is_a_link_is_removed_and_not_followed(store: Path):
    victim = store.parent / "victim.txt"
    victim.write_text("mine")
    for name in ("shard-000002.safetensors.tmp", "index.jsonl.tmp"):
        (store / "host-00000" / name).symlink_to(victim)
    (store / "host-00000" / "folder.tmp").mkdir()
    with ActivationWriter(store, SETTINGS, provenance={}) as writer:
        writer.submit(batch("dddd"))
    assert victim.read_text() == "mine"
    assert list(verify_store(ActivationStore(store))) == []


def test_a_link_to_a_whole_store_is_followed(store: Path):
    (store.parent / "link").symlink_to(store)
    assert list(verify_store(ActivationStore(store.parent / "link"))) == []
    with ActivationWriter(store.parent / "link", SETTINGS, provenance={}) as writer:
        writer.submit(batch("dddd"))
    assert len(ActivationStore(store)) == 8


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["manifest.json", INDEX, SHARD])
def test_a_file_of_a_terabyte_of_nothing_takes_no_time(store: Path, name: str):
    os.truncate(store / name, 1 << 40)
    assert sentences(problems(store))


def test_a_shard_that_may_not_be_read_is_a_finding_and_the_next_one_is_checked(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    os.truncate(store / "host-00000" / "shard-000001.safetensors", 3000)
    real = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(SHARD):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    first, second = verify_store(ActivationStore(store))
    assert first == f"{SHARD}: cannot be read (Permission denied)"
    assert second.startswith("host-00000/shard-000001.safetensors: has 3000 bytes")
