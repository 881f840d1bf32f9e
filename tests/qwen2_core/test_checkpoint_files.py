"""The files of a checkpoint: each flaw is named; the fingerprint covers every byte."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from lively import SHALLOW, rewrite_safetensors

from qwen2_core.checkpoint_files import (
    CheckpointError,
    checkpoint_fingerprint,
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

    def test_an_index_without_files_is_refused(self, sharded: Path):
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
        with pytest.raises(CheckpointError, match="names no files"):
            load_qwen2(sharded)


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
