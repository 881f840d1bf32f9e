"""What was written into a model lies in the store, named by the manifest, and is checked like the rest."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from activation_fakes import SETTINGS, batch, read_index, sequence, settings, write_index

from activation_store import (
    ActivationStore,
    ActivationWriter,
    StoreError,
    StoreSettings,
    repair_store,
    sequence_key,
    verify_store,
)
from activation_store import interventions as interventions_module
from activation_store.dataset_check import verify_coverage, verify_prompts
from activation_store.format import INTERVENTIONS
from activation_store.interventions import interventions_sha256
from activation_store.verify import store_notes

DATA = safetensors.numpy.save({"0.vector": np.ones(16, np.float32)}, {"interventions": "[]"})
OTHER = safetensors.numpy.save({"0.vector": np.zeros(16, np.float32)})
STEERED = settings(interventions=interventions_sha256(DATA))


def write(
    directory: Path, *tasks: str, of: StoreSettings = STEERED, data: bytes | None = DATA, host: int = 0
):
    with ActivationWriter(directory, of, provenance={}, host_index=host, interventions=data) as writer:
        writer.submit(batch(*tasks, of=of))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write(tmp_path / "store", "a", "bb")
    return tmp_path / "store"


def test_interventions_are_in_the_manifest_and_in_every_key(store: Path):
    opened = ActivationStore(store)
    assert opened.settings == STEERED
    assert STEERED.interventions == hashlib.sha256(DATA).hexdigest()
    assert json.loads((store / "manifest.json").read_text())["settings"]["interventions"] == (
        STEERED.interventions
    )
    identity = sequence("a").id
    other = dataclasses.replace(STEERED, interventions=interventions_sha256(OTHER))
    assert len({sequence_key(of, identity) for of in (SETTINGS, STEERED, other)}) == 3


def test_the_file_comes_back_as_it_was_and_the_store_is_sound(store: Path):
    opened = ActivationStore(store)
    assert opened.interventions() == DATA
    assert list(verify_store(opened)) == []
    assert list(store_notes(opened)) == []
    assert not list(store.rglob("*.tmp"))


def test_a_store_without_interventions_has_no_such_file(tmp_path: Path):
    write(tmp_path, "a", of=SETTINGS, data=None)
    store = ActivationStore(tmp_path)
    assert store.interventions() is None
    assert not (tmp_path / INTERVENTIONS).exists()
    (tmp_path / INTERVENTIONS).write_bytes(DATA)
    assert list(store_notes(store)) == [f"not part of the store: {INTERVENTIONS}"]


def test_a_remote_store_has_it_too():
    url = "memory://steered"
    with ActivationWriter(url, STEERED, provenance={}, interventions=DATA) as writer:
        writer.submit(batch("a"))
    store = ActivationStore(url)
    assert store.interventions() == DATA
    assert list(verify_store(store)) == []


def test_a_run_that_continues_needs_the_same_interventions(store: Path):
    write(store, "ccc", data=None)
    write(store, "dddd", host=1)
    assert len(ActivationStore(store)) == 8
    for of, data in ((SETTINGS, None), (settings(interventions=interventions_sha256(OTHER)), OTHER)):
        with pytest.raises(StoreError, match=r"interventions is .* there and .* here"):
            write(store, "e", of=of, data=data)


@pytest.mark.parametrize(
    ("of", "data", "message"),
    [
        (STEERED, None, "is missing"),
        (STEERED, OTHER, "not those that the settings name"),
        (SETTINGS, DATA, "not those that the settings name"),
        (STEERED, b"", "are a file of 1 to"),
    ],
)
def test_interventions_that_are_not_those_of_the_settings_are_refused(
    tmp_path: Path, of: StoreSettings, data: bytes | None, message: str
):
    with pytest.raises(StoreError, match=message):
        write(tmp_path, "a", of=of, data=data)
    assert not (tmp_path / "manifest.json").exists()


def test_what_a_run_left_that_never_wrote_its_manifest_is_taken_or_refused(tmp_path: Path):
    (tmp_path / INTERVENTIONS).write_bytes(OTHER)
    with pytest.raises(StoreError, match="of another run: remove it or choose another directory"):
        write(tmp_path, "a")
    assert (tmp_path / INTERVENTIONS).read_bytes() == OTHER
    (tmp_path / INTERVENTIONS).write_bytes(DATA)
    write(tmp_path, "a")
    assert list(verify_store(ActivationStore(tmp_path))) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "is missing: a run that continues the store"),
        (flip, "is not the file that the manifest names"),
        (lambda path: path.write_bytes(OTHER), "is not the file that the manifest names"),
        (lambda path: path.write_bytes(b""), "is not the file that the manifest names"),
        (link, "is a symbolic link"),
        (pipe, "is a named pipe"),
        (folder, "is a folder"),
    ],
)
def test_a_file_that_is_lost_or_changed_is_found_and_never_used(
    store: Path, spoil: Callable[[Path], None], message: str
):
    spoil(store / INTERVENTIONS)
    opened = ActivationStore(store)
    with pytest.raises(StoreError, match=message):
        opened.interventions()
    (found,) = verify_store(opened)
    assert message in found
    assert "\n" not in found
    assert repair_store(store) == []  # it is no sequence's fault: none is dropped
    assert len(ActivationStore(store)) == 4
    with pytest.raises(StoreError, match=message):
        write(store, "ccc", data=None)


@pytest.mark.parametrize("spoil", [Path.unlink, flip, link])
def test_the_next_run_writes_a_file_again_that_was_lost(store: Path, spoil: Callable[[Path], None]):
    spoil(store / INTERVENTIONS)
    write(store, "ccc")
    assert ActivationStore(store).interventions() == DATA
    assert not (store / INTERVENTIONS).is_symlink()


def test_a_file_that_is_too_large_is_refused_before_it_is_read_whole(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(interventions_module, "MOST_BYTES", len(DATA) - 1)
    with pytest.raises(StoreError, match="not the file that the manifest names"):
        ActivationStore(store).interventions()
    with pytest.raises(StoreError, match="name fewer layers or positions"):
        interventions_sha256(DATA)


def test_strengths_of_one_sequence_make_another_of_it(tmp_path: Path):
    """A sweep: one prompt and sample, steered in several ways."""
    sweep = [(), (0.0,), (1.5,), (np.float32(0.1),)]
    made = [
        dataclasses.replace(one, id=dataclasses.replace(one.id, strengths=strengths))
        for one in [sequence("a", of=STEERED)]
        for strengths in sweep
    ]
    with ActivationWriter(tmp_path, STEERED, provenance={}, interventions=DATA) as writer:
        writer.submit(made)
    store = ActivationStore(tmp_path)
    assert [record.strengths for record in store] == [(), (0.0,), (1.5,), (float(np.float32(0.1)),)]
    assert len({record.key for record in store}) == len(sweep)
    assert list(verify_store(store)) == []
    assert list(verify_coverage(store, [("a", 0)])) == []
    assert list(verify_prompts(store)) == []
    lines = read_index(tmp_path)
    assert "strengths" not in lines[0]
    write_index(tmp_path, [lines[0], lines[1] | {"strengths": [0.5]}, *lines[2:]])
    (found,) = verify_store(ActivationStore(tmp_path))
    assert "its key is not that of its task, prompt and settings" in found


@pytest.mark.parametrize("strengths", [(np.nan,), ("1",), (1.0,) * 1025, (True,)])
def test_strengths_that_no_sequence_can_have_are_refused(strengths: tuple[float, ...]):
    identity = dataclasses.replace(sequence("a").id, strengths=strengths)
    with pytest.raises(StoreError, match="a sequence cannot be stored as"):
        sequence_key(STEERED, identity)


def test_strengths_of_nothing_are_refused(tmp_path: Path):
    one = sequence("a")
    one = dataclasses.replace(one, id=dataclasses.replace(one.id, strengths=(1.0,)))
    with (
        pytest.raises(StoreError, match="the store has no interventions"),
        ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer,
    ):
        writer.submit([one])


def test_rows_of_zeros_are_no_finding_where_something_was_written_into_the_model(tmp_path: Path):
    def zeroed(of: StoreSettings, data: bytes | None, name: str) -> list[str]:
        made = batch("a", of=of)
        for one in made:
            assert one.rows is not None
            one.rows[1, 2] = 0
        with ActivationWriter(tmp_path / name, of, provenance={}, interventions=data) as writer:
            writer.submit(made)
        return list(verify_store(ActivationStore(tmp_path / name)))

    assert len(zeroed(SETTINGS, None, "plain")) == 1
    assert zeroed(STEERED, DATA, "steered") == []
