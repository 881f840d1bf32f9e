"""A store that somebody else made: whatever its files hold ends in a finding or a sentence, and quickly."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from activation_fakes import SETTINGS, make_two_shards, read_index, write_index
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from store_readers import problems, sentences

from activation_store import (
    ActivationStore,
    ActivationWriter,
    ShuffledBatches,
    StoreError,
    StoreSettings,
    repair_store,
    verify_store,
)
from activation_store.checked_json import unseal_line

SHARD = "host-00000/shard-000000.safetensors"
INDEX = "host-00000/index.jsonl"
# Not as JSON values: some of them are none.
WRONG_NUMBERS = ("NaN", "Infinity", "1.5", '"1"', "null", str(2**63), "-1", "true", "[]", "{}", "1e400")
NESTED = "[" * 200_000 + "]" * 200_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_two_shards(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "store")


# --- Values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        "test_index",
        "sample_index",
        "seed",
        "row_start",
        "n_rows",
        "prompt_start",
        "prompt_length",
        "generated_length",
        "shard_bytes",
        "shard_sequences",
        "shard_mtime_ns",
    ],
)
def test_a_wrong_number_in_an_index_line_is_found_by_every_reader(sound: Path, store: Path, field: str):
    text = (sound / INDEX).read_text()
    first = json.loads(text.splitlines()[0])
    was = f'"{field}":{json.dumps(first[field])}'
    assert was in text
    for wrong in WRONG_NUMBERS:
        (store / INDEX).write_text(text.replace(was, f'"{field}":{wrong}', 1))
        with pytest.raises(StoreError, match=r"host-00000/index\.jsonl is damaged at byte 0"):
            list(ActivationStore(store).sequences())
        assert sentences(problems(store)), wrong


@pytest.mark.parametrize("wrong", [2**31 - 1, 2**40, 2**53 - 1])
@pytest.mark.parametrize(
    "fields",
    [
        ("row_start",),
        ("n_rows", "generated_length"),
        ("n_rows", "prompt_length"),
        ("n_rows", "generated_length", "shard_bytes"),
        ("row_start", "shard_bytes"),
        ("prompt_start", "shard_bytes"),
        ("shard_bytes",),
    ],
)
def test_a_number_that_is_only_too_large_takes_neither_time_nor_memory(
    store: Path, fields: tuple[str, ...], wrong: int
):
    lines = read_index(store)
    for line in lines:
        line |= dict.fromkeys(fields, wrong) | ({"shard_bytes": 2**53 - 1} if "shard_bytes" in fields else {})
    write_index(store, lines)
    with pytest.raises(StoreError):
        list(ShuffledBatches(ActivationStore(store), 11, 8))
    assert sentences(problems(store))


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "0" * 31 + "G"},
        {"key": "AB" * 16},
        {"key": "0" * 33},
        {"shard_sha256": "ef"},
        {"shard_sha256": ""},
        {"task_id": "x" * 2000},
        {"task_id": "\x1b[2J"},
        {"task_id": "a\nb"},
        {"task_id": "\ud800"},
        {"augmentation": "\x9b31m"},
        {"failure": "x"},
        {"finish_reason": "stop\n"},
        {"finish_reason": ""},
        {"n_rows": 0},
        {"generated_length": 0},
        {"extra": 1},
        {"strengths": None},
        {"strengths": ["1"]},
        {"strengths": [True]},
        {"strengths": [[1.0]]},
        {"strengths": [1.0] * 1025},
    ],
)
def test_a_wrong_text_in_an_index_line_is_found(store: Path, changed: dict[str, Any]):
    lines = read_index(store)
    write_index(store, [lines[0] | changed, *lines[1:]])
    said = list(verify_store(ActivationStore(store)))
    assert any(one.startswith("host-00000/index.jsonl, line 1: not an index line (") for one in said), said
    assert not any("\x1b" in one or "\x9b" in one for one in said)
    assert sentences(problems(store))


def test_a_line_with_two_keys_counts_as_neither(store: Path):
    lines = [unseal_line(line) for line in (store / INDEX).read_bytes().splitlines()]
    lines[0] = lines[0].replace(b'"failure":null', b'"key":"%b","failure":null' % (b"0" * 32))
    (store / INDEX).write_bytes(b"".join(line + b"\n" for line in lines))
    assert any("its key is given twice" in one for one in verify_store(ActivationStore(store)))


SETTINGS_FIELDS = SETTINGS.to_json()


@pytest.mark.parametrize("field", SETTINGS_FIELDS)
def test_a_wrong_setting_in_a_manifest_is_a_sentence_that_names_the_file(store: Path, field: str):
    manifest = json.loads((store / "manifest.json").read_text())
    right = json.dumps(manifest["settings"][field])
    wrongs = ['"12"', "[1]", "null", "true", '{"a":{"b":[1]}}', '[["blocks.1.hook_resid_post"]]', "-1", "1.5"]
    wrongs += ["1e999", "9" * 5000, NESTED, '"\\ud800"', '"a\\u001bb"', "[true]", '{"temperature":true}']
    manifest["settings"][field] = "HERE"
    text = json.dumps(manifest)
    for wrong in wrongs:
        if field in ("capture_prompt", "eos_token_ids") and wrong in ("true", "[1]"):
            continue  # right for these
        (store / "manifest.json").write_text(text.replace('"HERE"', wrong))
        for act in (lambda: ActivationStore(store), lambda: ActivationWriter(store, SETTINGS, provenance={})):
            if wrong == '"12"' and field in ("model_fingerprint", "tokenizer_sha256"):
                continue
            with pytest.raises(StoreError, match=r"manifest\.json") as raised:
                act()
            assert sentences([str(raised.value)]), (right, wrong)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), True, "0.5", None, [0.5], 10**400])
def test_settings_with_a_wrong_sampling_value_are_refused(wrong: Any):
    with pytest.raises(StoreError, match="sampling"):
        StoreSettings.from_json(SETTINGS.to_json() | {"sampling": {"temperature": wrong}})


@pytest.mark.parametrize(
    "text",
    [
        NESTED,
        '{"a":' * 100_000,
        '{"schema_version":1,"settings":{},"provenance":' + NESTED + "}",
        '{"schema_version":' + "9" * 5000 + "}",
        '{"schema_version":true,"settings":{},"provenance":{}}',
        '{"schema_version":1.0,"settings":{},"provenance":{}}',
        '{"schema_version":1,"settings":[],"provenance":{}}',
        '{"schema_version":1,"settings":{},"provenance":[]}',
        '{"schema_version":1,"settings":{},"provenance":{}}' + " " * (1 << 21),
        "null",
        "7",
        "\ufeff{}",
    ],
)
def test_a_manifest_of_another_form_is_a_sentence(store: Path, text: str):
    (store / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json") as raised:
        ActivationStore(store)
    assert sentences([str(raised.value)])


@pytest.mark.parametrize("text", [NESTED, '{"key":"' + "0" * 32 + '","shard":' + NESTED + "}", "{" * 70_000])
def test_a_line_that_is_nested_or_long_is_found(store: Path, text: str):
    with (store / INDEX).open("a") as file:
        file.write(text + "\n")
    assert any("line 7: not an index line" in one for one in verify_store(ActivationStore(store)))
    assert len(repair_store(store)) == 1
    assert list(verify_store(ActivationStore(store))) == []


# --- Shards ---------------------------------------------------------------------------------------------

HUGE = 2**52
ENTRY = {"dtype": "BF16", "shape": [41, 16], "data_offsets": [0, 1312]}


def set_header(path: Path, change: Callable[[dict[str, Any]], Any] | str) -> None:
    """Changes a shard's header but not the length of the file, so that sizes still fit."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if isinstance(change, str):
        text = change.encode()
    else:
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(length)
    path.write_bytes(
        (len(text).to_bytes(8, "little") + text + data[8 + length :])[: len(data)].ljust(len(data))
    )


