"""JAX's settings, which are the user's: results are the same under all of them, or the call is refused."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec
from lively import Lively
from runner_cases import run_python

import generate_jitted
from generate_jitted import Sampling, generate_single_task_jitted
from qwen2_core.compilation import check_settings, defined_settings
from qwen2_core.parameter_checks import check_places
from qwen2_core.requests import SequenceRequest
from qwen2_core.weights import load_qwen2
from qwen2_engine import programs
from qwen2_engine.continuous_batching import ContinuousEngine
from qwen2_engine.python_loop import generate_single_task_python
from qwen2_jax import QwenModel

TINY = Lively(layers=2, extract=(0, 1), hidden=32, inner=48, vocab=96)
TALLER = Lively(layers=3, extract=(0, 1))
IDS = np.array([[3, 4, 5, 6], [7, 8, 9, 1]], np.int32)


@functools.cache
def built() -> tuple[Any, Any]:
    return TINY.build(scan_layers=True)


def one_call(**changes: Any) -> list[np.ndarray]:
    model, params = built()
    out = generate_single_task_jitted(
        model, params, IDS, 4, prompt_lengths=[4, 3], sampling=Sampling(1.0, 20, 0.9), seed=3, **changes
    )
    return [*map(np.asarray, jax.tree.leaves(out)), out.layer(1, row=0), np.array(out.tokens(1))]


def in_slots() -> list[np.ndarray]:
    engine = ContinuousEngine(*built(), slots=1, sampling=Sampling(1.0), seed=1)
    [done] = engine.run([SequenceRequest(IDS[0], 3, 0)])
    assert done.rows is not None
    return [done.token_ids, done.logprobs, done.rows]


def eager() -> list[np.ndarray]:
    model, params = built()
    logits, _, rows = model.apply({"params": params}, IDS)
    assert logits.dtype == rows.dtype == jnp.float32
    return [np.asarray(logits), np.asarray(rows)]


@functools.cache
def expected(function: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    return function()


def assert_as_expected(function: Callable[[], list[np.ndarray]]) -> None:
    for got, by_default in zip(function(), expected(function), strict=True):
        assert got.dtype == by_default.dtype
        np.testing.assert_array_equal(got, by_default)


def clear_programs() -> None:
    """Forgets what is compiled: the settings of the next call must count."""
    for module in (generate_jitted, programs):
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    jax.clear_caches()


@contextlib.contextmanager
def setting(changes: dict[str, Any]) -> Iterator[None]:
    """Sets what the user's process has set; the values of before come back."""
    before = {name: jax.config.values[name] for name in changes}
    try:
        for name, value in changes.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


STRICT = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_legacy_prng_key": "error",
    "jax_transfer_guard": "disallow",
    "jax_allow_f16_reductions": False,
    "jax_debug_infs": True,
    "jax_debug_nans": True,
}
OTHER = {
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 5,
    "jax_high_dynamic_range_gumbel": True,
    "jax_default_matmul_precision": "bfloat16",
    "jax_disable_jit": True,
    "jax_check_tracer_leaks": True,
    "jax_use_shardy_partitioner": False,
}


each_set = pytest.mark.parametrize("changes", [STRICT, OTHER], ids=["strict", "other numbers"])


def assert_the_same_under(changes: dict[str, Any], function: Callable[[], list[np.ndarray]]) -> None:
    expected(function)
    clear_programs()
    with setting(changes):
        assert_as_expected(function)
    clear_programs()


@each_set
def test_a_call_gives_the_same_under_all_settings_at_once(changes: dict[str, Any]):
    assert_the_same_under(changes, one_call)


@pytest.mark.slow
@each_set
@pytest.mark.parametrize("function", [in_slots, eager])
def test_slots_and_the_bare_model_give_the_same_under_all_settings_at_once(changes, function):
    assert_the_same_under(changes, function)


@pytest.mark.slow
@each_set
def test_the_python_loop_and_loading_do_not_depend_on_settings_either(tmp_path, changes: dict[str, Any]):
    checkpoint = TINY.save(tmp_path / "model")

    def looped() -> list[np.ndarray]:
        config, params = load_qwen2(checkpoint)
        out = generate_single_task_python(QwenModel(config), params, IDS, 2, sampling=Sampling(1.0), seed=3)
        return [np.asarray(leaf) for leaf in (*jax.tree.leaves(params), *jax.tree.leaves(out))]

    assert_the_same_under(changes, looped)


@pytest.mark.filterwarnings("ignore:.with mesh")  # the old form, which users still have
@pytest.mark.parametrize(
    "surrounding",
    [
        lambda: jax.set_mesh(jax.make_mesh((1,), ("x",))),
        lambda: jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))),
        lambda: jax.make_mesh((1,), ("x",)),
        lambda: jax.default_device(jax.devices()[0]),
        lambda: jax.named_scope("mine"),
        lambda: jax.no_tracing(),
        lambda: jax.ensure_compile_time_eval(),
    ],
    ids=["explicit mesh", "auto mesh", "with mesh", "device", "scope", "no tracing", "compile time"],
)
def test_a_block_around_the_call_changes_nothing(surrounding):
    expected(one_call)
    with surrounding():
        assert_as_expected(one_call)


