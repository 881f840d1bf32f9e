"""Which sequences solved their puzzle: kept, refused in a sentence when damaged, and made anew."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import activation_fakes
import numpy as np
import pytest

from activation_store import ActivationStore, ActivationWriter, StoreError, outcomes, write_outcomes
from activation_store.remote_files import open_files

FIRST, SECOND = "0" * 32, "1" * 32


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with ActivationWriter(tmp_path / "store", activation_fakes.settings(), provenance={}):
        pass
    return tmp_path / "store"


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode())


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**12)


def to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def filled_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").touch()


DAMAGES = {
    "cut off": text('{"0": tr'),
    "empty": text(""),
    "zeros": text("\0" * 100),
    "a list": text("[]"),
    "null": text("null"),
    "other values": text(json.dumps({FIRST: 1})),
    "null values": text(json.dumps({FIRST: None})),
    "nested": text("[" * 100_000),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{"),
    "a folder": filled_folder,
    "a pipe": os.mkfifo,
    "a device": to_device,
    "huge": sparse,
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_damaged_outcomes_are_refused_in_a_sentence_and_made_anew(
    store: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outcomes, "MAX_BYTES", 2**20)
    for kept in (1, 2):  # what was set aside once is in nobody's way
        if (store / "outcomes.json").exists():
            (store / "outcomes.json").unlink()
        DAMAGES[name](store / "outcomes.json")
        with pytest.raises(
            StoreError, match=r"outcomes\.json is damaged; remove it, or run the same command"
        ):
            ActivationStore(store).outcomes()
        with pytest.raises(StoreError, match="is damaged"):
            list(ActivationStore(store).sequences(solved=True))
        assert list(ActivationStore(store).sequences()) == []
        write_outcomes(store, {FIRST: True})
        assert ActivationStore(store).outcomes() == {FIRST: True}
        assert len(list(store.glob("outcomes.json.damaged*"))) == kept
    assert "outcomes.json was damaged; it is made anew" in caplog.text


def test_a_link_is_not_written_through(store: Path, tmp_path: Path):
    victim = tmp_path / "victim.json"
    victim.write_text(json.dumps({SECOND: True}))
    (store / "outcomes.json").symlink_to(victim)
    write_outcomes(store, {FIRST: False})
    assert ActivationStore(store).outcomes() == {FIRST: False}
    assert json.loads(victim.read_text()) == {SECOND: True}


def test_earlier_outcomes_of_other_keys_are_kept(store: Path):
    write_outcomes(store, {FIRST: True, SECOND: True})
    write_outcomes(store, {FIRST: False})
    assert ActivationStore(store).outcomes() == {FIRST: False, SECOND: True}


def test_damaged_outcomes_behind_a_url_are_made_anew(store: Path):
    url = "memory://outcomes"
    files = open_files(url)
    files.create(0, "manifest.json", (store / "manifest.json").read_bytes())
    files.replace("outcomes.json", b"[1")
    with pytest.raises(StoreError, match=r"memory://outcomes/outcomes\.json is damaged"):
        ActivationStore(url).outcomes()
    write_outcomes(url, {FIRST: True})
    assert ActivationStore(url).outcomes() == {FIRST: True}


def test_outcomes_of_what_is_no_store_are_refused(store: Path):
    shutil.rmtree(store)
    store.mkdir()
    with pytest.raises(StoreError, match=r"is not an activation store: it has no manifest\.json"):
        write_outcomes(store, {FIRST: True})
    assert list(store.iterdir()) == []


def test_true_and_false_of_numpy_are_as_good(store: Path):
    write_outcomes(store, {FIRST: np.True_, SECOND: np.False_})  # type: ignore[dict-item]
    assert ActivationStore(store).outcomes() == {FIRST: True, SECOND: False}
    assert not list(store.glob("outcomes.json.damaged*"))


@pytest.mark.parametrize("given", [{FIRST: 1}, {FIRST: None}, {FIRST: "True"}, {1: True}, [FIRST], None])
def test_what_is_no_outcome_is_refused_before_anything_is_touched(store: Path, given: Any):
    (store / "outcomes.json").write_text("[]")  # damaged
    with pytest.raises(StoreError, match=r"must be True or False|is no key|\{key: True or False\}"):
        write_outcomes(store, given)
    assert (store / "outcomes.json").read_text() == "[]"
    assert not list(store.glob("outcomes.json.damaged*"))


def test_sequences_take_true_and_false_of_numpy_and_nothing_else(store: Path):
    with ActivationWriter(store, activation_fakes.settings(), provenance={}) as writer:
        writer.submit(activation_fakes.batch("a"))
    opened: Any = ActivationStore(store)
    right, wrong = (record.key for record in opened)
    write_outcomes(store, {right: True, wrong: False})
    assert [record.key for record in opened.sequences(solved=np.True_)] == [right]
    assert [record.key for record in opened.sequences(solved=np.False_, failed=np.False_)] == [wrong]
    assert list(opened.sequences(failed=np.True_)) == []
    for other in ({"solved": 1}, {"solved": "0"}, {"failed": "0"}, {"failed": 0}, {"failed": None}):
        with pytest.raises(StoreError, match="must be True or False, not"):
            list(opened.sequences(**other))
