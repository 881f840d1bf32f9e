"""Keys, settings and index lines."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from activation_fakes import SETTINGS, sequence, settings

from activation_store import SequenceId, StoreError, StoreSettings, hook_layer, hook_name, sequence_key
from activation_store.checked_json import unseal_line
from activation_store.format import (
    SequenceRecord,
    decode_line,
    encode_line,
    line_key,
)
from activation_store.manifest import decode_manifest, encode_manifest, manifest_problem

IDENTITY = SequenceId("task", 0, 0, "identity", np.array([1, 2, 3], np.int32))
RECORD = SequenceRecord(
    key="0123456789abcdef" * 2,
    shard="shard-000003.safetensors",
    task_id="007bbfb7",
    test_index=0,
    sample_index=1,
    augmentation="identity",
    seed=7,
    row_start=10,
    n_rows=20,
    prompt_start=5,
    prompt_length=6,
    generated_length=14,
    finish_reason="stop",
    shard_bytes=1000,
    shard_sha256="ef" * 32,
    shard_sequences=4,
    shard_mtime_ns=1,
    failure=None,
    numerics="01ab23cd",
    host=2,
)


def test_the_key_is_stable_across_releases():
    """A changed key would make every existing directory start over: this one was computed once."""
    assert sequence_key(SETTINGS, IDENTITY) == "63184273996874cd7b317e5c9c74f66f"


@pytest.mark.parametrize(
    "changed",
    [
        {"task_id": "other"},
        {"test_index": 1},
        {"sample_index": 1},
        {"augmentation": "flip"},
        {"prompt_token_ids": np.array([1, 2, 4], np.int32)},
        {"prompt_token_ids": np.array([1, 2], np.int32)},
    ],
)
def test_whatever_tells_two_sequences_apart_is_in_the_key(changed: dict[str, Any]):
    other = dataclasses.replace(IDENTITY, **changed)
    assert sequence_key(SETTINGS, IDENTITY) != sequence_key(SETTINGS, other)


@pytest.mark.parametrize(
    "changed",
    [
        {"model_fingerprint": "00" * 32},
        {"sampling": {"temperature": 0.5, "top_k": 0, "top_p": 1.0}},
        {"seed": 8},
        {"capture_prompt": False},
        {"hook_names": (hook_name(10),)},
        {"dtype": "float32"},
        {"max_output_tokens": 13},
        {"residual_dtype": "float32"},
    ],
)
def test_whatever_changes_the_stored_bytes_is_in_the_key(changed: dict[str, Any]):
    assert sequence_key(SETTINGS, IDENTITY) != sequence_key(settings(**changed), IDENTITY)


def test_a_residual_stream_as_the_rows_is_said_nowhere_as_before_there_was_another():
    plain = settings(dtype="bfloat16")
    assert settings(dtype="bfloat16", residual_dtype="bfloat16") == plain
    assert "residual_dtype" not in plain.to_json()
    assert settings(dtype="float32", residual_dtype="float32").residual_dtype == ""
    wide = settings(dtype="bfloat16", residual_dtype="float32")
    assert wide.to_json()["residual_dtype"] == "float32"
    assert StoreSettings.from_json(wide.to_json()) == wide
    with pytest.raises(StoreError, match="residual_dtype has values that this program leaves out"):
        StoreSettings.from_json(plain.to_json() | {"residual_dtype": "bfloat16"})


def test_the_width_of_the_prompts_integers_is_not_in_the_key():
    wide = dataclasses.replace(IDENTITY, prompt_token_ids=IDENTITY.prompt_token_ids.astype(np.int64))
    assert sequence_key(SETTINGS, IDENTITY) == sequence_key(SETTINGS, wide)


def test_zero_and_nought_point_zero_are_the_same_temperature():
    assert not SETTINGS.differences(settings(sampling={"temperature": 0, "top_k": 0.0, "top_p": 1}))


def test_differences_name_each_field_and_both_values():
    differences = SETTINGS.differences(settings(seed=8, max_output_tokens=99))
    assert differences == ["max_output_tokens is 12 there and 99 here", "seed is 7 there and 8 here"]


def test_settings_survive_the_manifest():
    stored, provenance = decode_manifest(encode_manifest(SETTINGS, {"jax": "1.2"}), "manifest.json")
    assert stored == SETTINGS
    assert provenance == {"jax": "1.2"}


def test_a_manifest_knows_whether_it_has_changed():
    data = encode_manifest(SETTINGS, {"jax": "1.2", "note": "made today"})
    assert manifest_problem(data) is None
    changed = data.replace(b"made today", b"made tOday")
    assert decode_manifest(changed, "manifest.json")[0] == SETTINGS
    assert manifest_problem(changed) == "its checksum does not fit: something in it has changed"
    manifest = json.loads(data)
    del manifest["checksum"]
    assert manifest_problem(json.dumps(manifest).encode()) == "its checksum is missing"
    assert manifest_problem(json.dumps(manifest | {"schema_version": 1}).encode()) is None


def test_whatever_byte_of_a_manifest_changes_is_noticed_or_means_the_same():
    data = encode_manifest(SETTINGS, {"jax": "1.2"})
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        try:
            settings_there, provenance = decode_manifest(bytes(changed), "manifest.json")
        except StoreError:
            continue
        same = (settings_there, provenance) == (SETTINGS, {"jax": "1.2"})
        assert same or manifest_problem(bytes(changed)), place


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"schema_version": 1}', b"\xff"])
def test_a_damaged_manifest_is_refused(text: bytes):
    with pytest.raises(StoreError, match="damaged"):
        decode_manifest(text, "manifest.json")


def test_a_manifest_of_another_schema_is_refused():
    manifest = json.loads(encode_manifest(SETTINGS, {})) | {"schema_version": 3}
    with pytest.raises(StoreError, match="schema version 3; this program reads versions 1, 2"):
        decode_manifest(json.dumps(manifest).encode(), "manifest.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hook_names": ("blocks.1.hook_scale",)}, "hook_scale"),
        ({"hook_names": (hook_name(1), hook_name(1))}, "twice"),
    ],
)
def test_impossible_settings_are_refused(changed: dict[str, Any], message: str):
    with pytest.raises(StoreError, match=message):
        settings(**changed)


def test_an_index_line_reads_back_as_it_was():
    line = encode_line(RECORD)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_line(line[:-1], host=2) == RECORD


def test_a_line_that_the_index_would_not_find_is_none():
    """An opened index looks for keys at their place; what it cannot find there, no reader may accept."""
    values = json.loads(unseal_line(encode_line(RECORD)[:-1]))
    line = json.dumps(dict(reversed(values.items())), separators=(",", ":")).encode()
    assert line_key(line) is None
    with pytest.raises(StoreError, match="not an index line"):
        decode_line(line, host=2)


def test_a_line_of_the_first_schema_is_read():
    values = json.loads(unseal_line(encode_line(RECORD)[:-1]))
    del values["numerics"]
    line = json.dumps(values, separators=(",", ":")).encode()
    assert decode_line(line, host=2) == RECORD._replace(numerics="")
    assert line_key(line) == bytes.fromhex(RECORD.key)


def test_whatever_byte_of_a_line_changes_is_noticed():
    line = encode_line(RECORD)[:-1]
    for place in range(len(line)):
        for change in (1, 2, 0x20, 0x80):
            changed = bytearray(line)
            changed[place] ^= change
            with pytest.raises(StoreError, match="not an index line"):
                decode_line(bytes(changed), host=2)


@pytest.mark.parametrize("line", [encode_line(RECORD)[:-1] + b"}", encode_line(RECORD) * 2])
def test_what_follows_an_index_line_is_damage(line: bytes):
    with pytest.raises(StoreError, match="not an index line"):
        decode_line(line, host=2)


def test_the_key_is_found_without_parsing_the_line():
    assert line_key(encode_line(RECORD)[:-1]) == bytes.fromhex(RECORD.key)


@pytest.mark.parametrize("line", [b"", b"{}", b'{"key":"zz', encode_line(RECORD)[:70], b"null", b"\x00" * 90])
def test_what_is_no_index_line_is_told_apart(line: bytes):
    assert line_key(line) is None
    with pytest.raises(StoreError, match="not an index line"):
        decode_line(line, host=0)


def test_hook_names_and_layers_are_inverse():
    assert hook_layer(hook_name(23)) == 23


def test_prompt_rows_follow_from_the_lengths():
    assert RECORD.prompt_rows == 6
    assert RECORD._replace(n_rows=14).prompt_rows == 0
    assert RECORD._replace(n_rows=0).prompt_rows == 0


def test_settings_round_trip_through_json_for_every_dtype():
    for dtype in ("float32", "bfloat16", "float16"):
        assert StoreSettings.from_json(settings(dtype=dtype).to_json()) == settings(dtype=dtype)


def test_the_fakes_are_deterministic():
    first, second = sequence("a"), sequence("a")
    assert first.rows is not None
    assert second.rows is not None
    assert (first.rows == second.rows).all()
