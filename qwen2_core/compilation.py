"""Compiles programs from the weights' shapes alone, several at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from qwen2_core.kernels.matmul import compiler_options


@dataclasses.dataclass(frozen=True)
class AbstractParams:
    """Shapes, dtypes and places of a parameter tree; hashable, so that programs can be cached by it."""

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, params: Any) -> AbstractParams:
        """Describes a tree of arrays, or of ``jax.ShapeDtypeStruct``."""
        leaves, treedef = jax.tree.flatten(params)
        structs = (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
            for leaf in leaves
        )
        return cls(treedef, tuple(structs))

    @property
    def tree(self) -> Any:
        """The tree, with ``jax.ShapeDtypeStruct`` leaves."""
        return jax.tree.unflatten(self.treedef, self.leaves)


def compile_all(lowered: Iterable[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
    """Compiles traced programs side by side; XLA compiles outside the GIL."""
    options = compiler_options()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: program.compile(options), lowered))
