"""The checks of ``on_gpu.py``: parity with Transformers, and equal bytes whatever the slot or the order."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from activation_store.format import FinishedSequence
from benchmarks.on_gpu_models import REAL, SMALL, TINY, TINY_LAYERS, Bench, random_params
from generate_jitted import (
    GenerateShape,
    decode_step_with_cache,
    generate_single_task_jitted,
    pad_prompts,
    prefill_with_cache,
)
from kvcache_utils import create_kv_cache_buffers
from qwen2_core.config import QwenConfig
from qwen2_core.requests import SequenceRequest
from qwen2_core.sampling import Sampling
from qwen2_engine import ContinuousEngine
from qwen2_jax_with_hooks import create_model_with_hooks

_LENGTHS = (1, 17, 65, 200)  # of prompts, divided by 10 at the small scale
_STEPS = 8  # decoded one by one, for their logits
_TIE = 1e-2  # a token that Transformers' logits place no further than this behind the best is no error
_LOGPROB_TOLERANCE = 1e-2
# Rows of bfloat16 against float32: how much further from it than Transformers' own ours may be.
_BF16_MEDIAN, _BF16_WORST = 1.25, 2.0


class Outcome(NamedTuple):
    """What a section found: figures, and a sentence for each of them that must not be."""

    figures: dict[str, Any]
    problems: list[str] = []  # noqa: RUF012 - never changed


def row_errors(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Returns the error of every row (the last axis), relative to the expected row's norm."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        raise ValueError(f"Shape {got.shape} instead of {expected.shape}.")
    return np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


# --- Parity -------------------------------------------------------------------------------------------------


def _prompts(bench: Bench) -> list[np.ndarray]:
    lengths = [max(1, length * bench.scale.prompt // 200) for length in _LENGTHS]
    return [bench.prompts(1, length)[0] for length in lengths]


def parity_float32(bench: Bench) -> Outcome:
    """Compares tokens, log-probabilities, rows and logits with one plain pass of Transformers, in float32."""
    config, tolerance = bench.config("float32"), bench.scale.tolerance
    model, params, reference = bench.model(config), bench.params(config), bench.torch(config)
    prompts, tokens = _prompts(bench), min(bench.scale.new_tokens, 32)
    ids, lengths = pad_prompts(prompts)
    out: Any = generate_single_task_jitted(
        model, params, ids, tokens, prompt_lengths=lengths, extract_prompt=True
    )
    generated, rows = np.asarray(out.token_ids), np.asarray(out.activations)
    prompt_rows, logprobs = np.asarray(out.prompt_activations), np.asarray(out.logprobs)
    stepped = _stepwise_logits(model, params, (ids, lengths), generated)
    worst: dict[str, float] = dict.fromkeys(("rows", "prompt_rows", "logits"), 0.0)
    logprob_error, wrong_tokens = 0.0, 0
    for b, prompt in enumerate(prompts):
        n, chosen = len(prompt), generated[b]
        sequence = np.concatenate([prompt, chosen])
        logits, expected = reference.forward(sequence, bench.scale.layers, n - 1)
        measured = {
            "rows": row_errors(rows[:, :, b], expected[:, n:]),
            "prompt_rows": row_errors(prompt_rows[:, :n, b], expected[:, :n]),
            "logits": row_errors(stepped[:, b], logits[: len(stepped)]),
        }
        worst = {name: max(worst[name], float(errors.max())) for name, errors in measured.items()}
        of_chosen = np.take_along_axis(logits[:-1], chosen[:, None], axis=-1)[:, 0]
        wrong_tokens += int((logits[:-1].max(-1) - of_chosen > _TIE).sum())
        peak = logits[:-1].max(-1)
        total = peak + np.log(np.exp(logits[:-1].astype(np.float64) - peak[:, None]).sum(-1))
        logprob_error = max(logprob_error, float(np.abs(logprobs[b] - (of_chosen - total)).max()))
    problems = [
        f"{name} differ from Transformers' by {error:.1e}, more than {tolerance:.0e}"
        for name, error in worst.items()
        if not error < tolerance
    ]
    if wrong_tokens:
        problems.append(f"{wrong_tokens} of {generated.size} tokens are not Transformers' choice")
    if not logprob_error < _LOGPROB_TOLERANCE:
        problems.append(f"log-probabilities differ from Transformers' by {logprob_error:.1e}")
    distinct = min(len(set(row.tolist())) for row in generated)
    figures = {f"worst_error_of_{name}": error for name, error in worst.items()}
    figures |= {"worst_error_of_logprobs": logprob_error, "wrong_tokens": wrong_tokens}
    return Outcome(figures | {"tokens": generated.size, "fewest_distinct_tokens": distinct}, problems)


def _stepwise_logits(
    model: Any, params: Any, prompts: tuple[np.ndarray, np.ndarray], tokens: np.ndarray
) -> np.ndarray:
    """Returns the logits [steps + 1, B, vocab] of the prefill and of the first decode steps."""
    batch, width = prompts[0].shape
    shape = GenerateShape(batch, width, tokens.shape[1])
    cache = create_kv_cache_buffers(shape.cache_config(model.config))
    prefill = jax.jit(functools.partial(prefill_with_cache, model, capture=False))
    step = jax.jit(functools.partial(decode_step_with_cache, model))
    out, cache, _ = prefill(params, *prompts, cache)
    logits = [np.asarray(out)]
    for t in range(min(_STEPS, tokens.shape[1])):
        out, cache, _ = step(params, tokens[:, t], cache)
        logits.append(np.asarray(out))
    return np.stack(logits)


def parity_bfloat16(bench: Bench) -> Outcome:
    """Compares bfloat16 rows with float32 ones, ours beside Transformers', over the same tokens."""
    config = bench.config("bfloat16")
    prompts, tokens = _prompts(bench)[1:], min(bench.scale.new_tokens, 32)
    ids, lengths = pad_prompts(prompts)
    model, params = bench.model(config), bench.params(config)
    out: Any = generate_single_task_jitted(model, params, ids, tokens, prompt_lengths=lengths)
    generated, rows = np.asarray(out.token_ids), np.asarray(out.activations, np.float32)
    exact, theirs = bench.torch(bench.config("float32")), bench.torch(config)
    our_errors, their_errors = [], []
    for b, prompt in enumerate(prompts):
        sequence, n = np.concatenate([prompt, generated[b]]), len(prompt)
        expected = exact.forward(sequence, bench.scale.layers, n)[1][:, n:]
        our_errors.append(row_errors(rows[:, :, b], expected))
        their_errors.append(row_errors(theirs.forward(sequence, bench.scale.layers, n)[1][:, n:], expected))
    ours, peers = np.stack(our_errors), np.stack(their_errors)
    figures = {
        "median_error": float(np.median(ours)),
        "median_error_of_transformers": float(np.median(peers)),
        "worst_error": float(ours.max()),
        "worst_error_of_transformers": float(peers.max()),
    }
    problems = []
    for name, factor in (("median_error", _BF16_MEDIAN), ("worst_error", _BF16_WORST)):
        if not figures[name] <= factor * figures[f"{name}_of_transformers"]:
            problems.append(f"the {name.replace('_', ' ')} is more than {factor} times Transformers'")
    return Outcome(figures, problems)


