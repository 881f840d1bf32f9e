"""How fast generation is, how much memory it takes, and how often and how long it compiles.

The four promises come first. Those marked ``timed`` read a clock and are run alone: ``pytest -m timed``. All
other tests read what was compiled from the executables. The real shape is Qwen2.5-0.5B's.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from lively import Lively, pad_right
from published_configs import PUBLISHED, YARN
from qwen3_sizes import qwen3
from real_shape import abstract_model, random_model

import generate_jitted
from generate_jitted import (
    GenerateShape,
    Sampling,
    compile_generate,
    generate_single_task_jitted,
    lower_generate,
    prefill_with_cache,
)
from kvcache_utils import create_kv_cache_buffers
from qwen2_core import compilation
from qwen2_core.compilation import AbstractParams
from qwen2_core.config import QwenConfig
from qwen2_core.hook_points import LN_FINAL, RESID_POST, point_names
from qwen2_core.hooks import LayerHooks
from qwen2_core.interventions import Add
from qwen2_core.kernels.cpu.library import is_available
from qwen2_core.kernels.matmul import compiler_options
from qwen2_core.sharding import bytes_on_device, layout_of, make_layout
from qwen2_core.steering import steer
from qwen2_engine import programs
from qwen2_engine.decode_window import SlotShape
from qwen2_engine.memory_plan import MemoryPlanner
from qwen2_engine.python_loop import generate_single_task_python
from qwen2_jax import QwenAttention
from qwen2_jax_with_hooks import FIXED_EXTRACT_LAYERS, create_model_with_hooks

MB = 1e6
WIDTH = 256
LAYERS = 4
SMALL = Lively(layers=2, extract=(0, 1))


def compile_decode(model: Any, params: Any, shape: GenerateShape) -> jax.stages.Compiled:
    """The decode executable of ``compile_generate`` without the prefill beside it."""
    return lower_generate(model, params, shape)[1].compile(compiler_options())


@functools.cache
def real(dtype: str, max_tokens: int, scan_layers: bool = False) -> tuple[Any, Any]:
    """(bytes of cache and activation buffers, the decode executable) at batch 1 of the 0.5B shape.

    Of four of its layers: no temporary depends on how many there are. The TPU's compiler gets all of them.
    """
    config = QwenConfig(dtype=dtype, num_hidden_layers=LAYERS, scan_layers=scan_layers)
    model, params = abstract_model(config, range(LAYERS))
    shape = GenerateShape(1, WIDTH, max_tokens)
    return shape.nbytes(model), compile_decode(model, params, shape)


@functools.cache
def modest(max_tokens: int, scan_layers: bool, dtype: str = "float32") -> tuple[Any, Any]:
    """As ``real``, of a small model at batch 8, unrolled or scanned."""
    model, params = abstract_model(SMALL.config(scan_layers=scan_layers, dtype=dtype), SMALL.extract)
    shape = GenerateShape(2, 64, max_tokens, samples_per_prompt=4)
    return shape.nbytes(model), compile_decode(model, params, shape)


# --- The promises ---

timed = pytest.mark.timed


@pytest.fixture(scope="module")
def full_size() -> Any:
    """Qwen2.5-0.5B with random weights in float32, its layers scanned: 2 GB."""
    return random_model(QwenConfig(dtype="float32", scan_layers=True))


def best_seconds(call: Callable[[], Any], calls: int) -> float:
    """The shortest time of several calls, after one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def assert_peak_memory_below(gigabytes: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < gigabytes * 1e9


@timed
def test_speed_comparison():
    """Compiled generation is at least 5 times as fast as the old Python loop over a growing cache.

    Two tokens at batch 1 of the 0.5B shape. The compiled programs are there before the clock starts; the old
    loop compiles parts of its attention anew in every call, so for it a first call would change nothing.
    """
    model, params = random_model(QwenConfig(dtype="float32"))
    ids = np.arange(1, 33, dtype=np.int32)[None]
    compiled = best_seconds(lambda: generate_single_task_jitted(model, params, ids, 2), calls=2)
    started = time.perf_counter()
    jax.block_until_ready(generate_single_task_python(model, params, ids, 2))
    python = time.perf_counter() - started
    print(f"2 tokens: compiled {compiled:.2f} s, old Python loop {python:.2f} s")
    assert 5 * compiled < python
    assert_peak_memory_below(8)


@timed
def test_throughput(full_size: Any):
    """At least 30 tokens a second are generated at the 0.5B shape with the rows of layers 10-23 captured.

    Counted are the tokens of all 64 sequences of one call, 16 samples of 4 prompts, and the call's whole
    time, the reading of the prompts included; not the compilation.
    """
    model, params = full_size
    ids = np.arange(1, 129, dtype=np.int32).reshape(4, 32)

    def call() -> Any:
        return generate_single_task_jitted(model, params, ids, 16, samples_per_prompt=16)

    rate = 64 * 16 / best_seconds(call, calls=2)
    print(f"{rate:.0f} tokens/s")
    assert rate >= 30
    assert_peak_memory_below(8)


def test_memory_usage():
    """Memory does not grow over many calls: neither the device's arrays nor the process."""
    model, params = SMALL.build(scan_layers=True)
    ids, lengths = pad_right(SMALL.prompts((40, 64)))
    statm = Path("/proc/self/statm")

    def call(seed: int) -> tuple[int, int]:
        out = generate_single_task_jitted(
            model,
            params,
            ids,
            512,
            prompt_lengths=lengths,
            samples_per_prompt=8,
            seed=seed,
            eos_token_ids=(5,),
        )
        jax.block_until_ready(out)
        returned = sum(leaf.nbytes for leaf in jax.tree.leaves(out))
        assert returned > 4 * MB  # so that a leak of one call's results would be seen
        del out
        resident = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0
        return sum(array.nbytes for array in jax.live_arrays()), resident

    before = [call(seed) for seed in range(5)][-1]
    after = [call(seed) for seed in range(5, 45)]
    assert {arrays for arrays, _ in after} == {before[0]}
    assert after[-1][1] - before[1] < 40 * MB  # 40 calls return 4 MB each and use as much again


@timed
@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_compilation_time(platform: str, request: pytest.FixtureRequest):
    """Prefill and decode loop of the 0.5B shape are compiled side by side in less than 10 seconds.

    At batch 1, layers scanned: for a TPU v4 by the TPU's own compiler, and for this CPU. The better of two
    shapes counts, as the first one waits for the compiler to start; no other test compiles either, so that
    nothing comes from a cache.
    """
    if platform == "tpu":
        model, params = real_on(request.getfixturevalue("tpu")("v4:2x2x1"))
    else:
        model, params = abstract_model(QwenConfig(dtype="float32", scan_layers=True))
    shapes = [GenerateShape(1, 192, 1056), GenerateShape(1, 224, 1024)]
    seconds = [compile_generate(model, params, shape).compile_seconds for shape in shapes]
    print(f"{platform}: compiled in {seconds[0]:.1f} s and in {seconds[1]:.1f} s")
    assert min(seconds) < 10


# --- The decode loop ---

# As they run by default on CPU: in bfloat16 the kernels read the stacks of scanned layers.
needs_kernel = pytest.mark.skipif(not is_available(), reason="no CPU kernels")
SCANNED = pytest.param("bfloat16", 512, True, marks=needs_kernel)
REAL = [("float32", 64, False), ("bfloat16", 512, False), SCANNED]


def assert_state_is_aliased(state_bytes: int, decode: Any) -> None:
    memory = decode.memory_analysis()
    outputs = memory.output_size_in_bytes
    assert outputs >= state_bytes
    # What is not aliased is no buffer: tables of pointers, 8 bytes an output.
    assert outputs - memory.alias_size_in_bytes < 4096


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "max_tokens", "scan_layers"), REAL)
def test_the_whole_state_is_updated_in_place_at_the_real_shape(
    dtype: str, max_tokens: int, scan_layers: bool
):
    assert_state_is_aliased(*real(dtype, max_tokens, scan_layers))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("max_tokens", [256, 1024])
