"""The CPU kernel for bfloat16 matrices: sums of exact products, and rows that do not change each other."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from qwen2_core.kernels.cpu import library
from qwen2_core.kernels.cpu.library import is_available, unavailable_reason
from qwen2_core.kernels.cpu.matmul import cpu_matmul
from qwen2_core.kernels.matmul import MatrixInStack, linear, logits_f32

RNG = np.random.default_rng(0)
cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about CPUs")
needs_kernel = pytest.mark.skipif(not is_available(), reason=f"no CPU kernels: {unavailable_reason()}")


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(jnp.bfloat16)


def exact(x: np.ndarray, weights: np.ndarray, transposed: bool = False) -> np.ndarray:
    weights = weights.swapaxes(-1, -2) if transposed else weights
    return x.astype(np.float64) @ weights.astype(np.float64)


@pytest.fixture
def product(cpu_kernels: str) -> Any:
    return jax.jit(cpu_matmul, static_argnums=(2, 3))


# A single row, few and many, in blocks of 6, 12 or 32; panels of one pair of inputs, of 128, 256 and of 1024,
# whole and not; stripes of 32 outputs, their halves, chunks and groups, whole and not.
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
    alone = [] if transposed or cpu_kernels == "AMX" else [slice(0, 1)]
    for rows in [*alone, *several]:
        np.testing.assert_array_equal(product(x[rows], weights, transposed), whole[rows])
    beside_nan = np.asarray(product(x_of_nan, weights, transposed))
    np.testing.assert_array_equal(np.delete(beside_nan, 3, 0), np.delete(whole, 3, 0))
    assert np.isnan(beside_nan[3]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_weights_of_an_earlier_product_do_not_leak_into_a_later_one(product: Any, transposed: bool):
    """Panels are reused; those of fewer inputs end in what was there before."""
    x = normal(5, 64)
    shapes = [(32, n) if transposed else (n, 32) for n in (64, 34)]
    for _ in range(5):  # on whichever thread
        assert np.isnan(product(x, np.full(shapes[0], np.nan, jnp.bfloat16), transposed)).all()
        assert np.isfinite(product(x[:, :34], normal(*shapes[1]), transposed)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("leading", [(2, 3), (40, 2), (0,)])
def test_leading_axes_count_separate_products(product: Any, leading: tuple[int, ...], transposed: bool):
    x, weights = normal(*leading, 7, 64), normal(*leading, *((33, 64) if transposed else (64, 33)))
    got = product(x, weights, transposed)
    assert got.shape == (*leading, 7, 33)
    np.testing.assert_allclose(got, exact(x, weights, transposed), atol=1e-4)
    rounded = product(x, weights, transposed, jnp.bfloat16)
    np.testing.assert_array_equal(rounded, np.asarray(got).astype(jnp.bfloat16))


@pytest.mark.usefixtures("cpu_kernels")
def test_products_that_run_at_the_same_time_are_complete_and_do_not_block_each_other():
    weights, xs = [normal(256, 4864) for _ in range(3)], normal(150, 5, 256)
    expected = [exact(xs, w) for w in weights]
    together = jax.jit(lambda x, weights: [cpu_matmul(x, w, False) for w in weights])
    for i, x in enumerate(xs):  # each its own, so that what an earlier call left does not do
        for got, of_all in zip(together(x, weights), expected, strict=True):
            np.testing.assert_allclose(got, of_all[i], atol=1e-3)


def test_it_has_the_derivative_and_the_vmap_of_a_dot(product: Any):
    x, weights, upstream = normal(3, 4, 64), normal(3, 64, 32), normal(3, 4, 32).astype(np.float32)

    def loss(times: Any, x: Any, weights: Any) -> Any:
        return (times(x, weights) * upstream).sum()

    def kernel(x: Any, weights: Any) -> Any:
        return cpu_matmul(x, weights, False)

    got = jax.jit(jax.grad(lambda x, w: loss(kernel, x, w), (0, 1)))(x, weights)
    wide = [a.astype(np.float32) for a in (x, weights)]
    expected = jax.jit(jax.grad(lambda x, w: loss(jnp.matmul, x, w), (0, 1)))(*wide)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=2**-7, atol=1e-2)
    _, tangent = jax.jit(lambda *a: jax.jvp(kernel, a, a))(x, weights)
    np.testing.assert_allclose(tangent, 2 * exact(x, weights), atol=1e-3)
    np.testing.assert_array_equal(jax.jit(jax.vmap(kernel))(x, weights), product(x, weights, False))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_layer_of_a_stack_is_multiplied_as_if_it_were_alone(product: Any, rows: int, transposed: bool):
    x, stack = normal(rows, 64), normal(3, *((33, 64) if transposed else (64, 33)))
    for layer, weights in enumerate(stack):
        got = product(x, stack, transposed, jnp.float32, jnp.int32(layer))
        np.testing.assert_array_equal(got, product(x, weights, transposed))


def test_of_several_products_a_stack_has_those_of_a_layer_beside_each_other(product: Any):
    x, stack = normal(2, 7, 64), normal(3, 2, 64, 33)
    got = product(x, stack, False, jnp.float32, jnp.int32(2))
    np.testing.assert_array_equal(got, product(x, stack[2], False))


def test_a_stack_has_a_derivative_at_the_layer_that_is_used(product: Any):
    x, stack = normal(3, 64), normal(4, 64, 32)
    got = jax.jit(jax.grad(lambda stack: product(x, stack, False, jnp.float32, jnp.int32(1)).sum()))(stack)
    assert not np.asarray(got)[[0, 2, 3]].any()
    np.testing.assert_allclose(
        got[1].astype(np.float32),
        np.repeat(x.astype(np.float32).sum(0)[:, None], 32, 1),
        rtol=2**-7,
        atol=1e-2,
    )


def lowered(function: Any, *arguments: Any, **static: Any) -> str:
    return jax.jit(lambda *a: function(*a, **static)).lower(*arguments).as_text()


@needs_kernel
@pytest.mark.parametrize("rows", [1, 2])
def test_the_models_bfloat16_products_use_the_kernel(rows: int):
    kernel, embedding = normal(64, 32), normal(32, 64)
    assert "qwen2_cpu_matmul" in lowered(linear, normal(1, rows, 64), kernel)
    assert "qwen2_cpu_matmul" in lowered(logits_f32, normal(rows, 1, 64), embedding, tied=True)


def of_layer(x: Any, stack: Any, layer: Any) -> Any:
    return linear(x, MatrixInStack(stack, layer))


@needs_kernel
def test_a_matrix_in_a_stack_is_a_kernel_of_linear_and_stays_there():
    x, stack = normal(2, 64), normal(3, 64, 32)
    text = lowered(of_layer, x, stack, 1)
    assert "qwen2_cpu_matmul" in text
    assert "dynamic_slice" not in text
    np.testing.assert_array_equal(jax.jit(of_layer)(x, stack, 1), jax.jit(linear)(x, stack[1]))


def test_where_xla_multiplies_a_matrix_is_copied_out_of_its_stack():
    x, stack = normal(2, 63), normal(3, 63, 32)  # an odd number of inputs is not for the kernel
    np.testing.assert_array_equal(jax.jit(of_layer)(x, stack, 2), jax.jit(linear)(x, stack[2]))


@needs_kernel
@pytest.mark.parametrize(("shape", "used"), [((1, 1), True), ((1, 4), False)])
def test_arrays_that_a_mesh_may_split_are_left_to_xla(shape: tuple[int, int], used: bool):
    """XLA cannot split the kernel's call, and would gather the weights for it."""
    mesh = AbstractMesh(shape, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(linear)(normal(2, 64), normal(64, 32)))
    assert ("ffi_call" in text) == used


