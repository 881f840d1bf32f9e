"""Forms of one computation for several platforms, of which a program contains one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax import lax

_traced_for: ContextVar[str | None] = ContextVar("traced_for", default=None)


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Says for which platform ("cpu", "gpu", "tpu") a program is traced: other forms are left out then."""
    token = _traced_for.set(platform)
    try:
        yield
    finally:
        _traced_for.reset(token)


def by_platform(*operands: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """Does what ``lax.platform_dependent`` does: calls the form of the platform, or the default.

    JAX traces all forms, and drops all but one when it knows the platform. Within ``tracing_for`` it is known
    before, which saves a quarter of the time that tracing takes. A GPU may be one of two kinds.
    """
    platform = _traced_for.get()
    if platform is None or platform == "gpu":
        return lax.platform_dependent(*operands, default=default, **forms)
    return forms.get(platform, default)(*operands)


def traced_platform() -> str:
    """Returns the platform that a program is traced for: what ``tracing_for`` says, or JAX's default."""
    return _traced_for.get() or jax.default_backend()


def may_be_split() -> bool:
    """Returns whether a mesh may split what is traced: XLA cannot split a call of a kernel for CPU, and would
    gather the arrays for it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in mesh.auto_axes)