def test_the_whole_state_is_updated_in_place(max_tokens: int, scan_layers: bool):
    assert_state_is_aliased(*modest(max_tokens, scan_layers))


def temporaries(decode: Any) -> int:
    return decode.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("scan_layers", "dtype"),
    [(False, "float32"), (True, "float32"), pytest.param(True, "bfloat16", marks=needs_kernel)],
)
def test_temporary_memory_does_not_grow_with_max_tokens(scan_layers: bool, dtype: str):
    """Once there is more than the one block of keys that attention reads at a time."""
    few, many = (temporaries(modest(tokens, scan_layers, dtype)[1]) for tokens in (256, 1024))
    assert few == many


@pytest.mark.parametrize(("dtype", "max_tokens", "scan_layers"), REAL)
def test_no_temporary_is_as_large_as_a_weight_matrix_of_the_mlp(
    dtype: str, max_tokens: int, scan_layers: bool
):
    """Neither the embedding nor any layer's weights are converted, transposed or copied in the loop.

    The limit leaves room for the logits of 8 rows, 4.9 MB, which bfloat16 products on CPU are padded to.
    """
    assert temporaries(real(dtype, max_tokens, scan_layers)[1]) < 12 * MB


def copied_shapes(decode: Any) -> list[tuple[int, ...]]:
    """Shapes, without axes of 1, of everything that the program copies."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:copy|copy-start)\(", decode.as_text())
    return [tuple(int(n) for n in shape.split(",") if n not in ("", "1")) for shape in shapes]


def test_a_copy_in_a_program_is_seen():
    def step(buffer, i):
        return buffer.at[i].set(1.0), buffer.T @ buffer  # not donated, so the update has to copy

    compiled = jax.jit(step).lower(jax.ShapeDtypeStruct((50, 70), jnp.float32), 0).compile()
    assert (50, 70) in copied_shapes(compiled)


def test_no_decode_step_copies_the_cache_or_the_activation_buffer():
    _, decode = real("bfloat16", 512)
    copied = [collections.Counter(shape) for shape in copied_shapes(decode)]
    heads, head_dim, hidden = 2, 64, 896
    for buffer in ((heads, WIDTH, head_dim), (heads, 512, head_dim), (LAYERS, 512, hidden)):
        assert collections.Counter(buffer) not in copied


def updated_types(decode: Any) -> dict[tuple[int, ...], set[str]]:
    """The types in which the program updates buffers of each shape."""
    types = collections.defaultdict(set)
    for dtype, shape in re.findall(r"= (\w+)\[([\d,]+)\]\S* dynamic-update-slice\(", decode.as_text()):
        types[tuple(map(int, shape.split(",")))].add(dtype)
    return types


def test_no_bfloat16_buffer_is_converted_to_float32_to_write_a_token():
    """XLA on CPU would write one row of a bfloat16 buffer by converting all of it to float32 and back."""
    types = updated_types(real("bfloat16", 512)[1])
    assert types[1, 2, 512, 64] == {"u16"}
    assert types[LAYERS, 512, 1, 896] == {"u16"}


def test_nor_is_the_stack_of_what_scanned_layers_return():
    types = updated_types(real("bfloat16", 512, scan_layers=True)[1])
    assert types[LAYERS, 1, 1, 896] == {"u16"}


# --- Hooks ---


def hooked(scan_layers: bool) -> tuple[Any, Any]:
    """The small model with every point of layer 1 captured."""
    model, params = abstract_model(SMALL.config(scan_layers=scan_layers), SMALL.extract)
    points = {point: True if point == LN_FINAL else 1 for point in point_names() if point != RESID_POST}
    return create_model_with_hooks(model.config, SMALL.extract, points=points), params


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_without_points_and_interventions_programs_are_those_of_a_model_without_hooks(
    scan_layers: bool, monkeypatch: pytest.MonkeyPatch
):
    model, params = abstract_model(SMALL.config(scan_layers=scan_layers), SMALL.extract)
    shape = GenerateShape(2, 64, 16, 2, capture_prompt=True)

    def programs_of(model: Any, interventions: Any = ()) -> list[str]:
        steering = steer(interventions, model.config, shape.batch_size)
        return [program.as_text() for program in lower_generate(model, params, shape, steering)]

    found, add = programs_of(model), Add(RESID_POST, 1, np.ones(64))
    for other in (programs_of(hooked(scan_layers)[0]), programs_of(model, [add])):
        assert all(len(theirs) > len(mine) for theirs, mine in zip(other, found, strict=True))
    for name in ("__call__", "stream"):
        monkeypatch.setattr(LayerHooks, name, lambda hooks, point, x: x)
    assert programs_of(model) == found


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_points_are_captured_in_place_and_counted(scan_layers: bool):
    model, params = hooked(scan_layers)
    add = Add(RESID_POST, [0, 1], np.ones(64))
    for max_tokens in (256, 1024):
        shape = GenerateShape(2, 64, max_tokens, 4)
        decode = lower_generate(model, params, shape, steer(add, model.config, shape.batch_size))[1]
        compiled = decode.compile(compiler_options())
        assert_state_is_aliased(shape.nbytes(model), compiled)
        rows = model.captured_bytes(max_tokens, 8)
        assert rows == 4 * max_tokens * 8 * (2 * 64 + 9 * 64 + 2 * 32 + 96)
        assert temporaries(compiled) < rows / 8


# --- Slots ---


@pytest.mark.parametrize(
    ("scan_layers", "dtype"),
    [(False, "float32"), (True, "float32"), pytest.param(True, "bfloat16", marks=needs_kernel)],
)
def test_slots_that_share_prompts_are_updated_in_place_and_copy_no_prompt(scan_layers: bool, dtype: str):
    """However long prompts are, a window takes no more memory than that of a block of keys."""
    model, params = abstract_model(SMALL.config(scan_layers=scan_layers, dtype=dtype), SMALL.extract)
    found = []
    for width in (256, 2048):
        for shared in (False, True):
            shape = SlotShape(8, width, 64, shared_prompts=shared)
            window: Any = compile_window(model, params, shape).memory_analysis()
            assert window.alias_size_in_bytes > shape.cache_config(model).nbytes
            found.append(window.temp_size_in_bytes)
    assert found[1] == found[3]
    assert found[1] <= found[0] + 4096
    assert found[0] == found[2]


# --- Compilations ---


@pytest.mark.parametrize(("scan_layers", "bodies"), [(True, 1), (False, SMALL.layers)])
def test_a_scanned_layer_is_traced_once_in_a_program(
    scan_layers: bool, bodies: int, monkeypatch: pytest.MonkeyPatch
):
    """However many layers there are; tracing takes the longest of a second start."""
    traced = []
    attention = QwenAttention.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        traced.append(self)
        return attention(self, *arguments)

    monkeypatch.setattr(QwenAttention, "__call__", counted)
    model, params = SMALL.build(scan_layers=scan_layers)
    lower_generate(model, params, GenerateShape(1, 64, 8))
    assert len(traced) == 2 * bodies  # in the prefill and in the decode loop


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """One entry for each compilation by XLA from here on, of whatever size."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_each_shape_is_compiled_once_whatever_the_values(compilations: list[str]):
    model, params = SMALL.build(scan_layers=True)
    generate_jitted._compile.cache_clear()
    compilations.clear()  # those of making the parameters

    def run(lengths: tuple[int, ...], **kwargs: Any) -> None:
        ids, prompt_lengths = pad_right(SMALL.prompts(lengths, seed=lengths[0]), width=64)
        out = generate_single_task_jitted(model, params, ids, 5, prompt_lengths=prompt_lengths, **kwargs)
        jax.block_until_ready(out)

    run((3, 64), eos_token_ids=(1,))
    first = len(compilations)
    assert first == 2  # prefill and decode
    for kwargs in (
        {"eos_token_ids": (1, 2, 3, 4, 5, 6, 7, 8)},
        {"eos_token_ids": (9,), "sampling": Sampling(0.7)},
        {"eos_token_ids": (9,), "sampling": Sampling(1.5, top_k=20)},
        {"eos_token_ids": (9,), "sampling": Sampling(1.5, top_k=3, top_p=0.3), "seed": 12},
        {"eos_token_ids": (9,), "sequence_ids": [2**32 - 1, 5], "seed": 2**32 - 1},
    ):
        run((64, 1), **kwargs)
        run((17, 40), **kwargs)
    assert len(compilations) == first  # not even for a small operation on the way in or out
    assert generate_jitted._compile.cache_info().misses == 1

    # An equal model and the weights' shapes alone, asked for ahead of time, mean the same program.
    again, _ = abstract_model(model.config, SMALL.extract)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params
    )
    compile_generate(again, shapes, GenerateShape(2, 64, 5))
    assert generate_jitted._compile.cache_info().misses == 1
    first = len(compilations)

    run((3, 64))  # no EOS: a loop of another kind, compiled once
    second = len(compilations)
    assert second == first + 2
    run((30, 30), sampling=Sampling(0.5), seed=4)
    assert len(compilations) == second