def test_a_mesh_around_the_call_is_in_no_program():
    clear_programs()
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        first = one_call()
    for got, again in zip(one_call(), first, strict=True):
        np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize("function", [one_call, pytest.param(in_slots, marks=pytest.mark.slow)])
def test_changing_settings_never_traces_anew(function, monkeypatch: pytest.MonkeyPatch):
    expected(function)
    function()  # another test may have forgotten what was compiled
    monkeypatch.setattr(generate_jitted, "lower_generate", pytest.fail)
    monkeypatch.setattr(programs, "axes_of", pytest.fail)
    for changes in (STRICT, OTHER):
        with setting(changes):
            assert_as_expected(function)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_disable_most_optimizations", True),
        ("jax_optimization_level", "O0"),
        ("jax_exec_time_optimization_effort", 0.5),
        ("jax_memory_fitting_level", "O0"),
        ("jax_error_checking_behavior_nan", "raise"),
    ],
)
def test_a_setting_that_nobody_but_the_user_can_change_is_refused_by_name(name: str, value: Any):
    before = jax.config.values[name]
    with setting({name: value}):
        for call in (one_call, lambda: ContinuousEngine(*built())):
            with pytest.raises(ValueError, match=f"^JAX's setting {name} is .* leave it at ") as caught:
                call()
            assert name.upper() in str(caught.value)
    assert jax.config.values[name] == before


@pytest.mark.parametrize("flag", ["=true", "", "=1", "=false --xla_cpu_enable_fast_math=True"])
def test_xla_flags_for_fast_math_are_refused_by_name(flag: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_other=1 --xla_cpu_enable_fast_math{flag}")
    with pytest.raises(ValueError, match="XLA_FLAGS sets xla_cpu_enable_fast_math, with which"):
        check_settings()


@pytest.mark.parametrize(
    "flags", ["", "--xla_cpu_enable_fast_math=false", "--xla_cpu_enable_fast_math=0", "--xla_other=true"]
)
def test_other_xla_flags_are_the_users(flags: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    check_settings()


def test_the_partitioner_matters_on_a_mesh_alone():
    with setting({"jax_use_shardy_partitioner": False}):
        check_settings()
        with pytest.raises(ValueError, match="jax_use_shardy_partitioner is False"):
            check_settings(mesh=True)


def test_the_settings_of_the_process_come_back_also_after_an_error():
    with contextlib.suppress(ZeroDivisionError), setting({"jax_enable_x64": True}):
        with contextlib.suppress(ZeroDivisionError), defined_settings():
            assert jnp.zeros(2, int).dtype == jnp.int32
            raise ZeroDivisionError
        assert jnp.zeros(2, int).dtype == jnp.int64


def test_nan_is_found_for_those_who_look_for_it():
    model, params = built()
    broken = params | {"norm": {"weight": params["norm"]["weight"] * np.nan}}
    kwargs: dict[str, Any] = {"sampling": Sampling(1.0), "seed": 1}
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="which jax_debug_nans looks for"):
        generate_single_task_jitted(model, broken, IDS, 4, prompt_lengths=[4, 3], **kwargs)
    engine = ContinuousEngine(model, broken, slots=1, **kwargs)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="which jax_debug_nans looks for"):
        list(engine.run([SequenceRequest(IDS[0], 3, 0)]))


# --- Where it is called -------------------------------------------------------------------------------------


def _grad(params: Any) -> Any:
    return generate_single_task_jitted(built()[0], params, IDS, 4).logprobs.sum()


@pytest.mark.parametrize(
    "call",
    [
        lambda params: jax.jit(lambda p: one_call())(0.0),  # without any traced argument
        lambda params: jax.jit(_grad)(params),
        lambda params: jax.grad(_grad)(params),
        lambda params: jax.eval_shape(_grad, params),
        lambda params: jax.vmap(lambda ids: generate_single_task_jitted(*built(), ids, 4).lengths)(IDS[None]),
        lambda params: jax.jit(lambda ids: generate_single_task_python(*built(), ids, 4).lengths)(IDS),
        lambda params: jax.jit(lambda p: ContinuousEngine(built()[0], p))(params),
        lambda params: jax.make_jaxpr(lambda mask: one_call(attention_mask=mask))(IDS > 0),
    ],
    ids=["jit", "jit of params", "grad", "eval_shape", "vmap", "python loop", "engine", "make_jaxpr"],
)
def test_a_call_inside_a_transformation_of_jax_is_refused(call):
    with pytest.raises(ValueError, match=r"cannot be called inside jax\.jit, vmap, grad or eval_shape: call"):
        call(built()[1])


def test_a_call_inside_flax_interceptors_is_refused():
    def doubled(method, args, kwargs, context):
        return method(*args, **kwargs)

    with nn.intercept_methods(doubled):
        for call in (one_call, lambda: ContinuousEngine(*built())):
            with pytest.raises(ValueError, match=r"cannot be called inside flax\.linen\.intercept_methods"):
                call()


