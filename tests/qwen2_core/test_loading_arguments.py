"""What loading is asked for: what is clear is taken, everything else is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from lively import SHALLOW, rewrite_json
from runner_cases import run_python

from qwen2_core.errors import CheckpointError
from qwen2_core.weights import convert_hf_to_jax_weights, load_qwen2, read_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SHALLOW.save(tmp_path_factory.mktemp("loading") / "model")


@pytest.mark.parametrize(
    ("given", "name"), [("bfloat16", "bfloat16"), ("torch.float16", "float16"), ("auto", None), (None, None)]
)
def test_a_dtype_may_be_asked_for_by_name(checkpoint: Path, given: Any, name: str | None):
    assert read_config(checkpoint, dtype=given).dtype.name == (name or SHALLOW.config().dtype.name)


def test_a_dtype_may_be_torchs(checkpoint: Path):
    torch = pytest.importorskip("torch")
    assert read_config(checkpoint, dtype=torch.bfloat16).dtype.name == "bfloat16"
    with pytest.raises(CheckpointError, match="dtype int8 is not one of"):
        read_config(checkpoint, dtype=torch.int8)


def test_an_index_may_name_torchs_dtype_which_transformers_cannot_read(tmp_path: Path):
    folder = SHALLOW.save(tmp_path / "model", max_shard_bytes=60_000)
    rewrite_json(folder / "config.json", torch_dtype=None)
    rewrite_json(folder / "model.safetensors.index.json", metadata={"dtype": "torch.float16"})
    assert read_config(folder).dtype.name == "float16"


# In a process of its own: the tests' own check the types of arguments.
CASES = """
import json, sys
from qwen2_core.config import QwenConfig
from qwen2_core.weights import load_qwen2

model = sys.argv[1]
url = "https://huggingface.co/Qwen/Qwen2.5-0.5B"
calls = {
    "dtype bf16": lambda: load_qwen2(model, dtype="bf16"),
    "dtype f,,": lambda: load_qwen2(model, dtype="f,,"),
    "dtype 5": lambda: load_qwen2(model, dtype=5),
    "scan_layers no": lambda: load_qwen2(model, scan_layers="no"),
    "scan_layers 1": lambda: load_qwen2(model, scan_layers=1),
    "mesh 2": lambda: load_qwen2(model, mesh_shape=2),
    "mesh text": lambda: load_qwen2(model, mesh_shape=("1", "1")),
    "mesh of three": lambda: load_qwen2(model, mesh_shape=(1, 1, 1)),
    "revision 5": lambda: load_qwen2(model, revision=5),
    "None": lambda: load_qwen2(None),
    "5": lambda: load_qwen2(5),
    "bytes": lambda: load_qwen2(b"model"),
    "a config of None": lambda: QwenConfig.from_hf(None),
    "an address": lambda: load_qwen2(url),
    "an address of a branch": lambda: load_qwen2(url + "/tree/main"),
    "a slash": lambda: load_qwen2("Qwen/Qwen2.5-0.5B/"),
    "flags": lambda: QwenConfig(use_fixed_cache="no"),
}
said = {}
for name, call in calls.items():
    try:
        call()
    except ValueError as error:
        said[name] = str(error)
print(json.dumps(said))
"""
MESH = "mesh_shape must be two whole numbers (data, model), such as (1, 1), not "
GIVE = "for the hub's, give Qwen/Qwen2.5-0.5B."
SENTENCES = {
    "dtype bf16": "dtype 'bf16' is not one of float32, bfloat16, float16.",
    "dtype f,,": "dtype 'f,,' is not one of",
    "dtype 5": "dtype 5 is not one of",
    "scan_layers no": "scan_layers must be True or False, not 'no'.",
    "scan_layers 1": "scan_layers must be True or False, not 1.",
    "mesh 2": MESH + "2.",
    "mesh text": MESH + "('1', '1').",
    "mesh of three": MESH + "(1, 1, 1).",
    "revision 5": "revision must be a branch, tag or commit, not 5.",
    "None": "A model is a directory or a hub id, not None.",
    "5": "A model is a directory or a hub id, not 5.",
    "bytes": "A model is a directory or a hub id, not b'model'.",
    "a config of None": "A model is a directory or a hub id, not None.",
    "an address": GIVE,
    "an address of a branch": GIVE,
    "a slash": GIVE,
    "flags": "use_fixed_cache must be true or false, not 'no'.",
}


def test_arguments_that_cannot_be_are_refused_in_a_sentence(checkpoint: Path):
    said = json.loads(run_python(CASES, str(checkpoint)))
    assert said.keys() == SENTENCES.keys()
    for name, sentence in SENTENCES.items():
        assert sentence in said[name]
        assert "\n" not in said[name]


def test_loading_works_where_all_transfers_are_forbidden(checkpoint: Path):
    with jax.transfer_guard("disallow_explicit"):
        config, params = load_qwen2(checkpoint)
        converted = convert_hf_to_jax_weights(SHALLOW.state_dict(), config)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, converted))
