"""What a call of ``generate_single_task_jitted`` returns."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32


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

    def __repr__(self) -> str:
        """Says in a line what there is, without the values."""
        captured = f"layers {', '.join(map(str, self.layers))}" if self.layers else "no layers"
        batch, tokens = self.token_ids.shape
        return f"Generation({batch} rows of up to {tokens} tokens, {captured})"

    def layer(self, layer: int, row: int) -> Float32[np.ndarray, "tokens hidden"]:
        """Returns the rows of one layer for one sequence, on the host, cut to the sequence's length.

        ``out.layer(12, row=5)[t]`` is the output of decoder block 12 after reading generated token t of row
        5.

        Raises:
            IndexError: the layer was not captured, or there is no such row.
        """
        if self.activations is None or layer not in self.layers:
            captured = ", ".join(map(str, self.layers)) or "none"
            raise IndexError(f"layer {layer} was not captured; captured are: {captured}.")
        batch = self.token_ids.shape[0]
        if not 0 <= row < batch:
            raise IndexError(f"row {row} is none of the {batch} rows, which are counted from 0.")
        _, tokens, _, hidden = self.activations.shape
        # One small program for all layers and rows; what is past the length is cut on the host.
        start, size = (self.layers.index(layer), 0, row, 0), (1, tokens, 1, hidden)
        rows = np.asarray(lax.dynamic_slice(self.activations, start, size))[0, :, 0]
        return rows[: int(self.lengths[row])].astype(np.float32)