@pytest.mark.parametrize("name", ["blocks.11.hook_resid_post", "token_ids", "norms"])
@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        *(("dtype", wrong) for wrong in ("F64", "", None, 7, ["F32"], {}, "I32\n", "f32")),
        *(
            ("shape", wrong)
            for wrong in (
                [],
                [41.0, 16],
                [[41], 16],
                [-41, -16],
                "41",
                None,
                [HUGE, HUGE],
                [True],
                [41] * 9,
                {},
            )
        ),
        *(
            ("data_offsets", wrong)
            for wrong in (
                [0],
                [0, 1.5],
                [[0], 8],
                [-8, 8],
                [8, 0],
                [0, HUGE],
                [0, 2**70],
                "ab",
                None,
                [0, 8, 9],
            )
        ),
    ],
)
def test_a_wrong_entry_in_a_shards_header_is_found_by_whoever_needs_it(
    store: Path, name: str, part: str, wrong: Any
):
    set_header(store / SHARD, lambda header: header[name].update({part: wrong}))
    opened = ActivationStore(store)
    record = next(opened.sequences())
    readers: list[Callable[[], Any]] = [
        lambda: opened.open_shard(record.path, record.shard_bytes).check_layout(),
        lambda: list(opened.iterate(11)),
    ]
    if name == "blocks.11.hook_resid_post":
        readers += [lambda: opened.rows(record, 11), lambda: opened.sequence_digest(record)]
    if name in ("token_ids", "norms"):
        readers += [lambda: opened.columns(record, 11)]
    if name != "norms":
        readers += [lambda: list(ShuffledBatches(opened, 11, 8))]
    for read in readers:
        with pytest.raises(StoreError, match="is not a whole shard"):
            read()


