"""A store that somebody else made: whatever its files hold ends in a finding or a sentence, and quickly."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from activation_fakes import SETTINGS, batch, read_index, write_index
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from activation_store import (
    ActivationStore,
    ActivationWriter,
    ShuffledBatches,
    StoreError,
    StoreSettings,
    repair_store,
    verify_store,
)
from activation_store.checked_json import seal_line
from activation_store.verify import store_notes

SHARD = "host-00000/shard-000000.safetensors"
INDEX = "host-00000/index.jsonl"
# Not as JSON values: some of them are none.
WRONG_NUMBERS = ("NaN", "Infinity", "1.5", '"1"', "null", str(2**63), "-1", "true", "[]", "{}", "1e400")
NESTED = "[" * 200_000 + "]" * 200_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    with ActivationWriter(directory, SETTINGS, provenance={"jax": "1.2"}) as writer:
        writer.submit(batch("a", "bb"))
        writer.submit(batch("ccc"))
    return directory


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "store")


def read_everything(directory: Path) -> Iterator[Callable[[], Any]]:
    """Yields each way in which a store is read."""
    opened = ActivationStore(directory)
    yield lambda: list(opened.sequences())
    yield lambda: list(store_notes(opened))
    yield lambda: opened.statistics(11)
    yield lambda: list(opened.iterate(11))
    yield lambda: list(ShuffledBatches(opened, 11, 8))
    yield lambda: [opened.sequence_digest(record) for record in opened.sequences()]
    yield lambda: [opened.columns(record, 11) for record in opened.sequences()]


def problems(directory: Path) -> list[str]:
    """Returns what each way of reading a store, its verification and its continuation say against it."""
    said: list[str] = []
    try:
        for read in read_everything(directory):
            try:
                read()
            except StoreError as error:
                said.append(str(error))
        said += verify_store(ActivationStore(directory))
    except StoreError as error:
        said.append(str(error))
    with (
        contextlib.suppress(StoreError),  # it makes again what is damaged, or refuses
        ActivationWriter(directory, SETTINGS, provenance={}) as writer,
    ):
        said += writer.dropped
    return said


def sealed_anew(text: str) -> bytes:
    """Returns changed index lines with checksums that fit, as somebody makes them who knows the format."""
    lines = (line.encode().partition(b',"crc32":')[0] + b"}" for line in text.splitlines())
    return b"".join(seal_line(line) + b"\n" for line in lines)


def sentences(said: list[str]) -> bool:
    return bool(said) and all("\n" not in one and len(one) < 1000 for one in said)


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
        (store / INDEX).write_bytes(sealed_anew(text.replace(was, f'"{field}":{wrong}', 1)))
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
    text = (store / INDEX).read_text()
    twice = text.replace('"failure":null', f'"key":"{"0" * 32}","failure":null', 1)
    (store / INDEX).write_bytes(sealed_anew(twice))
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
    assert len(repair_store(store)) == 5  # the lines, and the shard that they named, which is set aside
    with ActivationWriter(store, SETTINGS, provenance={}):
        pass
    changed = {
        path for path, data in tree(store.parent).items() if before.get(path) != data
    } | before.keys() - tree(store.parent).keys()
    assert changed <= {f"store/{INDEX}", f"store/{SHARD}", f"store/{SHARD}.damaged"}


def problems_of_reading(directory: Path) -> list[str]:
    said: list[str] = []
    for read in read_everything(directory):
        try:
            read()
        except StoreError as error:
            said.append(str(error))
    return said + list(verify_store(ActivationStore(directory)))


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
    assert first == f"{SHARD}: cannot be read: Permission denied"
    assert second.startswith("host-00000/shard-000001.safetensors: has 3000 bytes")


# --- Anything -------------------------------------------------------------------------------------------


@hypothesis_settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
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
