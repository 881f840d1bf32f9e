"""Whatever is damaged: repair drops it and nothing else, and a run makes it again to the same bytes."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from activation_fakes import SETTINGS, batch, read_index, rewrite, write_index

from activation_store import (
    ActivationStore,
    ActivationWriter,
    StoreError,
    hook_name,
    local_files,
    repair_store,
    sequence_key,
    verify_store,
)
from activation_store.checked_json import seal
from activation_store.verify import store_notes

TASKS = ("a", "bb", "ccc")
HOST = "host-00000"
HOOK = hook_name(11)


def work(directory: Path, host: int = 0) -> ActivationWriter:
    """What a runner does: everything that is not committed, one batch of two tasks and one of one."""
    with ActivationWriter(
        directory, SETTINGS, host_index=host, provenance={"jax": "1"}, numerics={"platform": "cpu"}
    ) as writer:
        for tasks in (TASKS[:2], TASKS[2:]):
            todo = [one for one in batch(*tasks) if sequence_key(SETTINGS, one.id) not in writer.committed]
            writer.submit(todo)
    return writer


def digests(directory: Path) -> dict[str, str]:
    store = ActivationStore(directory)
    return {record.key: store.sequence_digest(record) for record in store.sequences()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an uninterrupted run. Not to be changed."""
    directory = tmp_path_factory.mktemp("whole")
    work(directory)
    return directory


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "store")  # with the time stamps
    return tmp_path / "store"