# --- Prompts ---


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")
def test_rotary_angles_are_computed_once_and_not_in_every_layer():
    model, params = abstract_model(SMALL.config(), SMALL.extract)
    prefill = lower_generate(model, params, GenerateShape(2, 64, 8))[0].compile(compiler_options())
    text: Any = prefill.as_text()
    assert len(re.findall(r" cosine\(", text)) == len(re.findall(r" sine\(", text)) == 1


@pytest.mark.parametrize(
    ("layers", "scan_layers"), [(LAYERS, False), (24, True)], ids=["unrolled", "scanned"]
)
def test_a_prefill_of_8192_tokens_takes_memory_linear_in_its_length(layers: int, scan_layers: bool):
    config = QwenConfig(num_hidden_layers=layers, scan_layers=scan_layers)
    model, params = abstract_model(config, FIXED_EXTRACT_LAYERS if layers == 24 else range(layers))

    def temporaries_of(width: int) -> int:
        config = GenerateShape(1, width, 64).cache_config(model.config)

        def prefill(params, ids, lengths):
            return prefill_with_cache(model, params, ids, lengths, create_kv_cache_buffers(config))[:2]

        ids = jax.ShapeDtypeStruct((1, width), jnp.int32)
        lowered = jax.jit(prefill).lower(params, ids, jax.ShapeDtypeStruct((1,), jnp.int32))
        return temporaries(lowered.compile(compiler_options()))

    half, whole = temporaries_of(4096), temporaries_of(8192)
    assert whole <= 2.2 * half
    one_layers_scores = 14 * 8192 * 8192 * 4
    assert whole < one_layers_scores / 3


