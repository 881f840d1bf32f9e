"""Numbers that a file gives each row of a layer: the part along a direction, or an SAE's feature.

Two kinds of files are read, both safetensors:

- directions: each tensor is one [hidden], or several [n, hidden]. The layer is in the tensor's name
  (`blocks.12.hook_resid_post`), in the file's metadata (`layer`, or `hook_name`), or given by the caller.
  A row's number is its dot product with the direction at length 1.
- an SAE as SAELens saves it: `sae_weights.safetensors` (`W_enc` [hidden, features], `b_enc`, `b_dec`, for
  JumpReLU `threshold`, for TopK optionally `W_dec`) beside `cfg.json`. The layer is that of the
  configuration's `hook_name`. A row's number is the feature's activation.
"""

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from activation_store.format import StoreError, StoreUsageError, hook_layer

WEIGHTS, CONFIGURATION = "sae_weights.safetensors", "cfg.json"
_MOST_DIRECTIONS = 64
_LABEL_LETTERS = 80
_MOST_BYTES = 1 << 20  # of a configuration
_ENCODERS = ("standard", "jumprelu", "topk")


@dataclass(frozen=True)
class Probe:
    """Gives every row of a layer a number."""

    label: str
    kind: str  # "direction", whose numbers have a sign, or "feature", whose numbers have none
    layer: int
    measure: Callable[[np.ndarray], np.ndarray]  # float32 [rows, hidden] to float32 [rows]


def load_directions(path: str | os.PathLike[str], hidden: int, layer: int | None = None) -> list[Probe]:
    """Reads every direction of a file.

    Args:
        path: the safetensors file.
        hidden: the width of the rows.
        layer: the layer of directions whose file does not name one.

    Raises:
        StoreUsageError: the file cannot be read, a tensor is no direction, or no layer is known.
    """
    tensors, metadata = _read_tensors(Path(path))
    probes = []
    for name, tensor in tensors.items():
        directions = np.atleast_2d(tensor.astype(np.float64))
        if directions.ndim != 2 or directions.shape[1] != hidden:
            raise StoreUsageError(
                f"{path}: tensor {name} is {list(tensor.shape)}; a direction of this store is [{hidden}], "
                f"several are [n, {hidden}]"
            )
        of = _layer_named(name, metadata, layer)
        if of is None:
            raise StoreUsageError(
                f"{path} does not say which layer {name} is of: give --layer, or write `layer` into the "
                "file's metadata"
            )
        for number, direction in enumerate(directions):
            length = np.linalg.norm(direction)
            if not (np.isfinite(length) and length > 0):
                raise StoreUsageError(f"{path}: direction {number} of {name} has the length {length}")
            label = f"{Path(path).stem}: {name}" + (f" {number}" if tensor.ndim == 2 else "")
            probes.append(Probe(label[:_LABEL_LETTERS], "direction", of, _along(direction / length)))
    if len(probes) > _MOST_DIRECTIONS:
        raise StoreUsageError(f"{path} has {len(probes)} directions; at most {_MOST_DIRECTIONS} can be shown")
    return probes