def flip(path: Path, place: int, bit: int) -> None:
    """Changes a bit and leaves the time stamp as it was, as a failing disk does."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def assert_made_again(directory: Path, whole: Path, lost: int) -> None:
    """After a repair that has lost so many sequences."""
    kept = digests(directory)
    assert kept.items() <= digests(whole).items()
    assert len(kept) == 6 - lost
    assert list(verify_store(ActivationStore(directory))) == []
    assert work(directory).sequences_written == lost
    assert digests(directory) == digests(whole)
    assert list(verify_store(ActivationStore(directory))) == []


# --- Single bits --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whichever_byte_of_an_index_changes_one_line_is_dropped(tmp_path: Path):
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit(batch("a"))
    index, shard = (tmp_path / HOST / name for name in ("index.jsonl", "shard-000000.safetensors"))
    text, rows = index.read_bytes(), shard.read_bytes()
    expected = digests(tmp_path)
    for place in range(len(text)):
        index.write_bytes(text)
        flip(index, place, place % 8)
        assert list(verify_store(ActivationStore(tmp_path))), place
        repair_store(tmp_path)
        assert list(verify_store(ActivationStore(tmp_path))) == [], place
        kept = digests(tmp_path)
        assert kept.items() <= expected.items()
        joins_two_lines = text[place : place + 1] == b"\n" and place < len(text) - 1
        assert len(kept) == 2 - 1 - joins_two_lines, place
        if not kept:
            shard.write_bytes(rows)  # it was set aside


@pytest.mark.parametrize("share", [0.0, 0.03, 0.31, 0.5, 0.77, 0.93, 0.999])
def test_a_byte_of_an_index_costs_the_sequence_of_its_line(store: Path, whole: Path, share: float):
    index = store / HOST / "index.jsonl"
    flip(index, int(share * index.stat().st_size), 0)
    assert list(verify_store(ActivationStore(store)))
    repair_store(store)
    assert_made_again(store, whole, 1)


def test_whichever_byte_of_a_shard_changes_its_sequences_are_dropped(store: Path, whole: Path):
    shard = store / HOST / "shard-000000.safetensors"
    for number, place in enumerate(np.linspace(0, shard.stat().st_size - 1, 12).astype(int)):
        shutil.rmtree(store)
        shutil.copytree(whole, store)
        flip(shard, int(place), number % 8)
        (finding,) = verify_store(ActivationStore(store))
        assert (
            finding
            == f"{HOST}/shard-000000.safetensors: its bytes are not those that were written (checksum)"
        )
        assert repair_store(store) == [finding]
        assert shard.with_name(f"{shard.name}.damaged").exists()  # set aside, not deleted
        assert_made_again(store, whole, 4)


@pytest.mark.parametrize("name", ["manifest.json", "host-00000.json"])
def test_a_byte_of_a_small_file_costs_no_sequence(store: Path, whole: Path, name: str):
    path = store / name
    data = path.read_bytes()
    refused = 0
    for place in range(0, len(data), 23):
        path.write_bytes(data)
        flip(path, place, place % 8)
        try:
            found = list(verify_store(ActivationStore(store)))
            repair_store(store)
        except StoreError:  # it cannot be read any more, or its settings have changed
            refused += 1
        else:
            assert all(name.removesuffix(".json") in finding for finding in found)
            assert list(verify_store(ActivationStore(store))) == []
        assert len(read_index(store)) == 6
    path.write_bytes(data)
    assert_made_again(store, whole, 0)
    assert (refused > 0) == (name == "manifest.json")


# --- Index lines that say something wrong, with a checksum that fits ----------------------------------------


@pytest.mark.parametrize("place", [1, 4])
@pytest.mark.parametrize(
    "change",
    [
        {"row_start": 1},
        {"n_rows": 3},
        {"n_rows": 10**6},
        {"prompt_start": 1},
        {"prompt_length": 2},
        {"generated_length": 1},
        {"task_id": "other"},
        {"test_index": 7},
        {"sample_index": 4},
        {"augmentation": "flip"},
        {"seed": 8},
        {"finish_reason": "failed"},
        {"shard_bytes": 5},
        {"shard_sha256": "0" * 64},
        {"shard_sequences": 9},
        {"shard": "shard-000007.safetensors"},
        {"key": "0" * 32},
        {"numerics": 5},
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else str(change),
)
def test_a_line_that_says_something_wrong_is_dropped_alone(store: Path, place: int, change: dict[str, Any]):
    lines = read_index(store)
    key = lines[place]["key"]
    lines[place] |= change
    write_index(store, lines)
    before = {line["key"] for line in lines}
    assert list(verify_store(ActivationStore(store)))
    repair_store(store)
    assert list(verify_store(ActivationStore(store))) == []
    gone = before - {line["key"] for line in read_index(store)}
    # Of two lines that disagree in how many there are nobody knows which is right, but for what is there.
    assert gone <= {lines[place]["key"], key}
    assert len(read_index(store)) == 5
    assert work(store).sequences_written == 1


def test_equal_prompts_do_not_hide_a_line_that_names_the_other_ones_tokens(store: Path, whole: Path):
    """Samples 0 and 1 of a task have one prompt, stored twice."""
    lines = read_index(store)
    assert lines[0]["task_id"] == lines[1]["task_id"]
    lines[1]["prompt_start"] = lines[0]["prompt_start"]
    write_index(store, lines)
    (finding,) = repair_store(store)
    assert "its prompt tokens begin at 4, not at 0" in finding
    assert_made_again(store, whole, 1)


# --- Shards whose checksum fits -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, 9])
def test_rows_that_are_wrong_cost_their_sequence_alone(store: Path, whole: Path, value: float):
    last = read_index(store)[3]
    row = last["row_start"] + 1

    def plant(tensors: dict[str, np.ndarray]) -> None:
        tensors[HOOK][row] = value

    rewrite(store, plant)
    assert f"{HOOK}: " in repair_store(store)[0]
    assert last["key"] not in digests(store)
    assert len(digests(store)) == 5
    assert list(verify_store(ActivationStore(store))) == []
    assert work(store).sequences_written == 1


def test_wrong_statistics_cost_the_shard(store: Path, whole: Path):
    def plant(tensors: dict[str, np.ndarray]) -> None:
        tensors["statistics.generated.mean"][1, 0] = 9

    rewrite(store, plant)
    (finding,) = repair_store(store)
    assert "the generated rows do not have the statistics" in finding
    assert_made_again(store, whole, 4)


def test_statistics_of_a_shard_with_dropped_sequences_are_of_the_others(store: Path):
    write_index(store, read_index(store)[1:])
    repair_store(store)
    there = ActivationStore(store)
    for group, kept in (("generated", lambda c: c.is_generated), ("prompt", lambda c: ~c.is_generated)):
        rows = np.concatenate([d[kept(c)].astype(np.float64) for d, c, _ in there.iterate(11)])
        statistics = there.statistics(11, group)
        assert statistics.count == len(rows)
        np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(statistics.mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-5)


# --- Files that are gone ------------------------------------------------------------------------------------


def remove_index(store: Path) -> int:
    (store / HOST / "index.jsonl").unlink()
    return 6


def empty_index(store: Path) -> int:
    (store / HOST / "index.jsonl").write_bytes(b"")
    return 6


def remove_host(store: Path) -> int:
    shutil.rmtree(store / HOST)
    return 6


def empty_host(store: Path) -> int:
    for path in (store / HOST).iterdir():
        path.unlink()
    return 6


def remove_lines_of_the_last_commit(store: Path) -> int:
    write_index(store, read_index(store)[:4])
    return 2


def remove_lines_of_the_first_commit(store: Path) -> int:
    write_index(store, read_index(store)[4:])
    return 4


def remove_one_line(store: Path) -> int:
    write_index(store, [line for number, line in enumerate(read_index(store)) if number != 2])
    return 1


def remove_shard(store: Path) -> int:
    (store / HOST / "shard-000000.safetensors").unlink()
    return 4


def exchange_shards(store: Path) -> int:
    first, second = (store / HOST / f"shard-00000{number}.safetensors" for number in (0, 1))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    return 6


def empty_shard(store: Path) -> int:
    (store / HOST / "shard-000001.safetensors").write_bytes(b"")
    return 2


@pytest.mark.parametrize(
    "loss",
    [
        remove_index,
        empty_index,
        remove_host,
        empty_host,
        remove_lines_of_the_last_commit,
        remove_lines_of_the_first_commit,
        remove_one_line,
        remove_shard,
        exchange_shards,
        empty_shard,
    ],
)
def test_what_is_gone_is_found_and_made_again(store: Path, whole: Path, loss: Callable[[Path], int]):
    lost = loss(store)
    found = list(verify_store(ActivationStore(store)))
    assert found
    assert all(HOST in finding for finding in found)
    assert repair_store(store) == found
    assert_made_again(store, whole, lost)


def test_a_host_file_that_is_gone_costs_what_it_said_and_no_sequence(store: Path, whole: Path):
    (store / "host-00000.json").unlink()
    (finding,) = verify_store(ActivationStore(store))
    assert finding.startswith("host-00000: no host's file says what its numerics ")
    assert repair_store(store) == [finding]
    (note,) = store_notes(ActivationStore(store))
    assert "is not known any more" in note
    assert_made_again(store, whole, 0)


def test_what_another_host_knows_of_the_numerics_is_kept(store: Path):
    with ActivationWriter(
        store, SETTINGS, host_index=4, provenance={}, numerics={"platform": "cpu"}
    ) as writer:
        writer.submit(batch("dddd"))
    expected = json.loads((store / "host-00000.json").read_text())
    (store / "host-00000.json").write_text("{}")
    (finding,) = repair_store(store)
    assert finding.startswith("host-00000.json is damaged: ")
    assert json.loads((store / "host-00000.json").read_text()) == expected
    assert list(store_notes(ActivationStore(store))) == []


def test_a_shard_that_a_run_is_just_committing_is_no_finding(store: Path):
    with ActivationWriter(store, SETTINGS, provenance={}) as writer:
        (store / HOST / "shard-000002.safetensors").write_bytes(b"on its way")
        with (store / HOST / "index.jsonl").open("ab") as file:
            file.write(b'{"key":"half')
        assert list(verify_store(ActivationStore(store))) == []
        (store / HOST / "shard-000003.safetensors").write_bytes(b"")
        (finding,) = verify_store(ActivationStore(store))
        assert "shard-000002" in finding
    assert writer.sequences_written == 0
    assert len(list(verify_store(ActivationStore(store)))) == 3


def test_the_shard_of_an_interrupted_commit_is_a_finding_until_the_next_start(store: Path, whole: Path):
    """It cannot be told from lines that were lost."""
    write_index(store, read_index(store)[:4])
    (finding,) = verify_store(ActivationStore(store))
    problem = "no index line names it: its lines were lost, or a commit was interrupted"
    assert finding == f"{HOST}/shard-000001.safetensors: {problem}"
    with ActivationWriter(store, SETTINGS, provenance={}):
        pass
    assert list(verify_store(ActivationStore(store))) == []
    assert work(store).sequences_written == 2
    assert digests(store) == digests(whole)


def test_names_that_are_nearly_ours_are_found(store: Path, whole: Path):
    names = ["host-7", "host-0000٣", "host-00000 ", "host-00000/shard-7.safetensors", "host-000000.json"]
    for name in names:
        (store / name).mkdir() if name.startswith("host-") and "." not in name else (store / name).touch()
    found = list(verify_store(ActivationStore(store)))
    assert sorted(found) == sorted(
        f"{name}: not a name that this program gives; nothing reads it" for name in names
    )
    repair_store(store)
    assert all((store / f"{name}.damaged").exists() for name in names)
    assert_made_again(store, whole, 0)


# --- The manifest -------------------------------------------------------------------------------------------


def change_manifest(store: Path, change: Callable[[dict[str, Any]], Any], *, sealed: bool = False) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest)
    if sealed:
        del manifest["checksum"]
        manifest = seal(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))


def test_a_changed_provenance_is_a_finding_a_warning_and_no_reason_not_to_read(
    store: Path, whole: Path, caplog: pytest.LogCaptureFixture
):
    change_manifest(store, lambda manifest: manifest["provenance"].update(jax="2"))
    assert digests(store) == digests(whole)
    problem = "its checksum does not fit: something in it has changed"
    assert caplog.messages == [f"{store}/manifest.json cannot be relied on: {problem}"]
    assert list(verify_store(ActivationStore(store))) == [f"manifest.json: {problem}"]
    with pytest.raises(StoreError, match=r"manifest\.json cannot be relied on: .* --repair` says"):
        work(store)
    assert repair_store(store) == [f"manifest.json: {problem}"]
    assert ActivationStore(store).provenance == {"jax": "2"}
    assert_made_again(store, whole, 0)


@pytest.mark.parametrize("sealed", [False, True])
def test_settings_that_no_sequence_fits_cost_no_sequence(store: Path, whole: Path, sealed: bool):
    change_manifest(store, lambda manifest: manifest["settings"].update(seed=8), sealed=sealed)
    assert list(verify_store(ActivationStore(store)))
    with pytest.raises(
        StoreError, match=r"no sequence in .* fits the settings in its manifest\.json: restore"
    ):
        repair_store(store)
    shutil.copy(whole / "manifest.json", store)
    assert_made_again(store, whole, 0)


def test_a_store_of_the_first_schema_is_read_and_continued(store: Path, whole: Path):
    """Then it is one of the second, as earlier programs cannot read its new lines."""
    lines = read_index(store)
    for line in lines:
        del line["numerics"]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines[:5])
    (store / HOST / "index.jsonl").write_text(text)
    (store / "host-00000.json").unlink()
    change_manifest(store, lambda manifest: (manifest.update(schema_version=1), manifest.pop("checksum")))
    old = ActivationStore(store)
    assert {record.numerics for record in old.sequences()} == {""}
    assert list(verify_store(old)) == [f"{HOST}/shard-000001.safetensors: 1 of its 2 index lines are there"]
    assert work(store).sequences_written == 1
    assert json.loads((store / "manifest.json").read_text())["schema_version"] == 2
    assert digests(store) == digests(whole)
    assert list(verify_store(ActivationStore(store))) == []


def test_a_store_of_the_first_schema_is_repaired(store: Path, whole: Path):
    lines = read_index(store)
    for line in lines:
        del line["numerics"]
    lines[2]["row_start"] += 1
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (store / HOST / "index.jsonl").write_text(text)
    change_manifest(store, lambda manifest: (manifest.update(schema_version=1), manifest.pop("checksum")))
    assert "its rows are not all marked as sequence 2" in repair_store(store)[0]
    assert_made_again(store, whole, 1)


# --- Several hosts ------------------------------------------------------------------------------------------


def test_nothing_is_changed_while_a_run_writes(store: Path):
    flip(store / HOST / "index.jsonl", 100, 0)
    before = (store / HOST / "index.jsonl").read_bytes()
    with (
        ActivationWriter(store, SETTINGS, host_index=3, provenance={}),
        pytest.raises(StoreError, match="in use"),
    ):
        repair_store(store)
    assert (store / HOST / "index.jsonl").read_bytes() == before
    repair_store(store)  # and no lock is left


def test_a_shard_that_cannot_be_read_is_one_finding_among_others(
    store: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    real = local_files.LocalFiles.open_file

    def failing(self: local_files.LocalFiles, name: str) -> Any:
        if name.endswith("shard-000000.safetensors"):
            raise PermissionError(13, "Permission denied")
        return real(self, name)

    (store / HOST / "shard-000001.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(local_files.LocalFiles, "open_file", failing)
        found = [
            f"{HOST}/shard-000000.safetensors: cannot be read (Permission denied)",
            f"{HOST}/shard-000001.safetensors: missing",
        ]
        assert list(verify_store(ActivationStore(store))) == found
        assert repair_store(store) == found
    assert_made_again(store, whole, 6)


# --- Headers of shards --------------------------------------------------------------------------------------


def only_in_the_metadata(header: dict[str, Any]) -> None:
    header["__metadata__"][HOOK] = header.pop(HOOK)


def statistics_in_the_metadata(header: dict[str, Any]) -> None:
    for name in [name for name in header if name.startswith("statistics.prompt")]:
        header["__metadata__"][name] = header.pop(name)


def all_in_the_metadata(header: dict[str, Any]) -> None:
    metadata = dict(header)
    header.clear()
    header["__metadata__"] = metadata


def two_layers_at_one_place(header: dict[str, Any]) -> None:
    header[HOOK]["data_offsets"] = header[hook_name(10)]["data_offsets"]


def two_columns_at_one_place(header: dict[str, Any]) -> None:
    header["positions"]["data_offsets"] = header["token_ids"]["data_offsets"]


def layers_exchanged(header: dict[str, Any]) -> None:
    header[HOOK], header[hook_name(10)] = header[hook_name(10)], header[HOOK]


@pytest.mark.parametrize(
    "change",
    [
        only_in_the_metadata,
        statistics_in_the_metadata,
        all_in_the_metadata,
        two_layers_at_one_place,
        two_columns_at_one_place,
        layers_exchanged,
    ],
)
def test_a_header_that_names_other_places_is_found_though_its_checksum_fits(
    store: Path, whole: Path, change: Callable[[dict[str, Any]], None]
):
    path = store / HOST / "shard-000000.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    data = len(text).to_bytes(8, "little") + text + data[end:]
    path.write_bytes(data)
    lines = read_index(store)
    for line in lines[:4]:
        line |= {"shard_bytes": len(data), "shard_sha256": hashlib.sha256(data).hexdigest()}
    write_index(store, lines)
    found = list(verify_store(ActivationStore(store)))
    assert found
    assert repair_store(store) == found
    assert_made_again(store, whole, 4)
