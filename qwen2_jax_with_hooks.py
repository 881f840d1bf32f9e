"""The Qwen2 decoder that also returns the residual stream of chosen layers, stacked into one array.

Layer l is the **output of decoder block l**, after both residual additions: ``blocks.{l}.hook_resid_post``.
That is Hugging Face's ``hidden_states[l + 1]`` for every block but the last, where Hugging Face gives
the value after the final norm; here the last block is captured like any other, before the norm.
"""

from __future__ import annotations

from typing import Any

from jax.typing import ArrayLike

from qwen2_core.config import QwenConfig
from qwen2_core.inputs import layer_numbers
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
    config: QwenConfig, extract_layers: Any = FIXED_EXTRACT_LAYERS
) -> QwenModelWithActivations:
    """Makes a model that returns the outputs of ``extract_layers``.

    Args:
        config: the model's.
        extract_layers: 0-based numbers in any kind of list or array, or a single one. The outputs come in
            this order.

    Raises:
        ValueError: no layers, a layer twice, one that the model does not have, or anything but numbers.
    """
    if not isinstance(config, QwenConfig):
        raise ValueError(
            f"config must be a QwenConfig, as load_qwen2 returns it, not a {type(config).__name__}."
        )
    layers = layer_numbers(extract_layers, config.num_hidden_layers)
    return QwenModelWithActivations(config, extract_layers=layers)