# --- TPU, by its compiler alone ---


TPUS = {"v4:2x2x1": "v4-8", "v5e:2x2": "v5litepod-4", "v6e:2x2": "v6e-4"}
EIGHT = {"v4:2x2x2": "v4-16"}


@pytest.fixture(scope="module")
def tpu() -> Iterator[Any]:
    """The devices of a TPU that is not there, by its topology; libtpu compiles for them all the same."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu's compiler: pip install '.[tpu]'")

    def devices(topology: str) -> Sequence[Any]:
        environment.setenv("TPU_ACCELERATOR_TYPE", (TPUS | EIGHT)[topology])
        # Where v4 is really there, JAX sees a chip's two cores as one device.
        megacore = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **megacore)
        return described.devices

    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # somebody else on this machine may be compiling too
        }.items():
            environment.setenv(name, value)
        for module in (compilation, programs):
            environment.setattr(module, "compiler_options", dict)  # this process's platform is the CPU
        yield devices


def real_on(
    devices: Sequence[Any],
    mesh_shape: tuple[int, int] = (1, 1),
    config: QwenConfig = QwenConfig(dtype="bfloat16", scan_layers=True),  # noqa: B008 - frozen
) -> tuple[Any, Any]:
    """The real shape in bfloat16, its layers scanned, its weights on the first device or on a mesh."""
    model, params = abstract_model(config)
    layout, chip = make_layout(config, mesh_shape, devices), SingleDeviceSharding(devices[0])

    def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = layout.weight_sharding(tuple(key.key for key in path), leaf.ndim) or chip
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return model, jax.tree_util.tree_map_with_path(place, params)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "batch"), [*((topology, 1) for topology in TPUS), ("v4:2x2x1", 64)])
def test_a_sequence_on_a_tpu_takes_46_mb_which_are_updated_in_place(
    tpu: Any, topology: str, batch: int, tmp_path: Path
):
    """The buffers, what the chip pads included, and the temporaries, as the compiler places them in HBM."""
    model, params = real_on(tpu(topology))
    shape = GenerateShape(batch, 200, 1100)
    decode = lower_generate(model, params, shape)[1].compile(writing_to(tmp_path))
    assert_state_is_aliased(shape.nbytes(model), decode)
    memory: Any = decode.memory_analysis()
    heap = heap_in_hbm(tmp_path)
    # memory_analysis counts the holes in the heap twice. They are nearly all of it at batch 1.
    assert 0 < heap <= memory.temp_size_in_bytes < 2 * batch * MB
    assert memory.output_size_in_bytes + heap < 46 * batch * MB


@pytest.mark.slow
def test_points_and_interventions_on_a_tpu_are_in_place_and_copy_nothing(tpu: Any, tmp_path: Path):
    model, params = real_on(tpu("v4:2x2x1"))
    points = {point: True if point == LN_FINAL else [12] for point in point_names() if point != RESID_POST}
    model = create_model_with_hooks(model.config, points=points)
    shape = GenerateShape(64, 200, 1100)
    add = Add(RESID_POST, FIXED_EXTRACT_LAYERS, np.ones(896), np.arange(64))
    steering = steer(add, model.config, shape.batch_size)
    decode = lower_generate(model, params, shape, steering)[1].compile(writing_to(tmp_path))
    assert_state_is_aliased(shape.nbytes(model), decode)
    assert heap_in_hbm(tmp_path) < 2 * 64 * MB


@pytest.mark.slow
@pytest.mark.parametrize("batch", [100, 128])
def test_no_program_on_a_tpu_copies_the_state_into_another_layout(
    tpu: Any, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At batch 100 XLA would choose another order for activations than the loop's, at 128 for the cache."""
    model, params = real_on(tpu("v4:2x2x1"))
    lower_generate(model, params, GenerateShape(batch, 200, 1100))[1].compile(writing_to(tmp_path / "decode"))
    monkeypatch.setattr(programs, "compiler_options", lambda: writing_to(tmp_path / "window"))
    compile_window(model, params, SlotShape(batch, 200, 1100))
    for program in ("decode", "window"):
        assert heap_in_hbm(tmp_path / program) < 1.1 * batch * MB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0.6B", "4B"])
