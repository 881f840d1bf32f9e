"""The Qwen2 decoder that also returns the residual stream of chosen layers, and values of other hook points.

Layer l is the **output of decoder block l**, after both residual additions: ``blocks.{l}.hook_resid_post``.
That is Hugging Face's ``hidden_states[l + 1]`` for every block but the last, where Hugging Face gives
the value after the final norm; here the last block is captured like any other, before the norm.

    model = create_model_with_hooks(config, points={"attn.hook_z": [10, 11], "mlp.hook_post": 12})

Other points (``qwen2_core.hook_points``) come as one stacked array each, by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from jax.typing import ArrayLike

from qwen2_core.config import QwenConfig
from qwen2_core.hook_points import RESID_POST, check_point, point_names
from qwen2_core.hooks import PointLayers
from qwen2_core.inputs import layer_numbers, yes_or_no
from qwen2_core.intervention_values import point_layers
from qwen2_core.layers import FIXED_EXTRACT_LAYERS, missing_defaults
from qwen2_jax import QwenModel

DEFAULT_SAE_LAYERS = FIXED_EXTRACT_LAYERS


class QwenModelWithActivations(QwenModel):
    """``QwenModel`` with capture switched on for ``extract_layers``."""

    extract_layers: tuple[int, ...] = FIXED_EXTRACT_LAYERS
    points: PointLayers = ()
    before: bool = False

    @property
    def capture_layers(self) -> tuple[int, ...]:
        """The layers whose outputs a forward pass returns."""
        return self.extract_layers

    @property
    def capture_points(self) -> PointLayers:
        """The points beside these outputs whose values a forward pass returns, and the layers of each."""
        return self.points

    @property
    def capture_before(self) -> bool:
        """Whether values are returned as they are before interventions at their own point."""
        return self.before

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        kv_caches: Any = None,
        position_offset: int | ArrayLike = 0,
        return_activations: bool = True,
        *,
        interventions: Any = (),
        prompt_lengths: ArrayLike | None = None,
    ) -> Any:
        """Runs one forward pass as ``QwenModel.__call__`` does, and returns the rows of the extracted layers.

        Returns:
            (logits, kv_caches, activations [len(extract_layers), T, B, hidden] in the model's dtype), or
            (logits, kv_caches) without ``return_activations``. A model with other points returns these too:
            a dictionary of [layers, T, B, width].
        """
        output = self.forward(
            input_ids,
            attention_mask,
            kv_caches,
            position_offset,
            capture_layers=self.extract_layers if return_activations else (),
            capture_points=self.points if return_activations else (),
            interventions=interventions,
            prompt_lengths=prompt_lengths,
        )
        return tuple(output) if return_activations else (output.logits, output.cache)


def create_model_with_hooks(
    config: QwenConfig,
    extract_layers: Any = FIXED_EXTRACT_LAYERS,
    *,
    points: Any = None,
    capture_before: bool = False,
) -> QwenModelWithActivations:
    """Makes a model that returns the outputs of ``extract_layers``, and the values of other points.

    Args:
        config: the model's.
        extract_layers: 0-based numbers in any kind of list or array, or a single one. The outputs come in
            this order. They may be () where there are other points.
        points: layers by point: numbers as for ``extract_layers``, or True for all of them;
            ``ln_final.hook_normalized`` has True alone.
        capture_before: values, also of ``extract_layers``, are those before interventions at their own
            point. By default they are those that later layers read.

    Raises:
        ValueError: no layers, a layer twice, one that the model does not have, anything but numbers, or a
            point that there is not.
    """
    if not isinstance(config, QwenConfig):
        raise ValueError(
            f"config must be a QwenConfig, as load_qwen2 returns it, not a {type(config).__name__}."
        )
    chosen = _point_layers(points, config.num_hidden_layers)
    is_tuple = isinstance(extract_layers, tuple)
    if is_tuple and (sentence := missing_defaults(extract_layers, config.num_hidden_layers)):
        raise ValueError(f"extract_layers: {sentence}")
    nothing = isinstance(extract_layers, Sized) and len(extract_layers) == 0
    layers = () if chosen and nothing else layer_numbers(extract_layers, config.num_hidden_layers)
    before = yes_or_no("capture_before", capture_before)
    return QwenModelWithActivations(config, extract_layers=layers, points=chosen, before=before)


def _point_layers(given: Any, depth: int) -> PointLayers:
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise ValueError(f'points must be layers by point, such as {{"attn.hook_z": [10]}}, not {given!r}.')
    chosen = {
        check_point(point): point_layers(f"points[{point!r}]", point, layers, depth)
        for point, layers in given.items()
    }
    if RESID_POST in chosen:
        raise ValueError(f"The layers of {RESID_POST} are extract_layers: name no points for it.")
    return tuple((point, chosen[point]) for point in point_names() if point in chosen)
