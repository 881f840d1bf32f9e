"""Compiles decode loops of published models by shape on a mesh (1, 8); prints each device's share."""

from __future__ import annotations

import math
import sys
from typing import Any

import jax
from published_configs import PUBLISHED
from real_shape import abstract_model

from generate_jitted import GenerateShape, lower_generate
from qwen2_core.config import QwenConfig
from qwen2_core.sharding import make_layout

for name in sys.argv[1:]:
    config = QwenConfig.from_hf(PUBLISHED[name]).replace(scan_layers=True)
    model, shapes = abstract_model(config)
    layout = make_layout(config, (1, 8))

    def place(path: tuple[Any, ...], leaf: Any, layout: Any = layout) -> jax.ShapeDtypeStruct:
        sharding = layout.weight_sharding(tuple(key.key for key in path), leaf.ndim)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree_util.tree_map_with_path(place, shapes)
    shape = GenerateShape(1, 64, 16)
    decode = lower_generate(model, params, shape)[1].compile()
    memory: Any = decode.memory_analysis()
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    state = memory.alias_size_in_bytes  # updated in place
    print(name, (memory.argument_size_in_bytes - state) / weights)
