"""Ways to spoil a copy of the small checkpoint, for tests of what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lively import rewrite_json, rewrite_safetensors

EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
Spoil = Callable[[Path], object]


def config(**changes: Any) -> Spoil:
    return lambda model: rewrite_json(model / "config.json", **changes)


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    return lambda model: rewrite_safetensors(model / "model.safetensors", change)


def text(name: str, content: str) -> Spoil:
    return lambda model: (model / name).write_text(content)


def remove(name: str) -> Spoil:
    return lambda model: (model / name).unlink()


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def only_torch_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def fewer_tokens(model: Path) -> None:
    config(vocab_size=500)(model)
    tensors(lambda t: t.update({EMBEDDING: np.ascontiguousarray(t[EMBEDDING][:500])}))(model)


def template(content: str | None) -> Spoil:
    return lambda model: rewrite_json(model / "tokenizer_config.json", chat_template=content)
