"""A user's function at a hook point, known by what it computes and not by its name or its object."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Code:
    """A traced function of one token's values. Two are equal where they compute the same, by the same steps.

    The function is traced anew each time it is given, so that a constant it has read, which has changed
    since, makes another program.
    """

    digest: str  # of its operations and constants
    jaxpr: Any = dataclasses.field(compare=False)

    @classmethod
    def of(cls, fn: Any, width: int) -> Code:
        """Traces a function of [width] float32.

        Raises:
            ValueError: it is none, does not trace, has side effects, or returns anything but [width] float32.
        """
        if not callable(fn):
            raise ValueError(f"Custom.fn must be a function in JAX, not {type(fn).__name__}.")
        one_token = jax.ShapeDtypeStruct((width,), jnp.float32)
        try:
            traced = jax.jit(lambda x: fn(x)).trace(one_token)
        except Exception as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"Custom.fn cannot be traced as a function in JAX of [{width}] float32: {reason}"
            ) from error
        results = jax.tree.leaves(traced.out_info)
        shapes = [(result.shape, str(result.dtype)) for result in results]
        if shapes != [((width,), "float32")]:
            raise ValueError(f"Custom.fn must return [{width}] float32, as it is given, not {shapes}.")
        if traced.jaxpr.effects or "callback" in str(traced.jaxpr):
            raise ValueError("Custom.fn must be pure JAX: it calls back to Python or has other side effects.")
        text = traced.lower().as_text()
        return cls(hashlib.sha256(text.encode()).hexdigest(), traced.jaxpr)

    def __call__(self, x: Array) -> Array:
        """Applies it to each token: [..., width] to the same."""
        function = jax.extend.core.jaxpr_as_fun(self.jaxpr)
        rows = x.reshape(-1, x.shape[-1])
        return jax.vmap(lambda row: function(row)[0])(rows).reshape(x.shape)