def test_a_qwen3_on_a_tpu_is_updated_in_place_and_takes_the_memory_that_was_planned(tpu: Any, name: str):
    """Eight slots, layers 10 to 23 captured: plan and compiled programs within a tenth."""
    model, params = real_on(tpu("v4:2x2x1"), config=qwen3(name))
    shape, layout = SlotShape(8, 256, 1100), layout_of(model.config, params)
    compiled = programs.compile_slots(model, params, layout, shape, (256,))
    planner = MemoryPlanner(model, params, layout)
    exact = planner.memory(compiled)
    assert abs((planner.estimate(shape) - exact.host_rows) / exact.on_device - 1) < 0.1
    memory: Any = compiled.window.memory_analysis()
    assert memory.alias_size_in_bytes >= exact.kv_cache
    assert memory.temp_size_in_bytes < 2 * shape.slots * MB


def compile_window(model: Any, params: Any, shape: SlotShape) -> jax.stages.Compiled:
    return programs.compile_window(model, shape, layout_of(model.config, params), AbstractParams.of(params))


def writing_to(dump: Path) -> Any:
    """Options with which XLA writes how it compiles."""
    return {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True}


def heap_in_hbm(dump: Path) -> int:
    """Bytes of all temporaries in HBM, from the buffer assignment in ``dump``; a "color" is on the chip."""
    (assignment,) = dump.glob("*buffer-assignment.txt")
    (heap,) = re.findall(r"size (\d+), preallocated-temp", assignment.read_text())
    return int(heap)


