"""Logits are summarized alike by XLA and by the kernel for CPUs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_core.kernels import logits as module
from qwen2_core.kernels.cpu import library
from qwen2_core.kernels.cpu import logits as cpu_logits
from qwen2_core.kernels.logits import likeliest, summarize

RNG = np.random.default_rng(0)
# One logit; part of a vector; whole vectors; parts of pieces of 4,096; the vocabulary of Qwen2.5.
SIZES = [1, 7, 16, 37, 4096, 4097, 8209, 151_936]


class Found(NamedTuple):
    peak: jax.Array
    first: jax.Array
    log_sum: jax.Array


@pytest.fixture(params=["XLA", "AVX2", "AVX512_BF16"])
def summarized(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``summarize`` and ``likeliest``, by XLA or by the kernel with each kind of instructions."""
    if request.param == "XLA":
        monkeypatch.setattr(module, "is_available", lambda: False)
    elif not library.is_available() or library.Instructions[request.param] > library.instructions():
        pytest.skip(f"this machine has no kernels with {request.param}")
    else:
        monkeypatch.setattr(cpu_logits, "instructions", lambda: library.Instructions[request.param])

    @jax.jit
    def of(x: jax.Array) -> Found:
        summary = summarize(x)
        return Found(summary.peak, likeliest(x, summary), summary.log_sum)

    return of


def normal(rows: int, size: int) -> np.ndarray:
    return (4 * RNG.standard_normal((rows, size))).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_a_row_has_its_largest_logit_the_index_of_that_and_the_logarithm_of_the_sum(
    summarized: Any, size: int
):
    x = normal(3, size)
    got = summarized(x)
    np.testing.assert_array_equal(got.peak, x.max(-1))
    np.testing.assert_array_equal(got.first, x.argmax(-1))
    wide = x.astype(np.float64)
    expected = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    np.testing.assert_allclose(got.log_sum, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("places", [(0, 1), (5, 36), (3, 4096), (4095, 4096), (4097, 9000)])
def test_of_equal_logits_the_first_is_taken(summarized: Any, places: tuple[int, int]):
    x = normal(2, 9001)
    x[1, list(places)] = 50.0
    assert summarized(x).first[1] == places[0]


@pytest.mark.parametrize("place", [0, 6, 4096, 9000])
def test_a_row_with_nan_has_nan_and_some_token_and_others_are_not_touched(summarized: Any, place: int):
    x = normal(3, 9001)
    x[1, place] = np.nan
    got = summarized(x)
    assert np.isnan(got.log_sum[1])
    assert 0 <= got.first[1] <= 9000
    assert np.isfinite(got.log_sum[jnp.array([0, 2])]).all()
    np.testing.assert_array_equal(got.first[jnp.array([0, 2])], x[[0, 2]].argmax(-1))


@pytest.mark.parametrize("size", [1, 7, 37, 4100])
def test_a_row_of_nan_alone_has_nan_and_some_token(summarized: Any, size: int):
    x = normal(2, size)
    x[0] = np.nan
    got = summarized(x)
    assert np.isnan(got.log_sum[0])
    assert 0 <= got.first[0] < size
    assert got.first[1] == x[1].argmax()


def test_logits_of_minus_infinity_add_nothing_and_one_of_infinity_is_the_largest(summarized: Any):
    x = normal(3, 9001)
    x[0, 100:] = -np.inf  # whole pieces, and a part of one
    x[1, 4321] = np.inf
    x[2, :] = -np.inf
    got = summarized(x)
    wide = x[0, :100].astype(np.float64)
    np.testing.assert_allclose(got.log_sum[0], np.log(np.exp(wide).sum()), rtol=2e-6)
    assert (got.peak[1], got.first[1]) == (np.inf, 4321)
    assert (got.peak[2], got.first[2]) == (-np.inf, 0)
    assert np.isnan(x[2, 0] - got.log_sum[2])  # there is no probability


@pytest.mark.usefixtures("cpu_kernels")
def test_by_the_kernel_a_row_has_the_same_bits_among_any_number_of_others():
    summarized = jax.jit(lambda x: summarize(x))
    x = normal(9, 20_001)
    together = summarized(x)
    for rows in (slice(0, 1), slice(3, 5)):
        for of_some, of_all in zip(summarized(x[rows]), together, strict=True):
            np.testing.assert_array_equal(of_some, of_all[rows])


@pytest.mark.skipif(not library.is_available(), reason="no kernels for this CPU")
def test_the_kernel_runs_where_it_can_and_not_where_a_mesh_may_split_the_rows():
    def program() -> str:
        return jax.jit(lambda x: summarize(x)).lower(normal(2, 5)).as_text()

    assert "qwen2_cpu_logits" in program()
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert "qwen2_cpu_logits" not in program()
