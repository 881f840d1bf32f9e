"""Every kind of damage is planted and found; what is sound has no finding."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from activation_fakes import EOS, SETTINGS, batch, read_index, rewrite, sequence, settings, write_index

from activation_store import (
    ActivationStore,
    ActivationWriter,
    StoreSettings,
    hook_name,
    verify_coverage,
    verify_store,
)
from activation_store.verify import store_notes

Item = TypeVar("Item")
SHARD = "host-00000/shard-000000.safetensors"
TASKS = ("a", "bb")


def make(directory: Path, of: StoreSettings = SETTINGS) -> None:
    with ActivationWriter(directory, of, provenance={}) as writer:
        writer.submit(batch(*TASKS, of=of))
        writer.submit(batch("ccc", of=of))


def findings(directory: Path) -> list[str]:
    return list(verify_store(ActivationStore(directory)))


@pytest.mark.parametrize(
    "of",
    [
        SETTINGS,
        settings(capture_prompt=False),
        settings(dtype="float32"),
        settings(dtype="float16"),
        settings(hook_names=()),
    ],
)
def test_a_sound_store_has_no_findings(tmp_path: Path, of: StoreSettings):
    make(tmp_path, of)
    assert findings(tmp_path) == []
    assert list(store_notes(ActivationStore(tmp_path))) == []


def test_a_shard_that_is_rewritten_as_it_was_has_no_findings(tmp_path: Path):
    """The damage below is what is found, not the rewriting."""
    make(tmp_path)
    rewrite(tmp_path, lambda tensors: None)
    assert findings(tmp_path) == []


# --- Files and index ------------------------------------------------------------------------------------


def test_a_shard_that_is_missing_cut_or_changed_is_one_finding(tmp_path: Path):
    make(tmp_path)
    path = tmp_path / SHARD
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert findings(tmp_path) == [f"{SHARD}: has {len(data) - 1} bytes, {len(data)} were written"]
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert findings(tmp_path) == [f"{SHARD}: its bytes are not those that were written (checksum)"]
    path.unlink()
    assert findings(tmp_path) == [f"{SHARD}: missing"]


def test_every_single_flipped_bit_is_found(tmp_path: Path):
    make(tmp_path)
    path = tmp_path / SHARD
    data = path.read_bytes()
    for place in np.linspace(0, len(data) - 1, 25).astype(int):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        assert len(findings(tmp_path)) == 1, place


def test_a_torn_line_and_a_line_that_is_none_are_found(tmp_path: Path):
    make(tmp_path)
    index = tmp_path / "host-00000" / "index.jsonl"
    text = index.read_bytes()
    index.write_bytes(text[:-50])
    assert any("torn, " in line for line in findings(tmp_path))
    index.write_bytes(text.replace(b'"key"', b'"kex"', 1))
    assert any("line 1: not an index line" in line for line in findings(tmp_path))


def test_a_sequence_in_two_places_is_found(tmp_path: Path):
    make(tmp_path)
    with ActivationWriter(tmp_path / "other", SETTINGS, host_index=1, provenance={}) as writer:
        writer.submit(batch("a"))
    (tmp_path / "other" / "host-00001").rename(tmp_path / "host-00001")
    found = findings(tmp_path)
    assert len(found) == 2
    assert all("occurs twice" in line and "host-00001" in line for line in found)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"row_start": -1}, "row_start: expected int >= 0"),
        ({"n_rows": "7"}, "n_rows: expected int, got str"),
        ({"task_id": None}, "task_id: expected str, got null"),
        ({"finish_reason": "done"}, "finish_reason: a text of another form"),
        ({"finish_reason": "failed"}, "a failed sequence has no shard, has no rows and says why"),
        ({"failure": "broke"}, "a sequence that has not failed has a shard and its checksum, and no failure"),
    ],
)
def test_an_index_line_with_an_impossible_value_is_found(
    tmp_path: Path, change: dict[str, Any], finding: str
):
    make(tmp_path)
    lines = read_index(tmp_path)
    lines[-1] |= change
    write_index(tmp_path, lines)
    assert any(finding in line for line in findings(tmp_path))


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"row_start": 1}, "its rows are not all marked as sequence 0 of the shard, or not all of that"),
        ({"n_rows": 3}, "rows for"),
        ({"prompt_start": 1}, "its key is not that of its task, prompt and settings"),
        ({"prompt_length": 2}, "8 rows for 2 prompt and 4 generated tokens"),
        ({"generated_length": 1}, "8 rows for 4 prompt and 1 generated tokens"),
        ({"task_id": "other"}, "its key is not that of its task"),
        ({"test_index": 1}, "its key is not that of its task"),
        ({"sample_index": 4}, "its key is not that of its task"),
        ({"augmentation": "flip"}, "its key is not that of its task"),
        ({"seed": 8}, "its key is not that of its task"),
        ({"finish_reason": "length"}, "finish_reason is length, the last token is 5"),
        ({"shard_bytes": 5}, "its rows do not fit into a shard of 5 bytes"),
        ({"shard_bytes": 5000}, "different sizes"),
        ({"shard_sequences": 9}, "different sizes, checksums or sequence counts"),
    ],
)
def test_an_index_line_that_does_not_fit_its_shard_is_found(
    tmp_path: Path, change: dict[str, Any], finding: str
):
    make(tmp_path)
    lines = read_index(tmp_path)
    assert lines[0]["finish_reason"] == "stop"
    lines[0] |= change
    write_index(tmp_path, lines)
    assert any(finding in line for line in findings(tmp_path)), findings(tmp_path)


def test_index_lines_that_are_missing_from_a_shard_are_found(tmp_path: Path):
    make(tmp_path)
    write_index(tmp_path, read_index(tmp_path)[1:])
    assert any("3 of its 4 index lines are there" in line for line in findings(tmp_path))


# --- Tensors --------------------------------------------------------------------------------------------

HOOK = hook_name(11)


def planted(name: str, place: Any, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][place] = value

    return change


def replaced(
    name: str, make_it: Callable[[np.ndarray], np.ndarray]
) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = make_it(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (planted(HOOK, (5, 3), np.nan), f"{HOOK}: row 5 is not finite"),
        (planted(HOOK, (5, 3), np.inf), f"{HOOK}: row 5 is not finite"),
        (planted(HOOK, 5, 0), f"{HOOK}: row 5 is all zero"),
        (planted(HOOK, (5, 3), 9), f"{HOOK}: the rows do not have the norms"),
        (planted("norms", (1, 5), 0.5), f"{HOOK}: the rows do not have the norms"),
        (replaced(HOOK, lambda rows: rows[::-1]), f"{HOOK}: the rows do not have the norms"),
        (replaced(HOOK, lambda rows: -rows), f"{HOOK}: the generated rows do not have the statistics"),
        (planted("statistics.prompt.mean", (1, 0), 9), f"{HOOK}: the prompt rows do not have the statistics"),
        (planted("positions", 3, 77), "its positions do not count up from the prompt's"),
        (replaced("positions", lambda p: p + 1), "its positions do not count up from the prompt's"),
        (planted("sequence_index", 3, 1), "its rows are not all marked as sequence 0"),
        (planted("is_generated", 0, 1), "is_generated does not begin where the prompt ends"),
        (planted("token_ids", 1, 499), "the tokens of its prompt rows are not its prompt"),
        (planted("token_ids", 6, EOS), "rows after the end: token"),
        (planted("prompt_token_ids", 0, 499), "its key is not that of its task, prompt and settings"),
        (planted("logprobs", 0, -1.0), "log-probabilities must be NaN on prompt rows"),
        (planted("logprobs", 6, np.nan), "log-probabilities must be NaN on prompt rows and finite"),
        (planted("logprobs", 6, 0.5), "a log-probability is above 0"),
        (
            replaced(HOOK, lambda rows: rows[:, :8]),
            f"tensor {HOOK} is BF16 (41, 8), expected BF16 (41, 16)",
        ),
        (replaced(HOOK, lambda rows: rows.astype(np.float32)), f"tensor {HOOK} is F32"),
        (lambda tensors: tensors.pop(HOOK), f"tensor {HOOK} is missing"),
        (lambda tensors: tensors.pop("norms"), "tensor norms is missing"),
        (lambda tensors: tensors.pop("prompt_token_ids"), "tensor prompt_token_ids is missing"),
        (lambda tensors: tensors.update(extra=np.zeros(3, np.float32)), "tensor 'extra' does not belong"),
    ],
)
def test_a_tensor_that_is_not_right_is_found_though_its_checksum_fits(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], finding: str
):
    make(tmp_path)
    rewrite(tmp_path, change)
    found = findings(tmp_path)
    assert any(finding in line for line in found), found


def test_a_file_that_is_no_shard_is_found_though_its_checksum_fits(tmp_path: Path):
    make(tmp_path)
    data = b"\xff" * 2000
    (tmp_path / SHARD).write_bytes(data)
    lines = read_index(tmp_path)
    for line in lines[:4]:
        line |= {"shard_bytes": 2000, "shard_sha256": hashlib.sha256(data).hexdigest()}
    write_index(tmp_path, lines)
    assert any("is not a whole shard" in line for line in findings(tmp_path))


# --- Notes and coverage ---------------------------------------------------------------------------------


def test_failed_sequences_and_files_of_others_are_notes_and_no_findings(tmp_path: Path):
    make(tmp_path)
    bad = sequence("bad")
    assert bad.rows is not None
    bad.rows[0, 0, 0] = np.nan
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit([bad])
    (tmp_path / "notes.txt").write_text("from the cluster in the cellar")
    (tmp_path / "host-00000" / "old").mkdir()
    assert findings(tmp_path) == []
    failed, *foreign = store_notes(ActivationStore(tmp_path))
    assert "task bad test 0 identity sample 0" in failed
    assert "failed: blocks.10.hook_resid_post is not finite at position 0" in failed
    assert foreign == ["not part of the store: notes.txt", "not part of the store: host-00000/old"]


def test_coverage_names_puzzles_without_sequences_or_with_too_few(tmp_path: Path):
    expected = [("a", 0), ("bb", 0), ("bb", 1), ("missing", 0), ("one", 0)]
    with ActivationWriter(tmp_path, SETTINGS, provenance={}) as writer:
        writer.submit([*batch("a", "bb", "ccc"), sequence("one")])
    assert list(verify_coverage(ActivationStore(tmp_path), expected)) == [
        "task bb test 1 has no sequence",
        "task missing test 0 has no sequence",
        "task one test 0 has 1 sequences, others have 2",
    ]


def test_progress_is_told_of_every_shard_of_every_host(tmp_path: Path):
    make(tmp_path)
    with ActivationWriter(tmp_path, SETTINGS, host_index=3, provenance={}) as writer:
        writer.submit(batch("dddd"))
    told: list[tuple[str, str, int, int]] = []

    def progress(items: Collection[Item], name: str, unit: str) -> Iterator[Item]:
        done = 0
        for item in items:
            yield item
            done += 1
        told.append((name, unit, done, len(items)))

    assert list(verify_store(ActivationStore(tmp_path), progress)) == []
    assert told == [("host-00000", "shard", 2, 2), ("host-00003", "shard", 1, 1)]