HALF_WINDOWS = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, HALF_WINDOWS | {"rope_scaling": YARN}], ids=["plain", "windows and YaRN"]
)
def test_qwen2_5_7b_on_four_tpus_takes_what_is_planned_and_copies_nothing(
    tpu: Any, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = QwenConfig.from_hf(PUBLISHED["Qwen2.5-7B"] | more).replace(scan_layers=True)
    model, params = real_on(tpu("v4:2x2x1"), (1, 4), config)
    monkeypatch.setattr(programs, "compiler_options", lambda: writing_to(tmp_path))
    shape = SlotShape(32, 1024, 1024)
    window = compile_window(model, params, shape)
    weights = sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(params))
    cache = shape.cache_config(model).nbytes / 4  # each chip has one of four heads of keys and values
    memory: Any = window.memory_analysis()
    assert 3.8e9 < weights < 3.82e9
    assert memory.argument_size_in_bytes == pytest.approx(weights + cache, rel=1e-3)
    assert memory.alias_size_in_bytes == pytest.approx(cache, rel=1e-3)
    assert heap_in_hbm(tmp_path) < 10 * MB
    planned = MemoryPlanner(model, params, layout_of(config, params)).estimate(shape)
    planned -= model.captured_bytes(
        shape.max_tokens, shape.slots
    )  # rows on the host, planned where it is a CPU
    assert 0.9 < memory.peak_memory_in_bytes / planned < 1


