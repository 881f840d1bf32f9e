"""What a decode step is on a GPU, by XLA's compiler for it, without a GPU: kernels, waits, temporaries.

    pip install -e '.[cuda]' && python -m benchmarks.gpu_program [--batch 1 8 128] [--slots 64]

Compiles the Qwen2.5-0.5B shape in bfloat16 for an H100, prompts of 200 tokens and 1,100 new ones, all 14
layers captured: prefill, decode and, for continuous generation, a window's step. Kernels are those that run
with greedy sampling. A wait is a branch, or a turn of a loop whose length the host does not know: it must see
what the device computed before it goes on. Of such a loop, one turn is counted. Nothing is tuned: without a
GPU, XLA takes its own guess for each product's blocks.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from generate_jitted import GenerateShape, lower_generate
from qwen2_core import compilation
from qwen2_core.compilation import AbstractParams
from qwen2_core.config import QwenConfig
from qwen2_core.sharding import layout_of
from qwen2_engine import programs
from qwen2_engine.decode_window import SlotShape
from qwen2_jax_with_hooks import create_model_with_hooks

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
_NO_KERNEL = {"get-tuple-element", "parameter", "tuple", "bitcast", "constant", "after-all"}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")


class Program:
    """An optimized HLO module: by computation, what its instructions are."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[tuple[str, str]]] = {}
        current: list[tuple[str, str]] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], [])
                if header[1]:
                    self.entry = header[2]
            elif found := _INSTRUCTION.match(line):
                current.append((found[1], found[2]))

    def cost(self, name: str) -> tuple[int, int]:
        """Kernels and waits of one run of a computation."""
        kernels = waits = 0
        for operation, rest in self.computations[name]:
            if operation in _NO_KERNEL:
                continue
            if operation == "while":
                turn = self.cost(_named("body", rest))
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                turns = int(known[1]) if known else 1
                test = 0 if known else self.cost(_named("condition", rest))[0]
                more = (turns * turn[0] + test, turns * turn[1] + (not known))
            elif operation == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
                names = branches[1].replace("%", "").split(", ") if branches else _branches(rest)
                shortest = min(self.cost(branch) for branch in names)
                more = (shortest[0], shortest[1] + 1)
            elif operation == "call":
                more = self.cost(_named("to_apply", rest))
            else:
                more = (1, 0)
            kernels, waits = kernels + more[0], waits + more[1]
        return kernels, waits

    def step(self) -> tuple[int, int]:
        """Kernels and waits of a turn of the outermost loop, the loop's own wait included."""
        (loop,) = [rest for operation, rest in self.computations[self.entry] if operation == "while"]
        (kernels, waits), test = self.cost(_named("body", loop)), self.cost(_named("condition", loop))
        return kernels + test[0], waits + 1


def _named(role: str, rest: str) -> str:
    found = re.search(rf"{role}=%?([\w.\-]+)", rest)
    assert found is not None
    return found[1]


def _branches(rest: str) -> list[str]:
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)


def report(what: str, rows: int, compiled: Any, *, of_step: bool) -> None:
    program, memory = Program(compiled.as_text()), compiled.memory_analysis()
    kernels, waits = program.step() if of_step else program.cost(program.entry)
    print(
        f"  {what}, {rows} rows: {kernels} kernels, {waits} waits{' a step' if of_step else ''}; "
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
    described = topologies.get_topology_desc("1x1x1", "cuda", target_config=H100, topology="1x1x1")
    where = SingleDeviceSharding(described.devices[0])
    compilation.compiler_options = programs.compiler_options = dict  # not those of the CPU
    model = create_model_with_hooks(QwenConfig(dtype="bfloat16", scan_layers=options.scan_layers))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)
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
