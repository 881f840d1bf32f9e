"""Dense Qwen3 in every loop, without torch: the engine, both precisions, programs and published sizes.

``test_parity_torch`` compares it with Transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np
import pytest
from lively import SHALLOW, THREE, Lively, assert_lively, pad_right, row_errors
from qwen3_sizes import SIZES, qwen3

from generate_jitted import GenerateShape, Sampling, generate_single_task_jitted, lower_generate
from qwen2_core.kernels.cpu.library import is_available, unavailable_reason
from qwen2_core.kernels.matmul import compiler_options
from qwen2_core.parameter_checks import abstract_params
from qwen2_core.sharding import Layout
from qwen2_core.tensor_names import tensor_specs
from qwen2_engine import ContinuousEngine, SequenceRequest
from qwen2_jax_with_hooks import create_model_with_hooks

QWEN3 = dataclasses.replace(THREE, layers=2, extract=(0, 1))
WIDE = dataclasses.replace(QWEN3, head_dim=128, tied=False)  # heads as the published sizes have them
LENGTHS = (1, 17, 40, 64, 33)
STEPS = 48
SAMPLING = Sampling(temperature=1.0, top_k=50)
needs_kernel = pytest.mark.skipif(not is_available(), reason=f"no CPU kernels: {unavailable_reason()}")


@functools.cache
def built(lively: Lively, dtype: str) -> tuple[Any, Any]:
    return lively.build(dtype=dtype, scan_layers=True)


def by_engine(lively: Lively, dtype: str, order: int = 1) -> dict[int, Any]:
    requests = [
        SequenceRequest(prompt, STEPS, sampling_id=i, id=i, capture_prompt=True)
        for i, prompt in enumerate(lively.prompts(LENGTHS))
    ]
    engine = ContinuousEngine(
        *built(lively, dtype), slots=2, max_tokens=STEPS, sampling=SAMPLING, seed=3, capture_prompt=True
    )
    return {one.id: one for one in engine.run(requests[::order])}


def by_call(lively: Lively, dtype: str) -> Any:
    ids, lengths = pad_right(lively.prompts(LENGTHS), fill=5)
    return generate_single_task_jitted(
        *built(lively, dtype), ids, STEPS, prompt_lengths=lengths, sampling=SAMPLING, seed=3,
        extract_prompt=True,
    )  # fmt: skip


def test_the_engines_sequences_are_those_of_one_call():
    finished, out = by_engine(WIDE, "float32"), by_call(WIDE, "float32")
    assert_lively(out.token_ids)
    for i, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(finished[i].token_ids, out.token_ids[i])
        rows = np.concatenate([out.prompt_activations[:, :length, i], out.activations[:, :, i]], axis=1)
        assert row_errors(finished[i].rows, rows).max() < 1e-4


@pytest.mark.slow
def test_a_growing_cache_gives_the_logits_of_one_pass():
    """What the old Python loop does."""
    model, params = built(QWEN3, "float32")
    ids = np.stack(QWEN3.prompts((20, 20)))
    whole = model.apply({"params": params}, ids)[0]
    first, caches, _ = model.apply({"params": params}, ids[:, :13])
    second, _, _ = model.apply({"params": params}, ids[:, 13:], kv_caches=caches, position_offset=13)
    assert row_errors(np.concatenate([first, second], axis=1), whole).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_kernel)])
def test_neither_slot_nor_neighbours_change_a_bit(dtype: str):
    in_order, reversed_ = by_engine(WIDE, dtype), by_engine(WIDE, dtype, order=-1)
    assert list(reversed_) != list(in_order)
    for i, one in in_order.items():
        np.testing.assert_array_equal(one.token_ids, reversed_[i].token_ids)
        np.testing.assert_array_equal(one.rows, reversed_[i].rows)


@pytest.mark.slow
def test_bfloat16_rows_are_near_those_of_float32():
    """Teacher-forced over what bfloat16 chose; a lively model's own rounding is some per cent."""
    finished = by_engine(WIDE, "bfloat16")
    model, params = built(WIDE, "float32")
    for i, prompt in enumerate(WIDE.prompts(LENGTHS)):
        ids = np.concatenate([prompt, finished[i].token_ids])[None]
        _, _, rows = model.apply({"params": params}, ids)
        assert np.median(row_errors(finished[i].rows, rows[:, :, 0])) < 0.03


# --- Programs -----------------------------------------------------------------------------------------------


def decode_of(lively: Lively) -> tuple[Any, int]:
    """The decode loop of scanned layers, and the bytes of its state."""
    model = create_model_with_hooks(lively.config(scan_layers=True), lively.extract)
    params, shape = abstract_params(model.config, Layout()), GenerateShape(8, 64, 64)
    return lower_generate(model, params, shape)[1], shape.nbytes(model)


def test_a_layer_computes_four_norms_once_each_and_a_qwen2_two():
    """Beside the final one. And all is updated in place."""
    assert len(re.findall(r"stablehlo\.rsqrt", decode_of(SHALLOW)[0].as_text())) == 3
    lowered, state_bytes = decode_of(WIDE)
    decode: Any = lowered.compile(compiler_options())
    assert len(re.findall(r"= f32\S* rsqrt\(", decode.as_text())) == 5
    memory = decode.memory_analysis()
    assert memory.output_size_in_bytes >= state_bytes
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096


def test_a_qwen3_has_no_bias_and_a_qwen2_no_norm_of_heads():
    qwen3_names, qwen2_names = (list(tensor_specs(one.config())) for one in (QWEN3, SHALLOW))
    assert not [name for name in qwen3_names if name.endswith("bias")]
    assert not [name for name in qwen2_names if "q_norm" in name or "k_norm" in name]
    assert len([name for name in qwen3_names if name.endswith(("q_norm.weight", "k_norm.weight"))]) == 4


# --- Published sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_a_published_size_has_the_parameters_of_its_model_card(name: str):
    config, size = qwen3(name), SIZES[name]
    counts = {name: math.prod(spec.shape) for name, spec in tensor_specs(config).items()}
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert abs(sum(counts.values()) / 1e9 - size.billions) < 0.051
    assert abs((sum(counts.values()) - tables) / 1e9 - size.without_embeddings) < 0.051


@pytest.mark.parametrize("name", ["0.6B", pytest.param("4B", marks=pytest.mark.slow)])
def test_a_published_size_is_traced_with_the_default_layers(name: str):
    """Prefill and decode, by shape alone; the larger sizes on a mesh, in ``eight_devices``."""
    model = create_model_with_hooks(qwen3(name))
    assert model.capture_layers == tuple(range(10, 24))
    shape = GenerateShape(8, 256, 1100)
    prefill, decode = lower_generate(model, abstract_params(model.config, Layout()), shape)
    rows = re.findall(r"tensor<14x1100x8x(\d+)xbf16>", decode.as_text())
    assert set(rows) == {str(model.config.hidden_size)}
    assert "14x256x8x" not in prefill.as_text()  # no prompt rows were asked for
