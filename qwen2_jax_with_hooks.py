"""The Qwen2 decoder that also returns the residual stream of chosen layers, stacked into one array.

Layer l is the **output of decoder block l**, after both residual additions: ``blocks.{l}.hook_resid_post``.
That is Hugging Face's ``hidden_states[l + 1]`` for every block but the last, where Hugging Face gives
the value after the final norm; here the last block is captured like any other, before the norm.
"""

from __future__ import annotations

from typing import Any

from jax.typing import ArrayLike

from qwen2_core.config import QwenConfig
from qwen2_core.layers import FIXED_EXTRACT_LAYERS
from qwen2_jax import QwenModel

DEFAULT_SAE_LAYERS = FIXED_EXTRACT_LAYERS


class QwenModelWithActivations(QwenModel):
    """``QwenModel`` with capture switched on for ``extract_layers``."""

    extract_layers: tuple[int, ...] = FIXED_EXTRACT_LAYERS

    @property
    def capture_layers(self) -> tuple[int, ...]:
        """The layers whose outputs a forward pass returns."""
        return self.extract_layers

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        kv_caches: Any = None,
        position_offset: int | ArrayLike = 0,
        return_activations: bool = True,
    ) -> Any:
        """Runs one forward pass as ``QwenModel.__call__`` does, and returns the rows of the extracted layers.

        Returns:
            (logits, kv_caches, activations [len(extract_layers), T, B, hidden] in the model's dtype), or
            (logits, kv_caches) without ``return_activations``.
        """
        layers = self.extract_layers if return_activations else ()
        output = self.forward(input_ids, attention_mask, kv_caches, position_offset, capture_layers=layers)
        return tuple(output) if return_activations else (output.logits, output.cache)


def create_model_with_hooks(
    config: QwenConfig, extract_layers: tuple[int, ...] = FIXED_EXTRACT_LAYERS
) -> QwenModelWithActivations:
    """Makes a model that returns the outputs of ``extract_layers`` (0-based, in the given order).

    Raises:
        ValueError: no layers, a layer twice, or one that the model does not have.
    """
    layers = tuple(int(layer) for layer in extract_layers)
    depth = config.num_hidden_layers
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise ValueError(
            f"extract_layers {outside} are out of range: the model has {depth} layers, 0 to {depth - 1}."
        )
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"extract_layers must name at least one layer and none twice, not {list(layers)}.")
    return QwenModelWithActivations(config, extract_layers=layers)
