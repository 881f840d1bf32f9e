"""The models under ``on_gpu.py``: random weights made on the device, and Transformers with the same ones."""

from __future__ import annotations

import dataclasses
import functools
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import jax_bandwidth
from generate_jitted import pad_prompts
from qwen2_core.config import QwenConfig
from qwen2_core.requests import PromptBatch
from qwen2_core.weights import Params, tensor_specs
from qwen2_jax import QwenModel
from qwen2_jax_with_hooks import FIXED_EXTRACT_LAYERS, QwenModelWithActivations, create_model_with_hooks

# As in examples/checkpoint_writer.py: greedy decoding from such weights gives a varied sequence.
_GAIN, _BIAS_DEVIATION, _NORM_DEVIATION = 1.6, 0.3, 0.3


@dataclasses.dataclass(frozen=True)
class Scale:
    """Says how large everything is: ``REAL`` for a GPU, ``SMALL`` to try the program on a CPU."""

    config: QwenConfig
    layers: tuple[int, ...]  # captured
    dtype: str  # of everything that is timed
    batches: tuple[int, ...]  # the first two come early
    prompt: int  # tokens
    long_prompt: int
    new_tokens: int
    peer_tokens: int  # new tokens of Transformers, which needs longer for each
    rounds: int
    slots: int  # of goodput
    engine_slots: int  # of the checks of equal bytes
    shrink: int  # divides the lengths of goodput
    tolerance: float  # of float32 rows and logits, relative to their norm
    copied_bytes: int


TINY = QwenConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TINY_LAYERS = (0, 1)
SMALL = Scale(
    config=TINY,
    layers=TINY_LAYERS,
    dtype="float32",
    batches=(1, 2),
    prompt=20,
    long_prompt=70,
    new_tokens=8,
    peer_tokens=4,
    rounds=2,
    slots=4,
    engine_slots=4,
    shrink=48,
    tolerance=1e-4,
    copied_bytes=2**26,
)
REAL = Scale(
    config=QwenConfig(),
    layers=FIXED_EXTRACT_LAYERS,
    dtype="bfloat16",
    batches=(1, 8, 32, 128, 512),
    prompt=200,
    long_prompt=2000,
    new_tokens=128,
    peer_tokens=32,
    rounds=5,
    slots=64,
    engine_slots=8,
    shrink=1,
    tolerance=2e-3,
    copied_bytes=2**31,
)


def random_params(config: QwenConfig) -> Params:
    """Makes lively weights on the default device; bfloat16 and float32 ones have equal values."""
    tree: Params = {}
    for name, spec in tensor_specs(config).items():
        *parents, last = spec.path
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
        mean, deviation = 0.0, _GAIN / float(np.sqrt(spec.shape[-1]))
        if last == "bias":
            deviation = _BIAS_DEVIATION
        elif name.endswith("norm.weight"):
            mean, deviation = 1.0, _NORM_DEVIATION
        key = jax.random.key(zlib.crc32(name.encode()))
        node[last] = _random_tensor(key, spec.tree_shape, mean, deviation).astype(config.dtype)
    return tree


@functools.partial(jax.jit, static_argnums=1)
def _random_tensor(key: Any, shape: tuple[int, ...], mean: float, deviation: float) -> Any:
    reach = deviation * 3**0.5
    return (mean + jax.random.uniform(key, shape, minval=-reach, maxval=reach)).astype(jnp.bfloat16)


