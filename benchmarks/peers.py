"""The contenders of ``compare_peers.py``, and those that this environment runs: ours and Transformers.

``foreign_peers.py`` has the others. Their interpreters import this module too: it needs numpy alone, and what
a peer needs is imported where the peer is made.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from typing import Any

import numpy as np

from benchmarks.machine import PeakMemory, jax_bandwidth, torch_bandwidth, usable_cores

DTYPES = {"bf16": "bfloat16", "f32": "float32"}
ITEMSIZE = {"bf16": 2, "f16": 2, "f32": 4}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to generate.

    ``kind`` is jitted or growing (ours), dynamic or static (Transformers' caches), empty for the others.
    """

    framework: str  # jax, torch, or a name of make_peers.ENVIRONMENTS
    dtype: str  # of ITEMSIZE
    kind: str
    capture: bool

    @property
    def name(self) -> str:
        if self.framework == "jax":
            return f"{self.kind}-{self.dtype}" + ("" if self.capture else "-nocapture")
        if self.framework == "torch":
            return f"hf-{self.dtype}-{self.kind}" + ("-hidden" if self.capture else "")
        return f"{self.framework}-{self.dtype}" + ("-hidden" if self.capture else "")

    @property
    def worker(self) -> tuple[str, str]:
        """The process that it shares with other contenders."""
        return self.framework, self.dtype


