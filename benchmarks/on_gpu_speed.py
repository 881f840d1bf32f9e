"""The timed sections of ``on_gpu.py``: decode, prefill, Transformers, goodput, bandwidth, kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from benchmarks.machine import torch_bandwidth
from benchmarks.on_gpu_checks import Outcome
from benchmarks.on_gpu_models import Bench
from benchmarks.on_gpu_trace import profile
from generate_jitted import CompiledGenerate, GenerateShape, Sampling, compile_generate, lower_generate
from qwen2_core.compilation import compile_all
from qwen2_core.config import QwenConfig
from qwen2_core.requests import SequenceRequest, bucket_length
from qwen2_core.sampling import SamplingParams, sampling_params
from qwen2_engine import ContinuousEngine, Occupancy
from qwen2_jax import QwenModel

# (prompt, answer) of 48 of the 400 public ARC training tasks, evenly spread, in tokens of the tiny tokenizer.
ARC_LENGTHS = (
    (880, 119), (1625, 169), (1105, 144), (1896, 107), (630, 19), (546, 44), (365, 29), (1280, 169),
    (810, 144), (2387, 378), (1157, 196), (1535, 289), (1868, 196), (999, 196), (1625, 242), (758, 110),
    (1105, 144), (2426, 264), (760, 29), (401, 38), (2298, 441), (603, 65), (1575, 144), (2655, 327),
    (1385, 81), (1253, 529), (365, 29), (644, 88), (1743, 220), (782, 119), (1184, 119), (436, 46),
    (1422, 225), (1330, 15), (415, 65), (440, 144), (760, 29), (2126, 395), (638, 72), (1980, 729),
    (484, 29), (1105, 144), (1400, 144), (1891, 364), (2977, 119), (592, 35), (406, 29), (2954, 51),
)  # fmt: skip
# Each prompt is made as long as the next of these, so that few programs are compiled.
ARC_WIDTHS = (512, 1024, 1536, 2048, 3072)
SAMPLES = 4  # sequences of one prompt


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what ``run`` returns, once the device has computed it, and the seconds that took."""
    started = time.perf_counter()
    result = jax.block_until_ready(run())
    return result, time.perf_counter() - started


def bandwidth(bench: Bench) -> Outcome:
    """Measures the bytes a second that memory delivers, to JAX and to torch."""
    measured, problems = dict(bench.jax_bandwidths), []
    try:
        peer = bench.torch(bench.config())
        measured["torch_copy"] = peer.copy_bandwidth(bench.scale.copied_bytes)
        measured["torch_read"] = torch_bandwidth(peer.device)
    except Exception as error:
        problems.append(one_line(error))
    return Outcome({f"{name}_gb_s": value / 1e9 for name, value in measured.items()}, problems)


# --- Decode and prefill -------------------------------------------------------------------------------------


def _compile(bench: Bench, batch: int, capture: bool) -> CompiledGenerate:
    config, width = bench.config(), bucket_length(bench.scale.prompt)
    model: QwenModel = bench.model(config) if capture else bench.plain_model(config)
    shape = GenerateShape(batch, width, bench.scale.new_tokens, stop=False)
    return compile_generate(model, bench.params(config), shape)


def _sampling(config: QwenConfig) -> SamplingParams:
    return sampling_params(Sampling(), 0, (), config.vocab_size)