# --- Equal bytes --------------------------------------------------------------------------------------------


def differences(expected: Sequence[FinishedSequence], found: Sequence[FinishedSequence]) -> list[str]:
    """Returns a sentence for each sequence of ``found`` that is not byte for byte the expected one."""
    by_id = {sequence.id: sequence for sequence in expected}
    problems = []
    for sequence in found:
        for name in ("token_ids", "logprobs", "rows"):
            one, other = getattr(by_id[sequence.id], name), getattr(sequence, name)
            if one.shape != other.shape:
                problems.append(f"sequence {sequence.id}: {name} {other.shape} instead of {one.shape}")
            elif one.tobytes() != other.tobytes():
                unequal = int((_bits(one) != _bits(other)).sum())
                problems.append(f"sequence {sequence.id}: {unequal} of {one.size} values of {name} differ")
    return problems


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def equal_bytes_tiny(bench: Bench) -> Outcome:
    """Runs ``equal_bytes`` over a tiny model, in float32 and in bfloat16."""
    figures: dict[str, Any] = {}
    problems = []
    for dtype in ("float32", "bfloat16"):
        config = TINY.replace(dtype=dtype)
        outcome = equal_bytes(config, TINY_LAYERS, random_params(config), slots=4)
        figures |= {f"{name}_{dtype}": value for name, value in outcome.figures.items()}
        problems += [f"{dtype}: {problem}" for problem in outcome.problems]
    return Outcome(figures, problems)