def _along(direction: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: (rows.astype(np.float64) @ direction).astype(np.float32)


def _layer_named(name: str, metadata: dict[str, str], layer: int | None) -> int | None:
    """Returns the layer that a tensor's name, its file's metadata or the caller says."""
    for text in (name, metadata.get("hook_name", "")):
        try:
            return hook_layer(text)
        except StoreError:
            continue
    text = metadata.get("layer", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 5 else layer


def load_features(
    path: str | os.PathLike[str], features: Sequence[int], hidden: int, layer: int | None = None
) -> list[Probe]:
    """Reads features of an SAE that SAELens saved.

    Args:
        path: the folder, or the weights' file in it.
        features: their indices.
        hidden: the width of the rows.
        layer: the layer, where the configuration does not name it.

    Raises:
        StoreUsageError: the files cannot be read or are of another width, a feature is not there, or the
            SAE computes its features in a way that is not implemented.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    configuration = _read_configuration(folder / CONFIGURATION)
    encoder = _Encoder(folder / WEIGHTS, configuration, hidden)
    for feature in features:
        if feature >= encoder.features:
            raise StoreUsageError(f"{folder} has {encoder.features} features: there is no {feature}")
    of = _sae_layer(configuration, layer)
    if of is None:
        raise StoreUsageError(f"{folder / CONFIGURATION} does not name a layer: give --layer")
    return [
        Probe(f"{folder.name}: feature {feature}", "feature", of, encoder.feature(feature))
        for feature in features
    ]


def _sae_layer(configuration: dict[str, Any], layer: int | None) -> int | None:
    metadata = configuration.get("metadata")
    for place in (metadata if isinstance(metadata, dict) else {}, configuration):
        try:
            return hook_layer(str(place.get("hook_name", "")))
        except StoreError:
            continue
    return layer


class _Encoder:
    """The encoder of an SAE: what SAELens' `encode` does, for single features."""

    def __init__(self, path: Path, configuration: dict[str, Any], hidden: int) -> None:
        self._kind = configuration.get("architecture", "standard")
        normalized = configuration.get("normalize_activations", "none")
        if self._kind not in _ENCODERS or normalized != "none":
            raise StoreUsageError(
                f"{path.parent} is an SAE of architecture {str(self._kind)[:40]!r} with "
                f"normalize_activations {str(normalized)[:40]!r}; {', '.join(_ENCODERS)} with 'none' can be "
                "shown"
            )
        needed = {"W_enc", "b_enc", "b_dec", "threshold"}
        if configuration.get("rescale_acts_by_decoder_norm"):
            needed.add("W_dec")
        tensors, _ = _read_tensors(path, needed)
        try:
            self._weights = tensors["W_enc"]
            self.features = self._weights.shape[-1]
            self._bias = _shaped(tensors["b_enc"], self.features)
            self._centre = np.zeros(hidden, np.float32)
            if configuration.get("apply_b_dec_to_input", True):
                self._centre = _shaped(tensors["b_dec"], hidden)
            self._threshold = None
            if self._kind == "jumprelu":
                self._threshold = _shaped(tensors["threshold"], self.features)
            self._lengths = np.ones(self.features, np.float32)
            if "W_dec" in needed:
                self._lengths = _shaped(np.linalg.norm(tensors["W_dec"], axis=1), self.features)
            self._k = int(configuration["k"]) if self._kind == "topk" else 0
            if self._kind == "topk" and not 1 <= self._k <= self.features:
                raise ValueError
            if self._weights.shape != (hidden, self.features):
                raise ValueError
        except (KeyError, ValueError, TypeError) as error:
            raise StoreUsageError(
                f"{path} is not the SAE of its {CONFIGURATION} for rows of width {hidden}"
                + (f": {error} is missing" if isinstance(error, KeyError) else "")
            ) from error

    def feature(self, index: int) -> Callable[[np.ndarray], np.ndarray]:
        """Returns what computes a feature's activation in rows."""

        def measure(rows: np.ndarray) -> np.ndarray:
            which = slice(None) if self._k else slice(index, index + 1)
            before = (rows - self._centre) @ self._weights[:, which] + self._bias[which]
            before *= self._lengths[which]
            if self._k:
                least = np.partition(before, -self._k, axis=1)[:, -self._k]
                one = before[:, index]
                return np.where(one >= least, np.maximum(one, 0), 0).astype(np.float32)
            one = before[:, 0]
            least = 0 if self._threshold is None else self._threshold[index]
            return np.where(one > least, np.maximum(one, 0), 0).astype(np.float32)

        return measure


def _shaped(tensor: np.ndarray, width: int) -> np.ndarray:
    if tensor.shape != (width,):
        raise ValueError(tensor.shape)
    return tensor


def _read_tensors(
    path: Path, wanted: Collection[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors of a file that are wanted, by name and in float32, and the file's metadata."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        with safe_open(path, framework="numpy") as file:
            names = [name for name in sorted(file.keys()) if wanted is None or name in wanted]
            return {name: file.get_tensor(name).astype(np.float32) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise StoreUsageError(f"{path} cannot be read as safetensors: {error}") from error


def _read_configuration(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is no file of a configuration's size")
        configuration = json.loads(path.read_bytes())
        if not isinstance(configuration, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise StoreUsageError(f"{path} cannot be read: {error}") from error
    return configuration