def _step_bytes(config: QwenConfig, params: Any, batch: int, valid_tokens: float) -> float:
    """Returns the bytes that a step has to read: the weights, and each row's valid keys and values."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    head = config.num_key_value_heads * config.head_dim * config.dtype.itemsize
    return weights + batch * valid_tokens * 2 * config.num_hidden_layers * head


def decode(bench: Bench, batch: int) -> Outcome:
    """Measures tokens a second with and without capture, in alternating rounds, and the prefill before."""
    scale, config = bench.scale, bench.config()
    params, prompts, sampling = bench.params(config), bench.padded(batch, scale.prompt), _sampling(config)
    sequence_ids = np.arange(batch, dtype=np.uint32)
    kinds = {"captured": True, "not_captured": False}
    with ThreadPoolExecutor() as pool:
        programs = dict(
            zip(kinds, pool.map(lambda capture: _compile(bench, batch, capture), kinds.values()), strict=True)
        )
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    prefills: list[float] = []
    problems = []
    for turn in range(scale.rounds + 1):
        for kind, program in programs.items():
            (state, _), prefill = timed(lambda p=program: p.prefill(params, prompts, sampling, sequence_ids))
            state, took = timed(lambda p=program, s=state: p.decode(params, s, sampling, sequence_ids))
            if turn:  # the first one is for warmth
                seconds[kind].append(took)
                prefills.append(prefill)
            elif kind == "captured" and not _rows_are_there(state.activations):
                problems.append("the last token's rows are zero or not finite")
            del state
    figures: dict[str, Any] = {"prefill_seconds": statistics.median(prefills)}
    valid = scale.prompt + (scale.new_tokens + 1) / 2  # read by a step, on average
    nbytes = _step_bytes(config, params, batch, valid)
    for kind, program in programs.items():
        rates = [batch * scale.new_tokens / took for took in seconds[kind]]
        step = statistics.median(seconds[kind]) / scale.new_tokens
        figures |= {
            f"{kind}_tokens_s": statistics.median(rates),
            f"{kind}_range": [min(rates), max(rates)],
            f"{kind}_step_ms": step * 1e3,
            f"{kind}_share_of_limit": nbytes / step / bench.bandwidth,
            f"{kind}_compile_seconds": program.compile_seconds,
        }
    if statistics_of_memory := jax.local_devices()[0].memory_stats():
        figures["peak_bytes_so_far"] = statistics_of_memory["peak_bytes_in_use"]
    return Outcome(figures | {"bytes_a_step": nbytes}, problems)


def _rows_are_there(activations: Any) -> bool:
    last = np.asarray(activations[:, -1], np.float32)
    return bool(np.isfinite(last).all() and (np.linalg.norm(last, axis=-1) > 0).all())


def prefill(bench: Bench) -> Outcome:
    """Measures reading prompts of two lengths, one and several at once, beside Transformers."""
    scale, config = bench.scale, bench.config()
    params, model, sampling = bench.params(config), bench.model(config), _sampling(config)
    cases = [(batch, tokens) for tokens in (scale.prompt, scale.long_prompt) for batch in scale.batches[:2]]
    lowered = []
    for batch, tokens in cases:
        shape = GenerateShape(batch, bucket_length(tokens), 1, stop=False)
        lowered.append(lower_generate(model, params, shape)[0])
    programs, compile_seconds = timed(lambda: compile_all(lowered))
    figures: dict[str, Any] = {"compile_seconds_of_all": compile_seconds}
    for (batch, tokens), program in zip(cases, programs, strict=True):
        prompts, ids = bench.padded(batch, tokens), np.arange(batch, dtype=np.uint32)
        rounds = [
            timed(lambda p=program, x=prompts, i=ids: p(params, x, sampling, i))[1]
            for _ in range(scale.rounds + 1)
        ]
        name = f"{batch}x{tokens}"
        figures[f"{name}_seconds"] = statistics.median(rounds[1:])
        figures[f"{name}_tokens_s"] = batch * tokens / statistics.median(rounds[1:])
    try:
        peer = bench.torch(config)
        for batch, tokens in cases:
            figures[f"{batch}x{tokens}_transformers_seconds"] = _peer_seconds(
                bench, bench.prompts(batch, tokens), lambda ids: peer.generate(ids, 1, capture=True)
            )
    except Exception as error:
        return Outcome(figures, [one_line(error)])
    return Outcome(figures)


# --- Transformers -------------------------------------------------------------------------------------------


def _peer_seconds(
    bench: Bench, prompts: np.ndarray, run: Callable[[np.ndarray], Any], warm: int = 1
) -> float:
    return statistics.median(
        [timed(lambda: run(prompts))[1] for _ in range(warm + min(bench.scale.rounds, 3))][warm:]
    )


def transformers(bench: Bench, batch: int, *, compiled: bool = False) -> Outcome:
    """Measures ``generate`` with a static cache, with hidden states and without.

    Decode is the whole without a generation of one token, which is never compiled. One kind that fails does
    not stop the other.
    """
    peer, prompts = bench.torch(bench.config()), bench.prompts(batch, bench.scale.prompt)
    steps = bench.scale.peer_tokens - 1
    figures: dict[str, Any] = {}
    problems = []
    for kind, capture in (("hidden_states", True), ("no_hidden_states", False)):
        try:
            first = _peer_seconds(bench, prompts, lambda ids, c=capture: peer.generate(ids, 1, capture=c))
            whole = _peer_seconds(
                bench,
                prompts,
                lambda ids, c=capture: peer.generate(ids, steps + 1, capture=c, compiled=compiled),
                warm=3 if compiled else 1,
            )
        except Exception as error:
            problems.append(f"{kind}: {one_line(error)}")
            continue
        figures |= {
            f"{kind}_tokens_s": batch * steps / (whole - first),
            f"{kind}_step_ms": (whole - first) / steps * 1e3,
            f"{kind}_prefill_seconds": first,
        }
    return Outcome(figures, problems)


def one_line(error: BaseException) -> str:
    """Returns an error's type and the beginning of what it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# --- Goodput ------------------------------------------------------------------------------------------------


