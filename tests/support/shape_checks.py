"""Checks the shapes and dtypes in the signatures of the package (jaxtyping) while the tests run."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

CHECKED = (
    "generate_jitted",
    "kvcache_utils",
    "qwen2_core",
    "qwen2_engine",
    "qwen2_jax",
    "qwen2_jax_with_hooks",
)


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks every call of a public function; private ones and ``__init__`` are left alone.

    JAX makes the dataclasses of a loop's state anew with leaves of any kind: abstract arrays, axes,
    shardings.
    """
    return function if function.__name__.startswith("_") else beartype(function)


def install() -> None:
    """Checks what is imported from now on."""
    install_import_hook(CHECKED, "shape_checks.check")