CONTENDERS = (
    *(Contender("jax", dtype, "jitted", capture) for dtype in DTYPES for capture in (True, False)),
    *(Contender("jax", dtype, "growing", True) for dtype in DTYPES),
    *(
        Contender("torch", dtype, kind, capture)
        for dtype in DTYPES
        for kind in ("dynamic", "static")
        for capture in (True, False)
    ),
    *(Contender("vllm", dtype, "", False) for dtype in DTYPES),
    *(Contender("nnsight", dtype, "", True) for dtype in DTYPES),
    *(Contender("transformer-lens", dtype, "", True) for dtype in DTYPES),
    *(Contender("llama.cpp", dtype, "", False) for dtype in ITEMSIZE),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What every contender of one comparison does: the same prompts [B, P], the same number of tokens."""

    prompts: np.ndarray
    new_tokens: int
    growing_tokens: int  # the growing path is too slow for all of them

    def tokens_of(self, contender: Contender) -> int:
        return self.growing_tokens if contender.kind == "growing" else self.new_tokens


@dataclasses.dataclass
class Measurement:
    """One round of one contender, in seconds and bytes."""

    prefill: float
    decode: float
    steps: int  # forward passes of the whole batch in ``decode``
    peak_bytes: int
    peak_what: str
    tokens: np.ndarray  # [B, new_tokens]
    rows: np.ndarray | None  # captured [layers 10 and 22, B, hidden] after reading the last token but one
    last_rows: np.ndarray | None  # captured [14, B, hidden] after reading the last token: ours alone has it
    capture_shape: tuple[int, ...] | None


class JaxPeer:
    """Our own paths."""

    def __init__(self, checkpoint: str, dtype: str, device: str):
        import jax

        from qwen2_jax import load_qwen2

        self.config, self.params = load_qwen2(checkpoint, dtype=DTYPES[dtype])
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        self._programs: dict[Contender, Any] = {}

    def versions(self) -> dict[str, str]:
        return versions("jax")

    def bandwidth(self) -> float:
        return jax_bandwidth()

    def prepare(self, contender: Contender, job: Job) -> tuple[float | None, float]:
        """Seconds to compile, and to the end of the first generation, compilation included."""
        started = time.perf_counter()
        compile_seconds = None
        if contender.kind == "jitted":
            from generate_jitted import GenerateShape, bucket_length, compile_generate

            width = bucket_length(job.prompts.shape[1])
            shape = GenerateShape(len(job.prompts), width, job.new_tokens, stop=False)
            program = compile_generate(self._model(contender), self.params, shape)
            self._programs[contender] = program
            compile_seconds = program.compile_seconds
        self.measure(contender, job)
        return compile_seconds, time.perf_counter() - started

    def measure(self, contender: Contender, job: Job) -> Measurement:
        import jax

        peak = PeakMemory()
        peak.start()
        if contender.kind == "growing":
            from qwen2_engine.python_loop import generate_single_task_python

            def generate(tokens: int) -> Any:
                model = self._model(contender)
                return generate_single_task_python(model, self.params, job.prompts, tokens)

            (_, prefill), (out, whole) = timed(generate, 1), timed(generate, job.growing_tokens)
            decode, steps = whole - prefill, job.growing_tokens - 1
        else:
            from generate_jitted import Sampling, pad_prompts
            from qwen2_core.requests import PromptBatch
            from qwen2_core.sampling import sampling_params

            prompts = PromptBatch(*pad_prompts(list(job.prompts)))
            traced = sampling_params(Sampling(), 0, (), self.config.vocab_size)
            sequence_ids = np.arange(len(job.prompts), dtype=np.uint32)
            program = self._programs[contender]
            (state, _), prefill = timed(
                lambda: jax.block_until_ready(program.prefill(self.params, prompts, traced, sequence_ids))
            )
            out, decode = timed(
                lambda: jax.block_until_ready(program.decode(self.params, state, traced, sequence_ids))
            )
            steps = job.new_tokens
        peak_bytes, peak_what = peak.read()
        if statistics := jax.local_devices()[0].memory_stats():
            peak_bytes, peak_what = statistics["peak_bytes_in_use"], "on the device, since the worker began"
        measured = Measurement(
            prefill, decode, steps, peak_bytes, peak_what, np.asarray(out.token_ids), None, None, None
        )
        if contender.capture:
            rows = out.activations
            measured.rows = np.asarray(rows[np.array([0, 12]), -2], np.float32)
            measured.last_rows = np.asarray(rows[:, -1], np.float32)
            measured.capture_shape = rows.shape
        return measured

    def _model(self, contender: Contender) -> Any:
        from qwen2_jax import QwenModel
        from qwen2_jax_with_hooks import create_model_with_hooks

        return create_model_with_hooks(self.config) if contender.capture else QwenModel(self.config)


class TorchPeer:
    """Transformers' ``generate``: what one would use instead."""

    def __init__(self, checkpoint: str, dtype: str, device: str):
        import torch
        import transformers

        torch.set_num_threads(usable_cores())
        transformers.logging.set_verbosity_error()
        self.device = device
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, DTYPES[dtype])
        )
        self.model = model.to(device).eval()
        self.model.generation_config.eos_token_id = None
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters())

    def versions(self) -> dict[str, str]:
        return versions("transformers", "torch")

    def bandwidth(self) -> float:
        return torch_bandwidth(self.device)

    def prepare(self, contender: Contender, job: Job) -> tuple[float | None, float]:
        return None, timed(self.measure, contender, job)[1]

    def measure(self, contender: Contender, job: Job) -> Measurement:
        import torch

        ids = torch.from_numpy(job.prompts.astype(np.int64)).to(self.device)
        on_device = self.device != "cpu"
        peak = PeakMemory()
        peak.start()
        if on_device:
            torch.cuda.reset_peak_memory_stats()

        def generate(tokens: int) -> Any:
            with torch.inference_mode():
                out = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    pad_token_id=0,
                    cache_implementation=contender.kind,
                    output_hidden_states=contender.capture,
                    return_dict_in_generate=True,
                )
            out.sequences[0, -1].item()  # waits for the device
            return out

        (_, prefill), (out, whole) = timed(generate, 1), timed(generate, job.new_tokens)
        peak_bytes, peak_what = peak.read()
        if on_device:
            peak_bytes, peak_what = torch.cuda.max_memory_allocated(), "on the device"
        rows = None
        if contender.capture:
            last = out.hidden_states[-1]  # of the step that read the last token but one
            rows = torch.stack([last[11][:, -1], last[23][:, -1]]).float().cpu().numpy()
        tokens = out.sequences[:, ids.shape[1] :].cpu().numpy()
        steps = job.new_tokens - 1
        return Measurement(prefill, whole - prefill, steps, peak_bytes, peak_what, tokens, rows, None, None)


def timed(run: Any, *args: Any) -> tuple[Any, float]:
    """What ``run`` returns, and the seconds it took."""
    started = time.perf_counter()
    result = run(*args)
    return result, time.perf_counter() - started


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages of this interpreter."""
    return {package: importlib.metadata.version(package) for package in packages}