@pytest.mark.slow
def test_prefill_on_a_tpu_takes_less_than_2_mb_of_temporary_memory(tpu: Any):
    model, params = real_on(tpu("v4:2x2x1"))
    prefill = lower_generate(model, params, GenerateShape(1, 200, 1100))[0].compile()
    assert temporaries(prefill) < 2 * MB


@pytest.mark.slow
def test_eight_data_parallel_tpus_exchange_nothing_while_decoding(tpu: Any):
    """Data parallel: each has loops of its own. Weights that are split need sums, which the search finds."""
    shape, eight = SlotShape(8, 256, 1100), tpu("v4:2x2x2")

    def window(mesh_shape: tuple[int, int]) -> jax.stages.Compiled:
        model, params = real_on(eight, mesh_shape)
        return compile_window(model, params, shape)

    parallel, split = window((8, 1)), window((4, 2))
    collectives = r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
    assert not re.findall(collectives, str(parallel.as_text()))
    assert set(re.findall(collectives, str(split.as_text()))) == {"all-reduce"}
    # On each device: its slots alone, in place, and of split heads its part; a chip pads 3.5 %.
    model = real_on(eight)[0]
    cache, logits = shape.cache_config(model).nbytes, shape.slots * model.config.vocab_size * 4
    for program, share in ((parallel, 1), (split, 2)):
        memory: Any = program.memory_analysis()
        assert memory.alias_size_in_bytes < 1.05 * cache / share
        assert memory.temp_size_in_bytes < logits + 2 * MB
