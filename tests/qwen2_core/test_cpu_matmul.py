"""Our own product of bfloat16 matrices: sums of exact products, and rows that do not know each other."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from qwen2_core.kernels.cpu import matmul as module
from qwen2_core.kernels.cpu.matmul import cpu_product, why_not
from qwen2_core.kernels.matmul import linear, logits_f32

RNG = np.random.default_rng(0)
needs_kernel = pytest.mark.skipif(
    jax.default_backend() != "cpu" or bool(why_not()), reason=f"no kernel of our own here: {why_not()}"
)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(jnp.bfloat16)


def exact(x: np.ndarray, weights: np.ndarray, transposed: bool = False) -> np.ndarray:
    weights = weights.swapaxes(-1, -2) if transposed else weights
    return x.astype(np.float64) @ weights.astype(np.float64)


@pytest.fixture
def product(cpu_kernels: str) -> Any:
    return jax.jit(lambda *a: cpu_product(*a), static_argnums=(2, 3))


# A single row, few and many, in blocks of 12 or 32; panels of one pair of inputs, of 256 and of 1024, whole
# and not; stripes of 32 outputs, their halves, chunks and groups, whole and not.
SHAPES = [
    (1, 2, 1),
    (1, 896, 33),
    (1, 1026, 600),
    (2, 896, 33),
    (8, 258, 31),
    (12, 64, 16),
    (13, 1026, 600),
    (25, 512, 17),
    (64, 300, 96),
    (65, 2050, 290),
    (600, 1090, 288),
    (150, 96, 1),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_results_are_float32_sums_of_exact_products(
    product: Any, rows: int, inputs: int, outputs: int, transposed: bool
):
    x, weights = normal(rows, inputs), normal(*((inputs, outputs) if not transposed else (outputs, inputs)))
    got = np.asarray(product(x, weights, transposed))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact(x, weights, transposed), atol=1e-6 * inputs)
    # Rounded, by a program of its own.
    np.testing.assert_array_equal(product(x, weights, transposed, jnp.bfloat16), got.astype(jnp.bfloat16))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_has_the_same_bits_among_any_number_of_others(product: Any, cpu_kernels: str, transposed: bool):
    x, weights = normal(80, 1100), normal(*((1100, 70) if not transposed else (70, 1100)))
    whole = np.asarray(product(x, weights, transposed))
    x_of_nan = x.copy()
    x_of_nan[3] = np.nan
    several = [slice(5, 7), slice(40, 53), slice(10, 75)]
    alone = [] if transposed or cpu_kernels == "tiles" else [slice(0, 1)]
    for rows in [*alone, *several]:
        np.testing.assert_array_equal(product(x[rows], weights, transposed), whole[rows])
    beside_nan = np.asarray(product(x_of_nan, weights, transposed))
    np.testing.assert_array_equal(np.delete(beside_nan, 3, 0), np.delete(whole, 3, 0))
    assert np.isnan(beside_nan[3]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_an_earlier_product_do_not_reach_a_later_one(product: Any, transposed: bool):
    """Panels are reused; those of fewer inputs end in what was there before."""
    x = normal(5, 64)
    shapes = [(32, n) if transposed else (n, 32) for n in (64, 34)]
    for _ in range(5):  # on whichever thread
        assert np.isnan(product(x, np.full(shapes[0], np.nan, jnp.bfloat16), transposed)).all()
        assert np.isfinite(product(x[:, :34], normal(*shapes[1]), transposed)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("leading", [(2, 3), (40, 2), (0,)])
def test_leading_axes_are_those_of_separate_products(
    product: Any, leading: tuple[int, ...], transposed: bool
):
    x, weights = normal(*leading, 7, 64), normal(*leading, *((33, 64) if transposed else (64, 33)))
    got = product(x, weights, transposed)
    assert got.shape == (*leading, 7, 33)
    np.testing.assert_allclose(got, exact(x, weights, transposed), atol=1e-4)
    rounded = product(x, weights, transposed, jnp.bfloat16)
    np.testing.assert_array_equal(rounded, np.asarray(got).astype(jnp.bfloat16))


@pytest.mark.usefixtures("cpu_kernels")
def test_products_side_by_side_are_whole_when_they_return_and_do_not_wait_for_each_other():
    weights, xs = [normal(256, 4864) for _ in range(3)], normal(150, 5, 256)
    expected = [exact(xs, w) for w in weights]
    together = jax.jit(lambda x, weights: [cpu_product(x, w, False) for w in weights])
    for i, x in enumerate(xs):  # each its own, so that what an earlier call left does not do
        for got, of_all in zip(together(x, weights), expected, strict=True):
            np.testing.assert_allclose(got, of_all[i], atol=1e-3)


def test_it_can_be_differentiated_and_mapped_as_a_dot_can(product: Any):
    x, weights, upstream = normal(3, 4, 64), normal(3, 64, 32), normal(3, 4, 32).astype(np.float32)

    def loss(times: Any, x: Any, weights: Any) -> Any:
        return (times(x, weights) * upstream).sum()

    def ours(x: Any, weights: Any) -> Any:
        return cpu_product(x, weights, False)

    got = jax.jit(jax.grad(lambda x, w: loss(ours, x, w), (0, 1)))(x, weights)
    wide = [a.astype(np.float32) for a in (x, weights)]
    expected = jax.jit(jax.grad(lambda x, w: loss(jnp.matmul, x, w), (0, 1)))(*wide)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=2**-7, atol=1e-2)
    _, tangent = jax.jit(lambda *a: jax.jvp(ours, a, a))(x, weights)
    np.testing.assert_allclose(tangent, 2 * exact(x, weights), atol=1e-3)
    np.testing.assert_array_equal(jax.jit(jax.vmap(ours))(x, weights), product(x, weights, False))


def lowered(function: Any, *arguments: Any, **static: Any) -> str:
    return jax.jit(lambda *a: function(*a, **static)).lower(*arguments).as_text()


@needs_kernel
@pytest.mark.parametrize("rows", [1, 2])
def test_the_model_s_bfloat16_products_use_it(rows: int):
    kernel, embedding = normal(64, 32), normal(32, 64)
    assert "qwen2_cpu_product" in lowered(linear, normal(1, rows, 64), kernel)
    assert "qwen2_cpu_product" in lowered(logits_f32, normal(rows, 1, 64), embedding, tied=True)


@needs_kernel
@pytest.mark.parametrize(("shape", "used"), [((1, 1), True), ((1, 4), False)])
def test_what_a_mesh_may_split_is_left_to_xla(shape: tuple[int, int], used: bool):
    """XLA cannot split our call, and would gather the weights for it."""
    mesh = AbstractMesh(shape, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(linear)(normal(2, 64), normal(64, 32)))
    assert ("ffi_call" in text) == used


def test_other_products_do_not_use_it():
    kernel = normal(64, 32)
    others = {
        "float32": (normal(2, 64).astype(np.float32), kernel.astype(np.float32)),
        "an odd number of inputs": (normal(2, 63), normal(63, 32)),
    }
    for what, arguments in others.items():
        assert "qwen2_cpu_product" not in lowered(linear, *arguments), what


def test_without_the_compiled_part_xla_multiplies_and_the_reason_is_a_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    module.why_not.cache_clear()
    try:
        assert "compiler" in why_not()
        x, kernel = normal(2, 64), normal(64, 32)
        assert "qwen2_cpu_product" not in lowered(linear, x, kernel)
        got = jax.jit(lambda x, kernel: linear(x, kernel))(x, kernel)
        np.testing.assert_allclose(got.astype(np.float32), exact(x, kernel), rtol=2**-8, atol=1e-4)
    finally:
        monkeypatch.undo()
        module.why_not.cache_clear()


@needs_kernel
def test_a_library_compiled_from_older_sources_is_not_called(monkeypatch):
    monkeypatch.setattr(module, "_INTERFACE", module._INTERFACE + 1)
    module.why_not.cache_clear()
    try:
        assert "install the package again" in why_not()
    finally:
        monkeypatch.undo()
        module.why_not.cache_clear()