@pytest.mark.parametrize(
    "text",
    [
        NESTED,
        "[]",
        "null",
        "{}",
        '{"a":' * 3,
        "\xff",
        "",
        '{"__metadata__":' + json.dumps({"token_ids": ENTRY}) + "}",
        '{"__metadata__":{"x":"\\"token_ids\\":{\\"dtype\\":\\"I32\\"}"}}',
    ],
)
def test_a_header_of_another_form_is_found(store: Path, text: str):
    set_header(store / SHARD, text)
    with pytest.raises(StoreError, match="is not a whole shard"):
        list(ActivationStore(store).iterate(11))
    assert sentences(problems(store))


def test_layers_that_share_their_bytes_are_found(store: Path):
    def share(header: dict[str, Any]) -> None:
        header["blocks.12.hook_resid_post"]["data_offsets"] = header["blocks.11.hook_resid_post"][
            "data_offsets"
        ]

    set_header(store / SHARD, share)
    with pytest.raises(StoreError, match="does not begin where the one before it ends"):
        list(ActivationStore(store).iterate(11))


@pytest.mark.parametrize("length", [0, 1, 7, 2**20 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_read_within_the_file(store: Path, length: int):
    data = (store / SHARD).read_bytes()
    (store / SHARD).write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(StoreError, match="is not a whole shard"):
        list(ActivationStore(store).iterate(11))


def test_a_shard_that_is_cut_is_refused_when_it_is_opened_and_when_it_is_read(store: Path):
    size = (store / SHARD).stat().st_size
    early = ActivationStore(store)
    record = next(early.sequences())
    early.rows(record, 10)
    os.truncate(store / SHARD, 5000)
    with pytest.raises(StoreError, match="the file ends at byte 5000"):
        early.rows(record, 12)
    for layer in (10, 12):
        with pytest.raises(StoreError, match="has 5000 bytes"):
            ActivationStore(store).rows(record, layer)
    assert any(f"has 5000 bytes, {size} were written" in one for one in problems(store))


# --- Anything -------------------------------------------------------------------------------------------


@hypothesis_settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
def test_whatever_is_changed_in_a_file_is_found_or_harmless(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    name = data.draw(st.sampled_from(["manifest.json", INDEX, SHARD]))
    text = bytearray((sound / name).read_bytes())
    header = 3000 if name == SHARD else len(text)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(header, len(text)) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "repeat", "remove"]))
        some = data.draw(st.binary(min_size=1, max_size=6))
        if how == "set":
            text[place : place + len(some)] = some
        elif how == "insert":
            text[place:place] = some
        elif how == "repeat":
            text[place:place] = text[place : place + 200]
        elif how == "remove":
            del text[place : place + 3 * len(some)]
        elif place:
            del text[place:]
    store = shutil.copytree(sound, tmp_path_factory.mktemp("changed") / "store")
    (store / name).write_bytes(text)
    said = problems(store)  # nothing but StoreErrors
    if name == SHARD and bytes(text) != (sound / name).read_bytes():
        assert sentences(said)
