"""Interventions come back from their file as they were, and anything else is refused in a sentence."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qwen2_core.config import QwenConfig
from qwen2_core.intervention_files import decode_interventions, encode_interventions
from qwen2_core.interventions import (
    AblateHeads,
    Add,
    ClampFeature,
    Custom,
    ProjectOut,
    Replace,
    ScaleFeature,
)
from qwen2_core.steering import steer

CONFIG = QwenConfig(
    vocab_size=64, hidden_size=8, intermediate_size=12, num_hidden_layers=4, num_attention_heads=4
)
ROW = np.arange(8) / 7
EVERY_KIND = [
    Add("hook_resid_post", 3, ROW, 4, "generated"),
    ProjectOut("hook_mlp_out", (0, 2), np.stack([ROW, ROW[::-1]])),
    Replace("mlp.hook_post", True, np.ones((4, 2, 12)), 0.5, positions=(3, 1)),
    Replace("ln_final.hook_normalized", None, jnp.asarray(ROW, jnp.bfloat16)),
    AblateHeads([1], [0, 3], positions="prompt"),
    ScaleFeature("hook_resid_mid", [1], ROW, ROW.astype(np.float16), 2.0, 0.5, ROW),
    ClampFeature("hook_resid_mid", [1, 3], ROW, ROW, [1.0, 2.0]),
]
DATA = encode_interventions(EVERY_KIND)


def test_every_kind_comes_back_with_what_it_does():
    found = decode_interventions(DATA, "f")
    assert [type(one) for one in found] == [type(one) for one in EVERY_KIND]
    expected, back = steer(EVERY_KIND, CONFIG, 3), steer(found, CONFIG, 3)
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_the_same_interventions_give_the_same_bytes():
    again = [
        dataclasses.replace(EVERY_KIND[0], layers=np.array([3]), vector=ROW.astype(np.float32)[::-1][::-1])
    ]
    assert encode_interventions([*again, *EVERY_KIND[1:]]) == DATA
    assert encode_interventions(decode_interventions(DATA, "f")) == DATA
    assert encode_interventions(EVERY_KIND[0]) != encode_interventions(
        dataclasses.replace(EVERY_KIND[0], strength=3)
    )


def test_a_file_written_by_hand_is_read():
    text = json.dumps([{"kind": "Add", "point": "hook_resid_pre", "layers": [1]}])
    tensors = {"0.vector": ROW.astype(ml_dtypes.bfloat16)}
    data = safetensors.numpy.save(tensors, {"interventions": text})
    found: Any = decode_interventions(data, "f")[0]
    assert isinstance(found, Add)
    assert (found.layers, found.positions, found.strength) == ((1,), "all", 1.0)
    np.testing.assert_array_equal(found.vector, ROW.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no interventions"),
        (None, "no interventions"),
        (Custom("hook_resid_post", 1, lambda x: x), "it is a function"),
        (Add("hook_resid_post", 1, ROW, strength=[0.0, 1.0]), "one number in a file"),
        (Add("hook_resid_post", 1, np.full(8, np.nan)), "not finite"),
        (Add("hook_resid_post", 1, ["a"]), "not numbers"),
        ("Add", "must be a list of Add"),
    ],
)
def test_what_no_file_can_hold_is_refused(given: Any, message: str):
    with pytest.raises(ValueError, match=message):
        encode_interventions(given)


ADD = {"kind": "Add", "point": "hook_resid_post", "layers": [1], "positions": "all", "strength": 1.0}
VECTOR = {"0.vector": np.ones(8, np.float32)}


def file_of(entries: Any, tensors: dict[str, np.ndarray] = VECTOR) -> bytes:
    text = entries if isinstance(entries, str) else json.dumps(entries)
    return safetensors.numpy.save(tensors, {"interventions": text})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        DATA[:-1],
        DATA[:40],
        safetensors.numpy.save(VECTOR),
        safetensors.numpy.save(VECTOR, {"other": "[]"}),
        file_of("["),
        file_of("[" * 100_000),
        file_of("null"),
        file_of([]),
        file_of([ADD | {"kind": "Custom"}]),
        file_of([ADD | {"kind": "__import__"}]),
        file_of([ADD | {"fn": "os.system"}]),
        file_of([ADD | {"heads": [1]}]),
        file_of([ADD | {"strength": "1"}]),
        file_of([ADD | {"strength": True}]),
        file_of([ADD | {"layers": [-1]}]),
        file_of([ADD | {"layers": "12"}]),
        file_of([ADD | {"positions": [2**40]}]),
        file_of([{name: value for name, value in ADD.items() if name != "layers"}]),
        file_of([{name: value for name, value in ADD.items() if name != "point"}]),
        file_of([ADD, ADD]),
        file_of([ADD], {}),
        file_of([ADD], {**VECTOR, "1.vector": VECTOR["0.vector"]}),
        file_of([ADD], {"0.direction": VECTOR["0.vector"]}),
        file_of([ADD], {"0.vector": np.ones(8, np.int8)}),
        file_of([ADD], {"0.vector": np.full(8, np.inf, np.float32)}),
        file_of([ADD], {"0.vector": np.full(8, 1e300)}),
    ],
)
def test_any_other_file_is_refused_in_a_sentence(data: bytes):
    with pytest.raises(ValueError, match=r"^steer\.safetensors is no file of interventions: ") as raised:
        decode_interventions(data, "steer.safetensors")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
