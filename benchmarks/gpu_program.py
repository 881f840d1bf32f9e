"""What a decode step is on a GPU, by XLA's compiler, without a GPU: kernels, waits, bytes, temporaries.

    pip install -e '.[cuda]' && python -m benchmarks.gpu_program [--batch 1 8 128] [--slots 64]

Compiles the Qwen2.5-0.5B shape in bfloat16 for an H100, prompts of 200 tokens and 1,100 new ones, all 14
layers captured: prefill, decode and, for continuous generation, a window's step. Kernels are those that run
with greedy sampling; `benchmarks/hlo_cost.py` says what a wait is, and which bytes are counted. Nothing is
tuned: without a GPU, XLA takes its own guess for each product's blocks.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.hlo_cost import Program
from generate_jitted import GenerateShape, lower_generate
from qwen2_core import compilation
from qwen2_core.compilation import AbstractParams
from qwen2_core.config import QwenConfig
from qwen2_core.sharding import layout_of
from qwen2_engine import programs
from qwen2_engine.decode_window import SlotShape
from qwen2_jax_with_hooks import FIXED_EXTRACT_LAYERS, create_model_with_hooks

# An H100 SXM by its data sheet and CUDA's tables of compute capability 9.0, as XLA's GpuTargetConfigProto.
H100 = """
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3" dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 85000000000 memory_bandwidth: 3350000000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
}
"""


def model_on(device: Any, config: QwenConfig) -> tuple[Any, Any]:
    """Returns a model that captures the usual layers that it has, and its weights' shapes on a device."""
    layers = [layer for layer in FIXED_EXTRACT_LAYERS if layer < config.num_hidden_layers]
    model = create_model_with_hooks(config, layers or range(config.num_hidden_layers))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    where = SingleDeviceSharding(device)
    return model, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)


def h100() -> Any:
    """Returns an H100 that is not there, for which JAX compiles."""
    described = topologies.get_topology_desc("1x1x1", "cuda", target_config=H100, topology="1x1x1")
    return described.devices[0]


def report(what: str, rows: int, compiled: Any, *, of_step: bool) -> None:
    program, memory = Program(compiled.as_text()), compiled.memory_analysis()
    cost = program.step() if of_step else program.cost(program.entry)
    print(
        f"  {what}, {rows} rows: {cost.kernels} kernels, {cost.waits} waits, {cost.bytes / 1e9:.2f} GB"
        f"{' a step' if of_step else ''}; "
        f"temporaries {memory.temp_size_in_bytes / rows / 1e6:.2f} MB a row, "
        f"{memory.alias_size_in_bytes / memory.output_size_in_bytes:.1%} of the results in place",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile for a GPU that is not there.")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 128])
    parser.add_argument("--slots", type=int, nargs="*", default=[64])
    parser.add_argument("--scan_layers", action="store_true", help="the layers as one loop")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    compilation.compiler_options = programs.compiler_options = dict  # not those of the CPU
    model, params = model_on(h100(), QwenConfig(dtype="bfloat16", scan_layers=options.scan_layers))
    print(f"H100, layers {'scanned' if options.scan_layers else 'unrolled'}:")
    for batch in options.batch:
        prefill, decode = lower_generate(model, params, GenerateShape(batch, 200, 1100))
        report("prefill", batch, prefill.compile(), of_step=False)
        report("decode", batch, decode.compile(), of_step=True)
    for slots in options.slots:
        shape, weights = SlotShape(slots, 200, 1100), AbstractParams.of(params)
        window = programs.compile_window(model, shape, layout_of(model.config, params), weights)  # pyright: ignore[reportArgumentType]
        report("window", slots, window, of_step=True)


if __name__ == "__main__":
    main()
