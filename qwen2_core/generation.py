"""What one call of ``generate_single_task_jitted`` compiles, and what it returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32

from kvcache_utils import KVCacheConfig
from qwen2_core.compilation import defined_settings, program_settings
from qwen2_core.config import QwenConfig
from qwen2_core.hook_points import LN_FINAL, RESID_POST
from qwen2_core.hooks import PointLayers
from qwen2_core.inputs import as_int
from qwen2_core.requests import PromptBatch
from qwen2_core.sampling import SamplingParams, SamplingShape
from qwen2_core.steering import Steering, steer_prompts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What one call generated, on the device. Everything at or past ``lengths[b]`` is zero.

    ``batch`` is prompts x samples_per_prompt, samples of one prompt adjacent.
    """

    token_ids: Int32[Array, "batch max_tokens"]
    lengths: Int32[Array, " batch"]  # tokens generated, the EOS that ended the row included
    finished: Bool[Array, " batch"]  # True: ended by an EOS token, not by max_tokens
    logprobs: Float32[
        Array, "batch max_tokens"
    ]  # the model's own log-probability (temperature 1) of each token
    activations: Float[Array, "layers max_tokens batch hidden"] | None  # in the model's dtype
    prompt_activations: Float[Array, "layers width prompts hidden"] | None  # zero past each prompt's length
    layers: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})  # captured, in order
    # The values of other points by name, as activations and prompt_activations, and the layers of each.
    points: dict[str, Float[Array, "layers max_tokens batch width"]] = dataclasses.field(default_factory=dict)
    prompt_points: dict[str, Float[Array, "layers width prompts _"]] = dataclasses.field(default_factory=dict)
    point_layers: PointLayers = dataclasses.field(default=(), metadata={"static": True})

    def __repr__(self) -> str:
        """Says in a line what there is, without the values."""
        captured = f"layers {', '.join(map(str, self.layers))}" if self.layers else "no layers"
        captured = ", ".join((captured, *self.points))
        batch, tokens = self.token_ids.shape
        return f"Generation({batch} rows of up to {tokens} tokens, {captured})"

    def tokens(self, row: Any) -> list[int]:
        """Returns the tokens of one sequence, cut to its length, ready for ``tokenizer.decode``.

        Raises:
            IndexError: there is no such row.
            TypeError: it is no whole number.
        """
        row = self._row(row)
        with defined_settings():
            return np.asarray(self.token_ids)[row, : int(self.lengths[row])].tolist()

    def layer(self, layer: Any, row: Any, point: str = RESID_POST) -> Float32[np.ndarray, "tokens width"]:
        """Returns the rows of one layer for one sequence, on the host, cut to the sequence's length.

        ``out.layer(12, row=5)[t]`` is the output of decoder block 12 after reading generated token t of row
        5, ``out.layer(12, row=5, point="attn.hook_z")[t]`` what its heads gave. A point of the model has the
        layer None.

        Raises:
            IndexError: the layer was not captured, or there is no such row.
            TypeError: either is no whole number.
        """
        row = self._row(row)
        layer = None if layer is None and point == LN_FINAL else _index("layer", layer)
        layers, values = self.layers, self.activations
        if point != RESID_POST:
            layers, values = dict(self.point_layers).get(point, ()), self.points.get(point)
        if values is None or layer not in layers:
            captured = ", ".join(map(str, layers)) or "none"
            of_point = "" if point == RESID_POST else f" of {point}"
            raise IndexError(f"layer {layer}{of_point} was not captured; captured are: {captured}.")
        _, tokens, _, width = values.shape
        # One small program for all layers and rows; what is past the length is cut on the host.
        start, size = (layers.index(layer), 0, row, 0), (1, tokens, 1, width)
        with defined_settings():
            rows = np.asarray(lax.dynamic_slice(values, start, size))[0, :, 0]
            return rows[: int(self.lengths[row])].astype(np.float32)

    def _row(self, row: Any) -> int:
        row, batch = _index("row", row), self.token_ids.shape[0]
        if not 0 <= row < batch:
            raise IndexError(f"row {row} is none of the {batch} rows, which are counted from 0.")
        return row


def _index(name: str, value: Any) -> int:
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be a whole number, not {value!r}.")
    return number


@dataclasses.dataclass(frozen=True)
class GenerateShape:
    """All that decides which programs are compiled, beside the model and the weights' shapes."""

    num_prompts: int
    prompt_width: int
    max_tokens: int  # 0: the prompts are read, and nothing is generated
    samples_per_prompt: int = 1
    cache_dtype: Any = None  # the model's by default
    stop: bool = True  # end when every row has met an EOS id
    capture_prompt: bool = False
    sampling: SamplingShape = dataclasses.field(default_factory=SamplingShape)
    draft_tokens: int = 0  # read in each pass beyond the next token; of one sequence, less than max_tokens

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.num_prompts * self.samples_per_prompt

    def cache_config(self, config: QwenConfig) -> KVCacheConfig:
        """Returns the sizes of the KV cache."""
        return config.kv_cache(
            self.prompt_width,
            max(self.max_tokens, 1) + self.draft_tokens,
            num_prompts=self.num_prompts,
            samples_per_prompt=self.samples_per_prompt,
            dtype=self.cache_dtype,
        )

    def nbytes(self, model: Any) -> int:
        """Returns the bytes of the KV cache and of the other buffers that one call allocates."""
        rows = model.captured_bytes(self.max_tokens, self.batch_size)
        if self.capture_prompt:
            rows += model.captured_bytes(self.prompt_width, self.num_prompts)
        seen = self.batch_size * model.config.vocab_size if self.sampling.repetition_penalty else 0
        return self.cache_config(model.config).nbytes + rows + seen


@dataclasses.dataclass(frozen=True)
class CompiledGenerate:
    """The executables of one shape."""

    shape: GenerateShape
    programs: tuple[jax.stages.Compiled, ...]  # prefill, and decode unless nothing is generated
    compile_seconds: float
    layers: tuple[int, ...] = ()  # the model's capture_layers
    point_layers: PointLayers = ()  # the model's capture_points

    @property
    def prefill(self) -> jax.stages.Compiled:
        """The program of ``run_prefill``, from params on."""
        return self.programs[0]

    @property
    def decode(self) -> jax.stages.Compiled:
        """The program of ``run_decode``, from params on."""
        return self.programs[1]

    @program_settings()
    def __call__(
        self,
        params: Any,
        prompts: PromptBatch,
        sampling: SamplingParams,
        sequence_ids: np.ndarray,
        steering: Steering | None = None,
    ) -> Generation:
        """Runs them, one after the other. Returns at once; the device may still compute."""
        of_prompts, of_rows = (), ()
        if steering is not None:
            of_prompts, of_rows = (steer_prompts(steering, len(prompts.lengths)),), (steering,)
        state, (prompt_activations, prompt_points) = self.prefill(
            params, prompts, sampling, sequence_ids, *of_prompts
        )
        if self.shape.max_tokens:
            state = self.decode(params, state, sampling, sequence_ids, *of_rows)
        return Generation(
            token_ids=state.token_ids,
            lengths=state.lengths,
            finished=state.ended,
            logprobs=state.logprobs,
            activations=state.activations,
            prompt_activations=prompt_activations,
            layers=self.layers,
            points=state.points,
            prompt_points=prompt_points,
            point_layers=self.point_layers,
        )
