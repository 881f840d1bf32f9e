"""What a task takes on TPUs, by their compiler, without a TPU: compile time, buffers and temporaries.

    python -m benchmarks.tpu_memory [--batch 1 64 600] [--topology v4:2x2x1]

Compiles prefill and decode of the Qwen2.5-0.5B shape in bfloat16 for prompts of 200 tokens and 1,100 new
ones, all 14 layers captured, on one chip. The compiler refuses a program that does not fit the chip's memory.
Needs libtpu (the extra `tpu`). On v4 JAX sees a chip as one device of two cores ("megacore") and 32 GB, and
so do we.

Temporaries are the heap that the compiler's buffer assignment lays out in HBM, holes included. On TPUs
``memory_analysis().temp_size_in_bytes`` is larger: it counts the holes twice.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # somebody else on this machine may be compiling too
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from generate_jitted import GenerateShape, compile_generate
from qwen2_core import compilation
from qwen2_core.config import QwenConfig
from qwen2_jax_with_hooks import create_model_with_hooks

ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v6e": "v6e-4"}


def chip(topology: str) -> Any:
    """Where arrays on one chip of ``topology`` are."""
    kind = topology.partition(":")[0]
    os.environ["TPU_ACCELERATOR_TYPE"] = ACCELERATORS[kind]
    megacore = {"chip_config_name": "megacore"} if kind == "v4" else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **megacore)
    return SingleDeviceSharding(described.devices[0])


def heap_in_hbm(dump: Path, program: str) -> int:
    """Bytes of all temporaries in HBM, from the buffer assignment of ``program`` in XLA's ``dump``."""
    (assignment,) = dump.glob(f"*.jit_{program}.*buffer-assignment.txt")
    # Temporaries on the chip (CMEM, VMEM, SMEM) have heaps of their own, each with its "color".
    (heap,) = re.findall(r"size (\d+), preallocated-temp", assignment.read_text())
    return int(heap)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile for a TPU that is not there.")
    parser.add_argument("--topology", default="v4:2x2x1", help="v4:2x2x1, v5e:2x2 or v6e:2x2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 600])
    options = parser.parse_args()
    where = chip(options.topology)
    model = create_model_with_hooks(QwenConfig(dtype="bfloat16", scan_layers=True))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    print(f"{options.topology}: weights {weights / 1e9:.2f} GB; per task, MB:")
    for batch in options.batch:
        with tempfile.TemporaryDirectory() as dump:
            # In place of the CPU's options, which are not for this compiler.
            compilation.compiler_options = lambda: {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            program = compile_generate(model, params, GenerateShape(batch, 200, 1100))
            temporaries = heap_in_hbm(Path(dump), "run_decode")
        memory: Any = program.decode.memory_analysis()
        buffers = memory.output_size_in_bytes
        print(
            f"  batch {batch:4d}: compiled in {program.compile_seconds:.1f} s; buffers "
            f"{buffers / batch / 1e6:.2f} ({memory.alias_size_in_bytes / buffers:.3%} aliased), temporaries "
            f"{temporaries / batch / 1e6:.2f}, together {(buffers + temporaries) / batch / 1e6:.2f}; "
            f"peak with the weights {memory.peak_memory_in_bytes / 1e9:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