def equal_bytes_real(bench: Bench) -> Outcome:
    """Runs ``equal_bytes`` over the model that is timed."""
    config = bench.config()
    return equal_bytes(config, bench.scale.layers, bench.params(config), slots=bench.scale.engine_slots)


def _engine(
    config: QwenConfig, layers: tuple[int, ...], params: Any, slots: int
) -> tuple[ContinuousEngine, list[SequenceRequest]]:
    """Returns an engine that samples, and three requests for each of its slots."""
    engine = ContinuousEngine(
        create_model_with_hooks(config, layers), params, slots=slots, sampling=Sampling(1.0), seed=3
    )
    rng = np.random.default_rng(0)
    requests = engine.order(
        SequenceRequest(rng.integers(0, config.vocab_size, int(length)), int(tokens), sampling_id=i, id=i)
        for i, (length, tokens) in enumerate(
            zip(rng.integers(5, 96, 3 * slots), rng.integers(3, 60, 3 * slots), strict=True)
        )
    )
    return engine, requests


def equal_bytes(config: QwenConfig, layers: tuple[int, ...], params: Any, slots: int) -> Outcome:
    """Demands the same bytes of the same requests in two orders, of one alone, and of a continued run."""
    engine, requests = _engine(config, layers, params, slots)
    (stage,) = engine.plan(requests)
    running = engine.start(stage)
    first = list(running.generate(requests))
    backwards = list(running.generate(requests[::-1]))
    alone = list(running.generate(requests[slots : slots + 1]))
    windows = iter(range(10**6))
    stopped = list(engine.start(stage).generate(requests, should_stop=lambda: next(windows) == 3))
    ended = {sequence.id for sequence in stopped}
    rest = [request for request in requests if request.id not in ended]
    continued = list(engine.start(stage).generate(rest))
    problems = []
    for name, found, count in (
        ("in the opposite order", backwards, len(requests)),
        ("alone", alone, 1),
        ("stopped and continued", stopped + continued, len(requests)),
    ):
        if len(found) != count:
            problems.append(f"{name}: {len(found)} sequences instead of {count}")
        problems += [f"{name}: {problem}" for problem in differences(first, found)]
    if not 0 < len(stopped) < len(requests):
        problems.append(f"the stop left {len(stopped)} of {len(requests)} sequences: it showed nothing")
    figures = {
        "sequences": len(requests),
        "slots": slots,
        "before_the_stop": len(stopped),
        "compile_seconds": running.programs.compile_seconds,
    }
    return Outcome(figures, problems)


# --- Another process ----------------------------------------------------------------------------------------


def digests(bench: Bench) -> dict[str, str]:
    """Returns of each sequence, by its id, a hash of all that the engine returns of it."""
    config = bench.config()
    engine, requests = _engine(
        config, bench.scale.layers, bench.params(config), slots=bench.scale.engine_slots
    )
    result = {}
    for sequence in engine.run(requests):
        parts = (sequence.token_ids, sequence.logprobs, np.ascontiguousarray(sequence.rows))
        result[str(sequence.id)] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return result


def equal_bytes_elsewhere(bench: Bench) -> Outcome:
    """Demands the same bytes of another process, which compiles, and on a GPU tunes, its programs anew."""
    here = digests(bench)
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the card is in use already
    command = [sys.executable, "-m", "benchmarks.on_gpu_checks"] + ["--small"] * (bench.scale is SMALL)
    run = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    if run.returncode:
        raise RuntimeError(f"The other process failed: {run.stderr.strip()[-250:]}")
    elsewhere = json.loads(run.stdout.splitlines()[-1])
    unequal = [name for name, digest in here.items() if elsewhere.get(name) != digest]
    problems = [f"{len(unequal)} of {len(here)} sequences differ in another process"] if unequal else []
    return Outcome({"sequences": len(here), "unequal": len(unequal)}, problems)


if __name__ == "__main__":
    print(json.dumps(digests(Bench(SMALL if "--small" in sys.argv else REAL))))
