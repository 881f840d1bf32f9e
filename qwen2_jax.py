"""The Qwen2 and Qwen3 decoder in Flax linen: one layer body for every cache, layers unrolled or scanned.

The cache that is passed in decides what a forward pass does:

===================  ============================================  =============================
``kv_caches``        ``input_ids``                                 logits
===================  ============================================  =============================
``None`` or a list   any tokens, appended to a growing cache       of every token [B, T, vocab]
``PrefillCache``     right-padded prompts [P, T]                   of each last token [P, 1, vocab]
``KVCache``          the next tokens of every sequence [B, T]      of every token [B, T, vocab]
===================  ============================================  =============================

RMSNorm, RoPE, softmax and logits are computed in float32. The residual stream, and all that lies between
two products, has ``config.residual_dtype``; what weights are multiplied by is rounded to ``config.dtype``.
Where both have 16 bits, values are rounded where Hugging Face's Qwen2 and Qwen3 round them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Float32

from kvcache_utils import (
    ActivationBufferConfig,
    KVCache,
    PrefillCache,
    advance_ar_index,
    as_bits,
    create_activation_buffer,
    from_bits,
    update_kv_cache_ar,
    write_prefill_cache,
)
from qwen2_core.checkpoint_files import CheckpointError
from qwen2_core.compilation import defined_settings
from qwen2_core.config import QwenConfig
from qwen2_core.hook_points import LN_FINAL, width_of
from qwen2_core.hooks import Hooks, Kept, LayerHooks, PointLayers
from qwen2_core.kernels.attention import attend_causal, attend_tokens_two_part, attend_two_part
from qwen2_core.kernels.matmul import MatrixInStack, embed, linear, logits_f32, uses_cpu_kernel
from qwen2_core.kernels.platforms import by_platform, traced_platform
from qwen2_core.model_inputs import read_mask, read_token_ids, text_lengths
from qwen2_core.rope import apply_rope, rope_angles
from qwen2_core.steering import edits, steer
from qwen2_core.weights import convert_hf_to_jax_weights, load_qwen2, stack_layers
from qwen2_core.windows import window_of

__all__ = [
    "CheckpointError",
    "HookedOutput",
    "ModelOutput",
    "QwenConfig",
    "QwenModel",
    "check_model",
    "convert_hf_to_jax_weights",
    "load_qwen2",
    "stack_layers",
]

FixedCache = PrefillCache | KVCache
LayerCarry = tuple[Array, FixedCache | None, Kept]  # what passes from layer to layer
LayerKV = tuple[Array, Array]  # the growing cache of one layer: k, v [B, kv_heads, positions, head_dim]


class ModelOutput(NamedTuple):
    """What one forward pass returns."""

    logits: Float32[Array, "batch tokens vocab"]  # of a prefill: of each last token, [batch, 1, vocab]
    cache: Any  # of the kind that was passed in
    activations: Float[Array, "layers tokens batch hidden"] | None  # None where no layer is captured


class HookedOutput(NamedTuple):
    """What one forward pass returns where values of other points are kept."""

    logits: Float32[Array, "batch tokens vocab"]
    cache: Any
    activations: Float[Array, "layers tokens batch hidden"] | None
    points: Kept  # by point: [layers, tokens, batch, width]


def make_output(
    logits: Array, cache: Any, activations: Array | None, points: Kept
) -> ModelOutput | HookedOutput:
    """Returns the outputs in the form that goes with them."""
    if not points:
        return ModelOutput(logits, cache, activations)
    return HookedOutput(logits, cache, activations, points)


class TokenContext(NamedTuple):
    """What every layer needs to know about the tokens of one forward pass."""

    cos: Float32[Array, "batch tokens half_head_dim"]
    sin: Float32[Array, "batch tokens half_head_dim"]
    key_valid: Bool[Array, "batch positions"] | None  # None where every position is valid
    hooks: Hooks


def _parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns a module's parameter, made by ``init`` where there is none yet.

    ``module.param`` alone would trace ``init`` in every forward pass, and takes nothing but arrays.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, dtype)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise flax.errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value


class RMSNorm(nn.Module):
    """Divides by the root mean square (Zhang & Sennrich 2019), in float32, and multiplies by a weight."""

    config: QwenConfig

    @nn.compact
    def __call__(self, x: Array, hooks: LayerHooks | None = None, point: str = "") -> Array:
        weight = _parameter(self, "weight", nn.initializers.ones, x.shape[-1:], self.config.dtype)
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.config.rms_norm_eps)
        # As Hugging Face: back to the stream's dtype first, then times the weight.
        dtype = self.config.residual_dtype
        normed = normed.astype(dtype)
        return weight.astype(dtype) * (normed if hooks is None else hooks(point, normed))


class Linear(nn.Module):
    """Computes ``x @ kernel (+ bias)`` with a kernel [in, out], of x in the weights' dtype."""

    features: int
    use_bias: bool
    config: QwenConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, init = self.config, nn.initializers.normal(0.02)
        kernel = _parameter(self, "kernel", init, (x.shape[-1], self.features), config.dtype)
        bias = None
        if self.use_bias:
            bias = _parameter(self, "bias", nn.initializers.zeros, (self.features,), config.dtype)
        return linear(x.astype(config.dtype), kernel, bias, config.residual_dtype)


