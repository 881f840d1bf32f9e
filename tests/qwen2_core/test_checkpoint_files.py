"""The files of a checkpoint: each flaw is named; the fingerprint covers every byte."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from lively import SHALLOW, rewrite_safetensors

from qwen2_core import checkpoint_files
from qwen2_core.checkpoint_files import (
    CheckpointError,
    checkpoint_fingerprint,
    checkpoint_folder,
    is_hub_id,
    open_tensors,
    weight_files,
)
from qwen2_core.weights import load_qwen2

UNTIED = replace(SHALLOW, layers=2, tied=False, extract=(0, 1))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return UNTIED.save(tmp_path / "model")


def test_only_a_name_that_is_no_path_and_not_there_is_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("Qwen/Qwen2.5-0.5B-Instruct")
    assert is_hub_id("gpt2")
    for path in ("./model", "/models/qwen", "~/qwen", "models/qwen/instruct"):
        assert not is_hub_id(path), path
    (tmp_path / "Qwen").mkdir()
    assert not is_hub_id("Qwen")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("exmples/tiny-qwen2", "examples/tiny-qwen2"),
        ("examples/tiny-qwen", "examples/tiny-qwen2"),
        ("Examples/Tiny-Qwen2", "examples/tiny-qwen2"),
        ("exmples/tiny_qwen2", "examples/tiny-qwen2"),
        ("example", "examples"),
        ("./exmples/tiny-qwen2", "examples/tiny-qwen2"),
        ("exmples/tiny-qwen2/", "examples/tiny-qwen2"),
        ("{here}/exmples/tiny-qwen2", "{here}/examples/tiny-qwen2"),
        ("exmples/deeper/tiny-qwen2/one", "examples/deeper/tiny-qwen2/one"),
    ],
)
def test_a_folder_that_is_not_there_is_told_at_once_with_the_one_that_is_meant(
    given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples" / "tiny-qwen2").mkdir(parents=True)
    (tmp_path / "examples" / "deeper" / "tiny-qwen2" / "one").mkdir(parents=True)
    (tmp_path / "examples" / "a file").touch()
    given, meant = given.format(here=tmp_path), meant.format(here=tmp_path)
    monkeypatch.setattr(checkpoint_files, "list_files", lambda *_: pytest.fail("the hub is asked"))
    assert not is_hub_id(given)
    with pytest.raises(CheckpointError, match=f"no model directory .*; did you mean {re.escape(meant)}[?]"):
        checkpoint_folder(given)


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-0.5B-Instruct", "gpt2", "examples/another", "a file", "x/a file"]
)
def test_names_without_a_near_folder_are_not_held_for_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("examples/tiny-qwen2", "qwen2_core", "qwen2_engine", "models"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "gpt3").touch()
    assert is_hub_id(name) == (" " not in name)
    with pytest.raises(CheckpointError, match=r"(?!.*did you mean).*no model directory"):
        checkpoint_folder(name)


@pytest.mark.parametrize(
    "name", ["a\0b", "", ".", "..", "\ud800/x", "a" * 5000, "~nobody-of-that-name/model"]
)
def test_names_that_are_no_path_are_refused_in_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"is no path|no model directory|has no config"):
        load_qwen2(name)


def test_stored_tensors_have_the_shapes_and_the_bytes_that_were_saved(tmp_path: Path):
    sharded = UNTIED.save(tmp_path, max_shard_bytes=60_000)
    with open_tensors(sharded) as stored:
        state = UNTIED.state_dict()
        assert stored.directory == sharded
        assert stored.shapes() == {name: tensor.shape for name, tensor in state.items()}
        for name, tensor in state.items():
            np.testing.assert_array_equal(stored.read(name), tensor)
    assert len(weight_files(sharded)) > 3


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(checkpoint: Path, keep: int):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file .* again"):
        load_qwen2(checkpoint)


def test_a_file_that_is_no_safetensors_is_refused(checkpoint: Path):
    (checkpoint / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load_qwen2(checkpoint)


def test_a_missing_directory_config_or_weight_file_is_named(checkpoint: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"There is no model directory .*absent"):
        load_qwen2(tmp_path / "absent")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has a config\.json but no model\.safetensors\."):
        load_qwen2(checkpoint)
    (checkpoint / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin: convert it to safetensors"):
        load_qwen2(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_qwen2(checkpoint)


class TestIndex:
    @pytest.fixture
    def sharded(self, tmp_path: Path) -> Path:
        return UNTIED.save(tmp_path, max_shard_bytes=60_000)

    def test_a_shard_that_is_not_there_is_named(self, sharded: Path):
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"has no {re.escape(shard.name)}"):
            load_qwen2(sharded)

    def test_a_truncated_shard_is_named(self, sharded: Path):
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=f"{re.escape(shard.name)} is not a whole"):
            load_qwen2(sharded)

    def test_a_tensor_in_two_shards_is_refused(self, sharded: Path):
        first, second = sorted(sharded.glob("*.safetensors"))[:2]
        doubled = safetensors.numpy.load_file(first)
        rewrite_safetensors(second, lambda tensors: tensors.update(doubled))
        with pytest.raises(CheckpointError, match=r"Tensor model\.embed_tokens\.weight is in two files"):
            load_qwen2(sharded)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
    def test_a_file_that_is_no_index_is_refused(self, sharded: Path, text: str):
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="is no safetensors index"):
            load_qwen2(sharded)

    @pytest.mark.parametrize(
        "name",
        [
            "../model.safetensors",
            "/etc/model.safetensors",
            "inner/model.safetensors",
            "..\\model.safetensors",
            "a\0.safetensors",
            "pytorch_model.bin",
            "config.json",
            "..",
            "",
            5,
            None,
            ["model.safetensors"],
        ],
    )
    def test_names_that_are_no_plain_name_of_a_weight_file_are_refused(self, sharded: Path, name: object):
        file = sharded / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"]["model.norm.weight"] = name
        file.write_text(json.dumps(index))
        shutil.copy(min(sharded.glob("*.safetensors")), sharded.parent / "model.safetensors")
        with pytest.raises(
            CheckpointError, match=r"model\.norm\.weight is in .*: a weight file has a plain name"
        ):
            load_qwen2(sharded)

    @pytest.mark.parametrize(
        "text", ["[" * 200_000, '{"weight_map": ' + "9" * 5000 + "}"], ids=["deep", "long"]
    )
    def test_json_that_python_does_not_read_is_refused(self, sharded: Path, text: str):
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="is no safetensors index"):
            load_qwen2(sharded)

    def test_an_index_without_files_is_refused(self, sharded: Path):
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
        with pytest.raises(CheckpointError, match="names no files"):
            load_qwen2(sharded)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [fifo, device, folder, loop])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_only_regular_files_are_read(checkpoint: Path, make: Callable[[Path], None], name: str):
    if name.endswith("index.json"):
        (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).unlink(missing_ok=True)
    make(checkpoint / name)
    for read in (load_qwen2, checkpoint_fingerprint):
        with pytest.raises(
            CheckpointError, match=f"{re.escape(name)} (is not a regular file|cannot be read)"
        ):
            read(checkpoint)


def test_a_weight_file_that_is_none_is_refused_in_shards(tmp_path: Path):
    sharded = UNTIED.save(tmp_path, max_shard_bytes=60_000)
    shard = max(sharded.glob("*.safetensors"))
    shard.unlink()
    fifo(shard)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        load_qwen2(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_config_or_index_of_a_terabyte_is_refused(checkpoint: Path, name: str):
    if name.endswith("index.json"):
        (checkpoint / "model.safetensors").unlink()
    with (checkpoint / name).open("w") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="is larger than 64 MB; it is no config or index"):
        load_qwen2(checkpoint)


def test_weights_of_a_terabyte_that_are_a_hole_are_refused(checkpoint: Path):
    with (checkpoint / "model.safetensors").open("r+") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load_qwen2(checkpoint)


def test_the_one_file_is_what_the_fingerprint_covers_where_there_are_shards_too(
    checkpoint: Path, tmp_path: Path
):
    alone = checkpoint_fingerprint(checkpoint)
    other = replace(UNTIED, seed=3).save(tmp_path / "other", max_shard_bytes=60_000)
    for file in other.glob("model*"):
        shutil.copy(file, checkpoint)
    assert weight_files(checkpoint) == [checkpoint / "model.safetensors"]
    assert checkpoint_fingerprint(checkpoint) == alone


def test_the_fingerprint_is_of_the_bytes_alone_and_does_not_change_with_this_package(tmp_path: Path):
    one, many = UNTIED.save(tmp_path / "one"), UNTIED.save(tmp_path / "many", max_shard_bytes=60_000)
    for checkpoint in (one, many):
        files = [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]
        digests = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
        assert checkpoint_fingerprint(checkpoint) == hashlib.sha256(digests).hexdigest()


def test_the_fingerprint_depends_on_every_byte_of_the_model_and_on_nothing_else(
    checkpoint: Path, tmp_path: Path
):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    original = checkpoint_fingerprint(checkpoint)
    assert re.fullmatch("[0-9a-f]{64}", original)
    assert checkpoint_fingerprint(copy) == original
    (copy / "README.md").write_text("not part of the model")
    assert checkpoint_fingerprint(copy) == original
    for name in ("config.json", "model.safetensors"):
        content = (checkpoint / name).read_bytes()
        (copy / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert checkpoint_fingerprint(copy) != original
        (copy / name).write_bytes(content)
    assert checkpoint_fingerprint(copy) == original


def test_swapped_shards_have_another_fingerprint(tmp_path: Path):
    sharded = UNTIED.save(tmp_path, max_shard_bytes=60_000)
    original = checkpoint_fingerprint(sharded)
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert checkpoint_fingerprint(sharded) != original