def test_deleted_parameters_are_refused():
    model, params = built()
    donated = jax.tree.map(jnp.copy, params)
    donated["norm"]["weight"].delete()
    with pytest.raises(ValueError, match="were deleted, for instance donated to a jitted function"):
        generate_single_task_jitted(model, donated, IDS, 4)


class OfTorch:
    shape, dtype = (32,), "torch.float32"

    def detach(self) -> OfTorch:
        return self


# --- Parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: None, "params must be the parameter tree of load_qwen2, not a NoneType"),
        (lambda p: list(p), "not a list"),
        (lambda p: {"params": p}, r'pass variables\["params"\]'),
        (lambda p: {k: v for k, v in p.items() if k != "norm"}, "norm/weight is missing"),
        (lambda p: {}, "The layers of params are not stacked"),
        (lambda p: p | {"lm_head": {"kernel": np.zeros((32, 96))}}, "lm_head/kernel is not of this model"),
        (lambda p: p | {"norm": {"weight": np.ones(7, np.float32)}}, r"shape \(7,\) instead of \(32,\)"),
        (lambda p: p | {"norm": {"weight": "x"}}, "norm/weight has the shape None"),
        (lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), "params hold bfloat16"),
        (lambda p: jax.tree.map(lambda x: np.asarray(x, np.float64), p), "params hold float64"),
        (lambda p: TALLER.build(scan_layers=True)[1], "do not belong to this model .* more; use"),
        (lambda p: TINY.build()[1], "The layers of params are not stacked, .* scan_layers=True"),
        (
            lambda p: jax.device_put(p, NamedSharding(jax.make_mesh((1,), ("x",)), PartitionSpec())),
            r"params lie on a mesh with explicit axes \('x',\): load them with",
        ),
        (lambda p: p | {"norm": {"weight": OfTorch()}}, r"params hold tensors of torch \(norm/weight\)"),
    ],
    ids=range(14),
)  # fmt: skip
def test_parameters_of_another_model_are_refused_before_anything_is_traced(
    change, message: str, monkeypatch: pytest.MonkeyPatch
):
    model, params = built()
    params = change(params)
    monkeypatch.setattr(generate_jitted, "_compile", pytest.fail)
    for call in (
        lambda: generate_single_task_jitted(model, params, IDS, 4),
        lambda: generate_single_task_python(model, params, IDS, 4),
        lambda: ContinuousEngine(model, params),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model", [None, TINY.config(), "Qwen/Qwen2.5-0.5B", nn.Dense(3)], ids=lambda m: type(m).__name__
)
def test_what_is_no_model_is_refused(model: Any):
    for call in (
        lambda: inspect.unwrap(generate_single_task_jitted)(model, built()[1], IDS, 4),
        lambda: inspect.unwrap(generate_single_task_python)(model, built()[1], IDS, 4),
        lambda: ContinuousEngine(model, built()[1]),
    ):
        with pytest.raises(ValueError, match="model must be a QwenModel, such as create_model_with_hooks"):
            call()


@pytest.mark.slow
def test_a_bound_model_is_refused():
    model, params = built()
    bound = model.bind({"params": params})
    with pytest.raises(ValueError, match=r"model is bound to variables: give the model itself"):
        generate_single_task_jitted(bound, params, IDS, 4)


def test_parameters_on_several_devices_are_refused():
    first, second = (
        types.SimpleNamespace(sharding=types.SimpleNamespace(device_set={place}))
        for place in ("cpu:0", "cpu:1")
    )
    check_places([first, first, np.zeros(2)])
    with pytest.raises(ValueError, match="params lie apart, on cpu:0, cpu:1: put them all on one device"):
        check_places([first, second])


def test_parameters_may_be_frozen_or_numpys():
    model, params = built()
    for given in (freeze(params), jax.tree.map(np.asarray, params)):
        out = generate_single_task_jitted(
            model, given, IDS, 4, prompt_lengths=[4, 3], sampling=Sampling(1.0, 20, 0.9), seed=3
        )
        np.testing.assert_array_equal(out.token_ids, expected(one_call)[0])


_ELSEWHERE = """
import jax, numpy as np
from lively import Lively
from qwen2_core.requests import SequenceRequest
from qwen2_engine.continuous_batching import ContinuousEngine

model, params = Lively(layers=1, extract=(0,), hidden=32, inner=48, vocab=96).build(scan_layers=True)
first, second = jax.devices()

def rows_of(params):
    engine = ContinuousEngine(model, params, slots=1)
    [done] = engine.run([SequenceRequest(np.array([3, 4, 5], np.int32), 3, 0)])
    return done.rows

there = rows_of(jax.device_put(params, second))
with jax.default_device(second):
    np.testing.assert_array_equal(rows_of(params), there)
"""


@pytest.mark.slow
def test_everything_runs_where_the_weights_are_whatever_the_default_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    run_python(_ELSEWHERE)