def test_float32_and_odd_numbers_of_inputs_do_not_use_the_kernel():
    kernel = normal(64, 32)
    others = {
        "float32": (normal(2, 64).astype(np.float32), kernel.astype(np.float32)),
        "an odd number of inputs": (normal(2, 63), normal(63, 32)),
    }
    for what, arguments in others.items():
        assert "qwen2_cpu_matmul" not in lowered(linear, *arguments), what


class TestWithoutTheKernels:
    """XLA multiplies, and the reason is one line that says what to do."""

    @pytest.fixture(autouse=True)
    def loaded_anew(self) -> Iterator[None]:
        library._load.cache_clear()
        yield
        library._load.cache_clear()

    def found(self, monkeypatch: pytest.MonkeyPatch, origin: str | None) -> None:
        spec = None if origin is None else SimpleNamespace(origin=origin)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    @cpu_only
    def test_an_install_without_a_compiler_says_so_and_multiplies_by_xla(self, monkeypatch):
        self.found(monkeypatch, None)
        assert "install a C++20 compiler" in unavailable_reason()
        assert "\n" not in unavailable_reason()
        x, kernel = normal(2, 64), normal(64, 32)
        assert "qwen2_cpu_matmul" not in lowered(linear, x, kernel)
        got = jax.jit(lambda x, kernel: linear(x, kernel))(x, kernel)
        np.testing.assert_allclose(got.astype(np.float32), exact(x, kernel), rtol=2**-8, atol=1e-4)

    @cpu_only
    def test_a_library_that_cannot_be_loaded_is_a_reason_and_no_crash(self, monkeypatch, tmp_path: Path):
        (tmp_path / "_kernels.so").write_text("of another machine")
        self.found(monkeypatch, str(tmp_path / "_kernels.so"))
        assert "cannot be loaded" in unavailable_reason()
        assert "install this package again" in unavailable_reason()
        assert not is_available()

    @cpu_only
    @pytest.mark.parametrize("interface", [None, library._INTERFACE - 1])
    def test_a_library_compiled_from_older_sources_is_not_called(self, monkeypatch, interface: int | None):
        versions = {} if interface is None else {"CpuInterface": lambda: interface}
        monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(**versions))
        self.found(monkeypatch, "_kernels.so")
        assert "other sources" in unavailable_reason()
        assert "install this package again" in unavailable_reason()

    @cpu_only
    def test_a_cpu_without_the_instructions_is_told_which_have_them(self, monkeypatch):
        versions = {"CpuInterface": lambda: library._INTERFACE, "CpuInstructions": lambda: -1}
        monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(**versions))
        self.found(monkeypatch, "_kernels.so")
        assert "no AVX2 instructions; use an x86 CPU of the last ten years" in unavailable_reason()

    def test_on_an_accelerator_nothing_is_said_and_nothing_is_loaded(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail("the library is loaded"))
        assert unavailable_reason() == ""
        assert not is_available()
        x, kernel = normal(2, 66), normal(66, 32)  # of a shape that no other test has had traced
        assert "qwen2_cpu_matmul" not in str(jax.make_jaxpr(linear)(x, kernel))