def goodput(bench: Bench) -> Outcome:
    """Measures valid tokens a second of the continuous engine on ARC's lengths, prefills included."""
    scale, config = bench.scale, bench.config()
    engine = ContinuousEngine(bench.model(config), bench.params(config), slots=scale.slots)
    rng = np.random.default_rng(0)
    requests = []
    for prompt, answer in ARC_LENGTHS:
        width = next(width for width in ARC_WIDTHS if width >= prompt) // scale.shrink
        tokens = rng.integers(0, config.vocab_size, width)
        requests += [
            SequenceRequest(tokens, max(answer // scale.shrink, 1), sampling_id=len(requests) + i)
            for i in range(SAMPLES)
        ]
    requests = engine.order(requests)
    windows: list[Occupancy] = []
    total, seconds, compile_seconds = 0, 0.0, 0.0
    for stage in engine.plan(requests):
        running = engine.start(stage)
        compile_seconds += running.programs.compile_seconds
        of_stage = [request for request in requests if request.width in stage.widths]
        started = time.perf_counter()
        total += sum(len(s.token_ids) for s in running.generate(of_stage, on_window=windows.append))
        seconds += time.perf_counter() - started
    expected = sum(request.max_tokens for request in requests)
    problems = [] if total == expected else [f"{total} tokens instead of {expected}"]
    live, made = sum(w.live_steps for w in windows), sum(w.steps * w.slots for w in windows)
    figures = {
        "valid_tokens_s": total / seconds,
        "seconds": seconds,
        "tokens": total,
        "sequences": len(requests),
        "slots": windows[0].slots,
        "occupancy": live / made,
        "prompt_tokens_read": sum(len(request.prompt_token_ids) for request in requests) // SAMPLES,
        "compile_seconds": compile_seconds,
    }
    return Outcome(figures, problems)


# --- Kernels ------------------------------------------------------------------------------------------------


def kernels(bench: Bench, batch: int) -> Outcome:
    """Measures the time of each kernel of a decode with capture, with the program of ``decode``."""
    config = bench.config()
    params, prompts, sampling = (
        bench.params(config),
        bench.padded(batch, bench.scale.prompt),
        _sampling(config),
    )
    sequence_ids = np.arange(batch, dtype=np.uint32)
    program = _compile(bench, batch, capture=True)

    def state() -> Any:
        return jax.block_until_ready(program.prefill(params, prompts, sampling, sequence_ids))[0]

    def run(state: Any) -> None:
        jax.block_until_ready(program.decode(params, state, sampling, sequence_ids))

    run(state())
    fresh = state()
    started = time.perf_counter()
    found = profile(lambda: run(fresh))
    seconds = time.perf_counter() - started
    steps = bench.scale.new_tokens
    figures = {
        "steps": steps,
        "kernels_a_step": sum(kernel.runs for kernel in found) / steps,
        "microseconds_in_kernels_a_step": sum(kernel.microseconds for kernel in found) / steps,
        "profiling_seconds": seconds,
        "kernels": [kernel._asdict() for kernel in found],
    }
    return Outcome(figures)
