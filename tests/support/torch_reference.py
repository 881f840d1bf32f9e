"""What Transformers on torch computes, the reference for parity: the only test module that imports torch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any
from unittest import mock

import numpy as np
import torch
from lively import Lively
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

torch.set_num_threads(1)  # the models are tiny; several threads would mostly wait for each other


# Newer versions have another name for it, and warn of this one.
_CACHE = "cache" if "cache" in signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"
ExactRope = Callable[[int], tuple[np.ndarray, float]]  # a text's length -> frequencies, attention factor


class _ExactRotaryEmbedding(torch.nn.Module):
    """What Qwen2RotaryEmbedding does, in float64."""

    def __init__(self, exact_rope: ExactRope):
        super().__init__()
        self._exact_rope = exact_rope

    def forward(self, _x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies, factor = self._exact_rope(int(position_ids.max()) + 1)
        angles = position_ids[..., None].double() * torch.from_numpy(frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * factor, angles.sin() * factor


class TorchReference:
    """Transformers' own Qwen2 or Qwen3 with a lively model's weights, its decoder layers hooked."""

    def __init__(self, lively: Lively, exact_rope: ExactRope | None = None):
        """With ``exact_rope`` it computes in float64, RoPE included."""
        fields = dict(lively.hf_config)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self._config: Any = config
        self._exact_rope = exact_rope
        self.model = AutoModelForCausalLM.from_config(config).eval()
        state = {name: torch.from_numpy(array) for name, array in lively.state_dict().items()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        self.model.tie_weights()
        if exact_rope is not None:
            self.model.double()
        self._rows: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            layer.register_forward_hook(self._keep)

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        # Transformers 4 returns a tuple whose first member is the residual stream, 5 the stream itself.
        self._rows.append(output[0] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def greedy(self, prompts: list[np.ndarray], tokens: int, **settings: Any) -> np.ndarray:
        """``tokens`` greedy tokens after each prompt, with Transformers' own loop and cache: [P, tokens].

        One batch, padded on the left as Transformers wants it.
        """
        width = max(map(len, prompts))
        ids, mask = torch.zeros((2, len(prompts), width), dtype=torch.int64)
        for row, valid, prompt in zip(ids, mask, prompts, strict=True):
            row[width - len(prompt) :] = torch.from_numpy(prompt)
            valid[width - len(prompt) :] = 1
        out = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            **settings,
        )
        self._rows.clear()
        return out[:, width:].numpy().astype(np.int32)

    @torch.no_grad()
    def forward(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One plain pass over sequences [B, n], no cache.

        Returns:
            logits [B, n, vocab] and rows [layers, B, n, hidden].
        """
        self._rows.clear()
        logits = self.model(torch.from_numpy(token_ids.astype(np.int64)), use_cache=False).logits
        return logits.numpy(), torch.stack(self._rows).numpy()

    def forward_float64(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What ``forward`` returns, computed in float64 throughout, from the same weights and frequencies."""
        narrow, self.model = self.model, copy.deepcopy(self.model).double()
        for layer in self.model.model.layers:
            layer._forward_hooks.clear()  # those of the copied reference
            layer.register_forward_hook(self._keep)
        try:
            with _all_float64():
                return self.forward(token_ids)
        finally:
            self.model = narrow

    @torch.no_grad()
    def step_by_step(self, token_ids: np.ndarray, prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
        """A prefill of the prompt, then a pass for each token, with Transformers' cache.

        Returns:
            logits [n, vocab] and rows [layers, n, hidden].
        """
        # A new one: it remembers the longest text that it has seen.
        exact = self._exact_rope
        self.model.model.rotary_emb = (
            Qwen2RotaryEmbedding(self._config) if exact is None else _ExactRotaryEmbedding(exact)
        )
        self._rows.clear()
        cache, logits, rest = None, [], torch.from_numpy(token_ids[None].astype(np.int64))
        for part in (rest[:, :prompt_length], *rest[:, prompt_length:].split(1, dim=1)):
            output = self.model(part, use_cache=True, **{_CACHE: cache})
            cache = output[_CACHE]
            logits.append(output.logits[0])
        layers = len(self.model.model.layers)
        rows = [torch.cat(self._rows[layer::layers], dim=1)[0] for layer in range(layers)]
        return torch.cat(logits).numpy(), torch.stack(rows).numpy()

    @torch.no_grad()
    def last_layer(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last block's output by its hook, and Transformers' ``hidden_states[-1]``: [n, hidden] both."""
        self._rows.clear()
        ids = torch.from_numpy(token_ids[None].astype(np.int64))
        hidden_states = self.model(ids, use_cache=False, output_hidden_states=True).hidden_states
        return self._rows[-1][0].numpy(), hidden_states[-1][0].numpy()


@contextlib.contextmanager
def _all_float64() -> Iterator[None]:
    """Makes Transformers compute in float64 what it computes in float32 in a model of any dtype."""
    with (
        mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield
