"""Reads and writes every hook point of Transformers' Qwen2 and Qwen3 with torch's own hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qwen2_core.hook_points import LN_FINAL, full_name

Edit = Callable[[str, torch.Tensor], torch.Tensor]  # full name, value [B, n, width]; returns the new value


class TorchHooks:
    """Hooks on all modules of a Qwen2 or Qwen3 for causal language modelling, at our own hook points."""

    def __init__(self, model: Any) -> None:
        self._model, self._seen = model, {}
        self._before: Any = None  # the stream before the layer that is running
        self._edit: Edit = lambda name, value: value
        for number, layer in enumerate(model.model.layers):
            self._hook_layer(number, layer)
        self._hook_norm(LN_FINAL, model.model.norm)

    @torch.no_grad()
    def run(
        self, token_ids: np.ndarray, edit: Edit = lambda name, value: value
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """One plain pass over sequences [B, n], no cache, every value passed through ``edit``.

        Returns:
            logits [B, n, vocab], and by full name what the model went on with, [B, n, width].
        """
        self._edit, self._seen = edit, {}
        logits = self._model(torch.from_numpy(token_ids.astype(np.int64)), use_cache=False).logits
        return logits.numpy(), {name: value.numpy() for name, value in self._seen.items()}

    def _at(self, name: str, value: torch.Tensor) -> torch.Tensor:
        value = self._edit(name, value)
        self._seen[name] = value.clone()
        return value

    def _hook_layer(self, number: int, layer: Any) -> None:
        def name(point: str) -> str:
            return full_name(point, number)

        def before(_module: Any, args: Any, kwargs: Any) -> Any:
            self._before = self._at(name("hook_resid_pre"), args[0] if args else kwargs["hidden_states"])
            if args:
                return (self._before, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._before}

        def after_attention(_module: Any, _args: Any, output: Any) -> Any:
            # The residual addition is no module: what attention adds is changed so that the sum is as wanted.
            added = self._at(name("hook_attn_out"), output[0])
            middle = self._at(name("hook_resid_mid"), self._before + added)
            return middle - self._before, *output[1:]

        def after(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return self._at(name("hook_resid_post"), output[0]), *output[1:]
            return self._at(name("hook_resid_post"), output)

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after)
        attention, mlp = layer.self_attn, layer.mlp
        attention.register_forward_hook(after_attention)
        for letter in "qkv":
            getattr(attention, f"{letter}_proj").register_forward_hook(
                self._output(name(f"attn.hook_{letter}"))
            )
        attention.o_proj.register_forward_pre_hook(self._input(name("attn.hook_z")))
        mlp.down_proj.register_forward_pre_hook(self._input(name("mlp.hook_post")))
        mlp.register_forward_hook(self._output(name("hook_mlp_out")))
        self._hook_norm(name("ln1.hook_normalized"), layer.input_layernorm)
        self._hook_norm(name("ln2.hook_normalized"), layer.post_attention_layernorm)

    def _output(self, name: str) -> Any:
        return lambda _module, _args, output: self._at(name, output)

    def _input(self, name: str) -> Any:
        return lambda _module, args: (self._at(name, args[0]),)

    def _hook_norm(self, name: str, norm: Any) -> None:
        def after(module: Any, args: Any, _output: Any) -> torch.Tensor:
            (x,) = args
            normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
            return module.weight * self._at(name, normalized)

        norm.register_forward_hook(after)