class QwenMLP(nn.Module):
    """Computes SwiGLU (Shazeer 2020): ``down(silu(gate(x)) * up(x))``."""

    config: QwenConfig

    @nn.compact
    def __call__(self, x: Array, hooks: LayerHooks) -> Array:
        config = self.config
        gate = Linear(config.intermediate_size, False, config, name="gate_proj")(x)
        up = Linear(config.intermediate_size, False, config, name="up_proj")(x)
        # Rounded once, as torch does; and XLA on CPU takes twice as long for it in bfloat16.
        activated = nn.silu(gate.astype(jnp.float32)).astype(gate.dtype)
        activated = hooks("mlp.hook_post", activated * up)
        return Linear(config.hidden_size, False, config, name="down_proj")(activated)


def _in_own_layout(x: Array) -> Array:
    """Keeps the layout that RoPE likes from reaching the weights that made x.

    XLA on TPU would copy all of q, k and v into it (49 MB at batch 64). XLA on GPUs does not, and adds a bias
    in the kernel that reads the sum; a barrier would make that three kernels more.
    """
    return by_platform(x, default=lax.optimization_barrier, cuda=lambda x: x, rocm=lambda x: x)


class QwenAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023). The only place that knows which cache is in use."""

    config: QwenConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: TokenContext,
        layer: int | Array,
        cache: FixedCache | None,
        layer_kv: LayerKV | None,
        hooks: LayerHooks,
    ) -> tuple[Array, FixedCache | None, LayerKV | None]:
        config = self.config
        batch, tokens, _ = x.shape
        window = window_of(config.windows, layer)

        def project(name: str, heads: int) -> Array:
            """Returns queries, keys or values: ``name`` is q, k or v."""
            width = heads * config.head_dim
            flat = Linear(width, config.qkv_bias, config, name=f"{name}_proj")(x)
            flat = hooks(f"attn.hook_{name}", _in_own_layout(flat))
            return flat.reshape(batch, tokens, heads, config.head_dim)

        def rotate(name: str, heads: int) -> Array:
            """Returns queries or keys as attention takes them: normalised a head, in Qwen3, and rotated."""
            x = project(name, heads)
            if config.qk_norm:
                x = RMSNorm(config, name=f"{name}_norm")(x)
            return apply_rope(x, context.cos, context.sin).astype(config.dtype)

        q = rotate("q", config.num_attention_heads)
        k = rotate("k", config.num_key_value_heads).swapaxes(1, 2)
        v = project("v", config.num_key_value_heads).swapaxes(1, 2).astype(config.dtype)

        if isinstance(cache, KVCache):
            cache = KVCache(cache.prefill, update_kv_cache_ar(cache.ar, layer, k, v), cache.prompt_row)
            if tokens == 1:
                out = attend_two_part(q[:, 0], cache, layer, window)
            else:
                out = attend_tokens_two_part(q, cache, layer, window)
        elif isinstance(cache, PrefillCache):
            cache = write_prefill_cache(cache, layer, k, v)
            out = attend_causal(q, k, v, context.key_valid, window)
        else:
            if layer_kv is not None:
                k, v = jnp.concatenate([layer_kv[0], k], axis=2), jnp.concatenate([layer_kv[1], v], axis=2)
            layer_kv = (k, v)
            out = attend_causal(q, k, v, context.key_valid, window)
        out = hooks("attn.hook_z", out.reshape(batch, tokens, -1))
        out = Linear(config.hidden_size, config.output_bias, config, name="o_proj")(out)
        return out, cache, layer_kv


class QwenDecoderLayer(nn.Module):
    """Attention and MLP with their residual additions. Its output is ``blocks.{l}.hook_resid_post``."""

    config: QwenConfig

    @nn.compact
    def __call__(
        self, carry: LayerCarry, layer: int | Array, layer_kv: LayerKV | None, context: TokenContext
    ) -> tuple[LayerCarry, tuple[Array, LayerKV | None]]:
        x, cache, kept = carry
        hooks, dtype = context.hooks.at(layer, kept), self.config.residual_dtype
        with jax.named_scope("attention"):
            x = hooks.stream("hook_resid_pre", x)
            normed = RMSNorm(self.config, name="input_layernorm")(x, hooks, "ln1.hook_normalized")
            attended, cache, layer_kv = QwenAttention(self.config, name="self_attn")(
                normed, context, layer, cache, layer_kv, hooks
            )
            x = hooks.stream("hook_resid_mid", x.astype(dtype) + hooks("hook_attn_out", attended))
        with jax.named_scope("mlp"):
            normed = RMSNorm(self.config, name="post_attention_layernorm")(x, hooks, "ln2.hook_normalized")
            added = hooks("hook_mlp_out", QwenMLP(self.config, name="mlp")(normed, hooks))
            before = x.astype(dtype) + added
            x = hooks.stream("hook_resid_post", before)
        output = (before if context.hooks.before else x.astype(dtype)).astype(self.config.dtype)
        # Unrolled layers pass float32 on after an intervention; a scan carries one dtype.
        return (x if isinstance(layer, int) else x.astype(dtype), cache, hooks.kept()), (output, layer_kv)


class QwenModel(nn.Module):
    """Maps token ids to float32 logits, through whichever cache it is given (see the module's table)."""

    config: QwenConfig

    @property
    def capture_layers(self) -> tuple[int, ...]:
        """The layers whose outputs a forward pass returns; none here, see ``qwen2_jax_with_hooks``."""
        return ()

    @property
    def capture_points(self) -> PointLayers:
        """The points beside these outputs whose values a forward pass returns, and the layers of each."""
        return ()

    @property
    def captures(self) -> bool:
        """Whether a forward pass returns any rows."""
        return bool(self.capture_layers or self.capture_points)

    @property
    def capture_before(self) -> bool:
        """Whether values are returned as they are before interventions at their own point."""
        return False

    @nn.nowrap
    def activation_buffer(self, tokens: int, batch: int) -> ActivationBufferConfig | None:
        """Returns the sizes of a buffer for captured rows; None where nothing is captured."""
        config, layers = self.config, len(self.capture_layers)
        if not layers:
            return None
        return ActivationBufferConfig(layers, tokens, batch, config.hidden_size, config.dtype)

    @nn.nowrap
    def point_buffers(self, tokens: int, batch: int) -> dict[str, ActivationBufferConfig]:
        """Returns the sizes of buffers for the captured points, by point."""
        return _point_buffers(self.config, self.capture_points, tokens, batch)

    @nn.nowrap
    def captured_bytes(self, tokens: int, batch: int) -> int:
        """Returns the bytes of all that is captured of so many tokens of each of so many sequences."""
        rows = self.activation_buffer(tokens, batch)
        points = self.point_buffers(tokens, batch).values()
        return sum(buffer.nbytes for buffer in (rows, *points) if buffer is not None)

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = _Embedding(config)
        if config.scan_layers:
            self.layers: Any = nn.scan(
                QwenDecoderLayer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=config.num_hidden_layers,
            )(config)
        else:
            self.layers = [QwenDecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = _Head(config)

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        kv_caches: Any = None,
        position_offset: int | ArrayLike = 0,
        *,
        interventions: Any = (),
        prompt_lengths: ArrayLike | None = None,
    ) -> Any:  # (logits, caches); a subclass may return more
        """Runs one forward pass.

        Args:
            input_ids: [B, T] token ids; an id outside the vocabulary gives NaN.
            attention_mask: nonzero where a position holds a token. Growing cache: [B, past + T]; prefill:
                [P, T], right-padded. Causality applies on top. None: no padding. Padding on the left shifts
                all positions of a row, which changes nothing but rounding: RoPE is relative. Where it follows
                the length of the text, give a ``position_offset`` that puts the first token at 0.
            kv_caches: None, a list of (k, v) a layer, a ``PrefillCache`` or a ``KVCache``.
            position_offset: position of ``input_ids[:, 0]``, a scalar or [B]; fixed caches know their own.
            interventions: what to change on the way, of ``qwen2_core.interventions``.
            prompt_lengths: [B], where positions of generated tokens begin, for interventions and for RoPE
                that follows the length of the text; by default all tokens are the prompt's without a past,
                and generated ones after it.

        Returns:
            (float32 logits, the updated caches).
        """
        output = self.forward(
            input_ids,
            attention_mask,
            kv_caches,
            position_offset,
            capture_layers=(),
            capture_points=(),
            interventions=interventions,
            prompt_lengths=prompt_lengths,
        )
        return output.logits, output.cache

    @defined_settings()
    def forward(  # noqa: PLR0913 - the public pass; all but one have defaults
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        kv_caches: Any = None,
        position_offset: int | ArrayLike = 0,
        *,
        capture_layers: tuple[int, ...] | None = None,
        capture_points: PointLayers | None = None,
        interventions: Any = (),
        prompt_lengths: ArrayLike | None = None,
    ) -> ModelOutput | HookedOutput:
        """Runs one forward pass and captures layers' outputs and other points (the model's by default)."""
        config = self.config
        input_ids = read_token_ids(input_ids, config.vocab_size)
        tokens = input_ids.shape[1]
        cache, grown = None, None
        key_valid = read_mask(attention_mask, input_ids.shape, kv_caches)
        if isinstance(kv_caches, KVCache):
            cache, start = kv_caches, kv_caches.positions[:, None]
        elif isinstance(kv_caches, PrefillCache):
            lengths = jnp.full(input_ids.shape[0], tokens) if key_valid is None else key_valid.sum(1)
            cache = PrefillCache(kv_caches.k, kv_caches.v, lengths.astype(jnp.int32))
            start = 0
        else:
            grown, start = kv_caches, jnp.asarray(position_offset, jnp.int32).reshape(-1, 1)
        positions = jnp.broadcast_to(start + jnp.arange(tokens, dtype=jnp.int32), input_ids.shape)
        capture = self.capture_layers if capture_layers is None else capture_layers
        points = self.capture_points if capture_points is None else capture_points
        steering, todo = steer(interventions, config, len(input_ids)), ()
        if steering is not None:
            todo = edits(steering, positions, _generated(positions, kv_caches, prompt_lengths))
        dtypes = (config.dtype, config.residual_dtype)
        hooks = Hooks(points, self.capture_before, config.num_hidden_layers, *dtypes, todo)
        rope, lengths = config.rope_scaling, None
        if rope is not None and rope.follows_length:
            lengths = text_lengths(positions, key_valid, kv_caches, prompt_lengths)
        angles = rope_angles(positions, config.head_dim, config.rope_theta, rope, lengths)
        context = TokenContext(*angles, key_valid, hooks)
        buffers = _point_buffers(config, points, tokens, len(input_ids))
        kept = {point: create_activation_buffer(buffer) for point, buffer in buffers.items()}

        x = self.embed_tokens(input_ids).astype(config.residual_dtype)
        (x, cache, kept), grown, captured = self._run_layers((x, cache, kept), grown, context, capture)
        activations = jnp.stack(captured).swapaxes(1, 2) if captured else None
        of_model = hooks.at(None, kept)
        if isinstance(cache, PrefillCache):
            last, x = (cache.length - 1)[:, None], x.astype(config.residual_dtype)
            if LN_FINAL in dict(points):
                self.norm(x, of_model, LN_FINAL)  # keeps those of all tokens
            x = jnp.take_along_axis(x, last[..., None], axis=1)
            x = self.norm(x, hooks.at_tokens(last).at(None, {}), LN_FINAL)
        else:
            x = self.norm(x, of_model, LN_FINAL)
        x = x.astype(config.dtype)
        with jax.named_scope("logits"):
            if config.tie_word_embeddings:
                logits = logits_f32(x, self.embed_tokens.embedding, tied=True)
            else:
                logits = logits_f32(x, self.lm_head.kernel, tied=False)
        if isinstance(cache, KVCache):
            cache = advance_ar_index(cache, tokens)
        elif cache is None and not (config.use_fixed_cache and kv_caches is None):
            cache = grown
        return make_output(logits, cache, activations, of_model.kept())

    def _run_layers(
        self,
        carry: LayerCarry,
        grown: list[LayerKV] | None,
        context: TokenContext,
        capture: tuple[int, ...],
    ) -> tuple[LayerCarry, list[LayerKV], list[Array]]:
        if self.config.scan_layers:
            stacked = None if grown is None else jax.tree.map(lambda *kv: jnp.stack(kv), *grown)
            carry, (outputs, new_kv) = self._scan_layers(carry, stacked, context)
            kv_list = [] if new_kv is None else list(zip(*(list(part) for part in new_kv), strict=True))
            return carry, kv_list, [outputs[layer] for layer in capture]
        outputs, kv_list = [], []
        for i, layer in enumerate(self.layers):
            carry, (output, layer_kv) = layer(carry, i, None if grown is None else grown[i], context)
            outputs.append(output)
            kv_list.append(layer_kv)
        return carry, kv_list, [outputs[layer] for layer in capture]

    def _scan_layers(self, carry: LayerCarry, stacked_kv: LayerKV | None, context: TokenContext) -> Any:
        """Runs the layers as one ``lax.scan``: returns its carry and, stacked, what the layers return.

        Flax's own scan makes the parameters. It would trace the layer twice in each forward pass, and copy
        the weights out of their stacks, which the kernels for CPU read where they lie.
        """
        numbers = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
        if self.is_initializing():
            return self.layers(carry, numbers, stacked_kv, context)
        stacks, tree = jax.tree.flatten(self.variables["params"]["layers"])
        operand = carry[0].astype(self.config.dtype)
        stay = [stack.ndim == 3 and uses_cpu_kernel(operand, stack) for stack in stacks]
        sliced = [stack for stack, stays in zip(stacks, stay, strict=True) if not stays]

        def run_layer(carry: Any, of_layer: Any) -> Any:
            number, slices, layer_kv = of_layer
            slices = iter(slices)
            weights = [
                MatrixInStack(stack, number) if stays else next(slices)
                for stack, stays in zip(stacks, stay, strict=True)
            ]
            layer = QwenDecoderLayer(self.config, parent=None)
            carry, kept = layer.apply({"params": tree.unflatten(weights)}, carry, number, layer_kv, context)
            return carry, jax.tree.map(as_bits, kept) if bits else kept

        # XLA on CPU writes bfloat16 into a stack by converting the whole stack to float32 and back.
        bits = traced_platform() == "cpu"
        carry, kept = lax.scan(run_layer, carry, (numbers, sliced, stacked_kv))
        return carry, jax.tree.map(lambda kept: from_bits(kept, self.config.dtype), kept)


def _generated(positions: Array, kv_caches: Any, prompt_lengths: ArrayLike | None) -> Array:
    """Returns which tokens at these positions were generated, as far as interventions are concerned."""
    if isinstance(kv_caches, KVCache | PrefillCache) or prompt_lengths is None:
        after_prompt = bool(kv_caches) and not isinstance(kv_caches, PrefillCache)
        return jnp.full(positions.shape, after_prompt)
    return positions >= jnp.asarray(prompt_lengths, jnp.int32).reshape(-1, 1)


def _point_buffers(
    config: QwenConfig, points: PointLayers, tokens: int, batch: int
) -> dict[str, ActivationBufferConfig]:
    return {
        point: ActivationBufferConfig(len(layers), tokens, batch, width_of(point, config), config.dtype)
        for point, layers in points
    }


def check_model(model: Any) -> None:
    """Checks that generation is given one of these models.

    Raises:
        ValueError: one sentence that says how to make one.
    """
    if not isinstance(model, QwenModel):
        raise ValueError(
            "model must be a QwenModel, such as create_model_with_hooks(config) with the config of "
            f"load_qwen2, not a {type(model).__name__}."
        )
    if model.scope is not None:
        raise ValueError(
            "model is bound to variables: give the model itself, as before model.bind, and params."
        )


class _Embedding(nn.Module):
    config: QwenConfig

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.hidden_size)
        init = nn.initializers.normal(0.02)
        self.embedding = _parameter(self, "embedding", init, shape, self.config.dtype)

    def __call__(self, token_ids: Array) -> Array:
        return embed(token_ids, self.embedding)


class _Head(nn.Module):
    config: QwenConfig

    def setup(self) -> None:
        shape = (self.config.hidden_size, self.config.vocab_size)
        self.kernel = _parameter(self, "kernel", nn.initializers.normal(0.02), shape, self.config.dtype)
