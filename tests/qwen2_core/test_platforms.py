"""Forms of one computation for several platforms: one is in the program, and it alone may be traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qwen2_core.kernels.platforms import by_platform, tracing_for
from qwen2_core.sharding import WHOLE, Layout


@pytest.fixture
def traced() -> list[str]:
    """The forms that were traced."""
    return []


@pytest.fixture
def function(traced: list[str]) -> Any:
    """Twice x on a TPU, three times on a CPU, else x."""

    def form(name: str, factor: int) -> Any:
        def times(x: Any) -> Any:
            traced.append(name)
            return x * factor

        return times

    forms = {"tpu": form("tpu", 2), "cpu": form("cpu", 3), "default": form("default", 1)}
    return lambda x: by_platform(x, **forms)


@pytest.mark.parametrize(("platform", "form"), [("cpu", "cpu"), ("tpu", "tpu"), ("other", "default")])
def test_on_a_known_platform_its_form_alone_is_traced(
    function: Any, traced: list[str], platform: str, form: str
):
    with tracing_for(platform):
        jax.make_jaxpr(function)(1)
    assert traced == [form]


@pytest.mark.parametrize("platform", [None, "gpu"], ids=["unknown", "gpu"])
def test_else_all_forms_are_traced_and_the_compiler_chooses(
    function: Any, traced: list[str], platform: str | None
):
    if platform is None:
        lowered = jax.jit(function).trace(1)
    else:
        with tracing_for(platform):
            lowered = jax.jit(function).trace(1)
    assert set(traced) == {"tpu", "cpu", "default"}
    for name, factor in (("tpu", 2), ("cpu", 3)):
        text = lowered.lower(lowering_platforms=(name,)).as_text()
        assert f"dense<{factor}>" in text


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about CPUs")
def test_programs_are_traced_for_the_platform_of_their_devices_alone(function: Any, traced: list[str]):
    assert Layout().platform == "cpu"
    program = Layout().jit(function, (WHOLE,), WHOLE).lower(jnp.int32(5)).compile()
    assert traced == ["cpu"]
    assert program(jnp.int32(5)) == 15
    jax.make_jaxpr(function)(1)  # of somebody else, for whichever platform
    assert set(traced) == {"tpu", "cpu", "default"}
