"""Products: float32 results in every form, and on CPU no temporaries of the weights' size."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_core.kernels import matmul
from qwen2_core.kernels.matmul import compiler_options, embed, linear, logits_f32

RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = jnp.bfloat16) -> np.ndarray:
    return RNG.standard_normal(shape).astype(jnp.dtype(dtype))


def exact(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ kernel.astype(np.float64)


@pytest.fixture(params=["where it can run", "nowhere"])
def cpu_kernels_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test with the CPU kernels, where the machine has them, and as on a machine without them."""
    if request.param == "nowhere":
        monkeypatch.setattr(matmul, "is_available", lambda: False)


@pytest.mark.usefixtures("cpu_kernels_or_not")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("size", "outputs"), [(896, 128), (4864, 64), (97, 33), (13, 1)])
def test_logits_are_float32_sums_of_exact_products(dtype, size: int, outputs: int):
    @jax.jit
    def untied_and_tied(xs, kernel, embedding):
        return [(logits_f32(x, kernel, tied=False), logits_f32(x, embedding, tied=True)) for x in xs]

    kernel = normal(size, outputs, dtype=dtype)
    xs = [normal(*rows, size, dtype=dtype) for rows in ((1, 1), (2, 1), (1, 9))]
    for x, both in zip(xs, untied_and_tied(xs, kernel, np.ascontiguousarray(kernel.T)), strict=True):
        expected = exact(x, kernel)
        tolerance = 1e-6 * np.sqrt(size) * max(1.0, np.abs(expected).max())
        for got in both:
            assert got.dtype == jnp.float32
            assert got.shape == (*x.shape[:-1], outputs)
            np.testing.assert_allclose(got, expected, atol=tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("subscripts", "a_shape", "b_shape"),
    [
        ("rqkgd,rkld->rqkgl", (2, 5, 3, 7, 64), (2, 3, 40, 64)),  # scores
        ("rqkgpl,rkpld->prqkgd", (2, 5, 3, 7, 4, 10), (2, 3, 4, 10, 64)),  # weighted values, in pieces
        ("rqkgpl,rkpld->prqkgd", (2, 1, 3, 7, 1, 13), (2, 3, 1, 13, 64)),  # of an odd number of keys
    ],
)
def test_an_einsum_of_activations_is_a_float32_sum_of_exact_products(
    dtype, subscripts: str, a_shape, b_shape
):
    a, b = normal(*a_shape, dtype=dtype), normal(*b_shape, dtype=dtype)
    got = jax.jit(lambda a, b: matmul.einsum_f32(subscripts, a, b))(a, b)
    assert got.dtype == jnp.float32
    expected = np.einsum(subscripts, a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(got, expected, atol=3e-5)


@pytest.mark.parametrize("outputs", [1, 7, 24, 25, 1187])
@pytest.mark.parametrize("tied", [False, True])
def test_a_row_multiplied_in_chunks_of_outputs_equals_the_row_multiplied_at_once(
    monkeypatch, outputs: int, tied: bool
):
    monkeypatch.setattr(matmul, "is_available", lambda: False)

    def both(x, weights):
        whole = logits_f32(x, weights, tied=tied)
        monkeypatch.setattr(matmul, "_PARTIAL_BYTES", 100)
        return whole, logits_f32(x, weights, tied=tied)

    weights = normal(outputs, 56) if tied else normal(56, outputs)
    whole, in_chunks = jax.jit(both)(normal(1, 1, 56), weights)
    np.testing.assert_allclose(in_chunks, whole, atol=1e-5)


def test_a_linear_layer_adds_its_bias_in_float32_and_returns_its_inputs_dtype():
    x, kernel, bias = normal(1, 1, 896), normal(896, 64), normal(64)
    got = jax.jit(linear)(x, kernel, bias)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(got, np.float64), exact(x, kernel) + bias.astype(np.float64), rtol=2**-8, atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_single_row_on_gpus_is_the_first_of_two_equal_ones(
    dtype: str, tied: bool, monkeypatch: pytest.MonkeyPatch
):
    def as_on_a_gpu(*operands: Any, default: Any, **forms: Any) -> Any:
        return forms.get("cuda", default)(*operands)

    monkeypatch.setattr(matmul, "by_platform", as_on_a_gpu)
    row, weights = normal(1, 1, 896, dtype=dtype), normal(*((48, 896) if tied else (896, 48)), dtype=dtype)
    multiply = jax.jit(lambda x, weights: logits_f32(x, weights, tied=tied))
    got, of_two = multiply(row, weights), multiply(np.repeat(row, 2, 1), weights)
    assert got.shape == (1, 1, 48)
    np.testing.assert_array_equal(got, of_two[:, :1])


@pytest.mark.parametrize(
    ("platform", "dtype", "rows", "multiplied"),
    [
        ("cuda", "bfloat16", 1, 2),
        ("rocm", "float16", 1, 2),
        ("cuda", "bfloat16", 3, 3),
        ("cuda", "float32", 1, 1),
        ("tpu", "bfloat16", 1, 1),
    ],
)
def test_only_on_gpus_and_of_16_bits_is_a_single_row_two(
    platform: str, dtype: str, rows: int, multiplied: int
):
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, 896), (896, 48))]
    lowered = jax.jit(linear).trace(*operands).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert re.findall(r"dot_general.*-> tensor<(\d+)x48xf32>", text) == [str(multiplied)]
    assert text.count("optimization_barrier") == (multiplied != rows)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")
@pytest.mark.usefixtures("cpu_kernels_or_not")
@pytest.mark.parametrize("tied", [False, True])
def test_multiplying_one_row_needs_temporaries_of_a_fraction_of_the_weights(tied: bool):
    """XLA's own dot of one row would convert all weights to float32, twice their size."""
    weights = jax.ShapeDtypeStruct((151936, 896) if tied else (896, 4864), jnp.bfloat16)

    def loop(x, weights):
        def body(_, x):
            return x + logits_f32(x, weights, tied=tied).mean().astype(x.dtype)

        return jax.lax.fori_loop(0, 3, body, x)

    lowered = jax.jit(loop).lower(jax.ShapeDtypeStruct((1, 1, 896), jnp.bfloat16), weights)
    temporaries: Any = lowered.compile(compiler_options()).memory_analysis()
    assert temporaries.temp_size_in_bytes < 6e6


def test_a_token_id_outside_the_vocabulary_gives_nan():
    table = normal(5, 8)
    got = np.asarray(jax.jit(embed)(np.array([4, 5, -1]), table))
    np.testing.assert_array_equal(got[0], table[4])
    assert np.isnan(got[1:].astype(np.float32)).all()