class TorchModel:
    """Transformers' Qwen2 with our weights, on the GPU if there is one, float32 products without TF32."""

    def __init__(self, config: QwenConfig, params: Params) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_float32_matmul_precision("highest")
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        shape = transformers.Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
        )
        with torch.device(self.device):
            model: Any = transformers.AutoModelForCausalLM.from_config(
                shape,
                dtype=getattr(torch, config.dtype.name),
                # The reference for parity multiplies plainly; what is timed has the faster kernels.
                attn_implementation="eager" if config.dtype == np.float32 else "sdpa",
            )
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, spec in tensor_specs(config).items():
                weight = functools.reduce(lambda node, key: node[key], spec.path, params)
                array = np.array(weight, np.float32)
                named[name].copy_(torch.from_numpy(array.T if spec.transposed else array))
        model.generation_config.eos_token_id = None
        self.model, self._torch = model.eval(), torch

    def forward(
        self, token_ids: np.ndarray, layers: tuple[int, ...], first: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads one sequence: float32 logits [n - first, vocab], and rows [layers, n, hidden]."""
        rows: list[Any] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            rows.append((output[0] if isinstance(output, tuple) else output)[0].float().cpu())

        hooks = [self.model.model.layers[layer].register_forward_hook(keep) for layer in layers]
        try:
            with self._torch.inference_mode():
                ids = self._torch.from_numpy(token_ids[None].astype(np.int64)).to(self.device)
                logits = self.model(ids, use_cache=False).logits[0, first:].float().cpu()
        finally:
            for hook in hooks:
                hook.remove()
        return logits.numpy(), self._torch.stack(rows).numpy()

    def generate(
        self, prompts: np.ndarray, tokens: int, *, capture: bool, compiled: bool = False
    ) -> np.ndarray:
        """Generates greedily with a static cache and returns [B, tokens] once the device has ended."""
        ids = self._torch.from_numpy(prompts.astype(np.int64)).to(self.device)
        with self._torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
                cache_implementation="static",
                output_hidden_states=capture,
                return_dict_in_generate=True,
                disable_compile=not compiled,  # on a GPU generate compiles by itself
            )
        return out.sequences[:, ids.shape[1] :].cpu().numpy()

    def copy_bandwidth(self, nbytes: int) -> float:
        """Returns the bytes a second that a large copy reads and writes."""
        source = self._torch.ones(nbytes // 4, device=self.device)
        target = self._torch.empty_like(source)

        def run(times: int) -> None:
            for _ in range(times):
                target.copy_(source)
            target[0].item()  # waits for the device

        return _copies_a_second(run) * 2 * nbytes


class Bench:
    """What the sections share: the scale, and the models, each made when it is first asked for."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._params: dict[QwenConfig, Params] = {}
        self._torch: dict[QwenConfig, TorchModel] = {}

    def config(self, dtype: str | None = None) -> QwenConfig:
        """Returns the config at this dtype, by default the one that is timed."""
        return self.scale.config.replace(dtype=dtype or self.scale.dtype)

    def params(self, config: QwenConfig) -> Params:
        """Returns the weights of this config."""
        if config not in self._params:
            self._params[config] = jax.block_until_ready(random_params(config))
        return self._params[config]

    def torch(self, config: QwenConfig) -> TorchModel:
        """Returns Transformers' model with the weights of this config."""
        if config not in self._torch:
            self._torch[config] = TorchModel(config, self.params(config))
        return self._torch[config]

    def model(self, config: QwenConfig) -> QwenModelWithActivations:
        """Returns our model that captures."""
        return create_model_with_hooks(config, self.scale.layers)

    def plain_model(self, config: QwenConfig) -> QwenModel:
        """Returns our model that captures nothing."""
        return QwenModel(config)

    def prompts(self, batch: int, tokens: int, vocab: int | None = None) -> np.ndarray:
        """Returns random prompts [batch, tokens]."""
        rng = np.random.default_rng([batch, tokens])
        return rng.integers(0, vocab or self.scale.config.vocab_size, (batch, tokens), dtype=np.int32)

    def padded(self, batch: int, tokens: int) -> PromptBatch:
        """Returns the same prompts, padded as our programs take them."""
        return PromptBatch(*pad_prompts(list(self.prompts(batch, tokens))))

    @functools.cached_property
    def jax_bandwidths(self) -> dict[str, float]:
        """Bytes a second that the device's memory delivers to JAX: by reductions, and by copies."""
        return {"jax_copy": jax_copy_bandwidth(self.scale.copied_bytes), "jax_read": jax_bandwidth()}

    @property
    def bandwidth(self) -> float:
        """The faster of them: the limit that a step is set against."""
        return max(self.jax_bandwidths.values())


def jax_copy_bandwidth(nbytes: int) -> float:
    """Returns the bytes a second that ``a + 1`` reads and writes, over a large array."""
    add = jax.jit(lambda a: a + 1)
    array = jnp.zeros(nbytes // 4, jnp.float32)

    def run(times: int) -> None:
        out = array
        for _ in range(times):
            out = add(out)
        out.block_until_ready()

    return _copies_a_second(run) * 2 * nbytes


def _copies_a_second(run: Any) -> float:
    run(2)
    started = time.perf_counter()
    run(10)
    return 10 / (time.perf_counter() - started)
