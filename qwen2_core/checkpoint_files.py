"""The files of a Hugging Face checkpoint: finds them in a directory or on the hub, opens and hashes them.

A checkpoint is a directory, or a hub model, with ``config.json`` and its weights as safetensors: either one
``model.safetensors``, or several files and a ``model.safetensors.index.json`` that names them. What a config
and a tensor mean is said elsewhere: :mod:`qwen2_core.config` and :mod:`qwen2_core.weights`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class StoredTensors:
    """The tensors of a checkpoint's open weight files, by their Hugging Face names."""

    directory: Path
    files: Mapping[str, Any]  # the open safetensors file that each tensor is in

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns every tensor's shape, from the files' headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.files.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, in the shape and dtype that it is stored in."""
        return self.files[name].get_tensor(name)


def is_hub_id(source: str | Path) -> bool:
    """Returns whether ``source`` can only name a hub model: it looks like no path, and nothing is there."""
    name = str(source)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return not is_path and not Path(source).exists()


def resolve_file(source: str | Path, name: str, *, revision: str | None = None) -> Path:
    """Returns the local path of one file of a checkpoint, which is fetched if the checkpoint is on the hub.

    Args:
        source: a directory in Hugging Face layout, or a hub id such as ``Qwen/Qwen2.5-0.5B-Instruct``.
        name: of the file, such as ``config.json``.
        revision: branch, tag or commit of a hub model.

    Raises:
        CheckpointError: no such directory, model or file.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} has no {name}; give a directory in Hugging Face layout.")
        return directory / name
    if directory.exists():
        raise CheckpointError(f"{directory} is a file; give the model's directory or a hub id.")
    if not is_hub_id(source):
        raise CheckpointError(f"There is no model directory {directory}.")
    try:
        return Path(hf_hub_download(str(source), name, revision=revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"There is no model directory {directory}, and {name} of the hub model {source} "
            f"could not be had ({type(error).__name__}: {reason})."
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that must hold one JSON object.

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; is it a Hugging Face config.json?")
    return value


def weight_files(source: str | Path, *, revision: str | None = None) -> list[Path]:
    """Returns the paths of the safetensors files: ``model.safetensors``, or those that the index names.

    Raises:
        CheckpointError: no weights, or an index that names a file that is not there.
    """
    directory = Path(source).expanduser()
    if directory.is_dir() and not any(directory.glob("model*.safetensors*")):
        torch_only = ", ".join(sorted(p.name for p in directory.glob("*.bin"))[:3])
        hint = f" (only {torch_only}: convert it to safetensors first)" if torch_only else ""
        raise CheckpointError(f"{directory} has a config.json but no model.safetensors{hint}.")
    try:
        index = resolve_file(source, _INDEX, revision=revision)
    except CheckpointError:
        return [resolve_file(source, "model.safetensors", revision=revision)]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(Path(name)) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no safetensors index ({error!r}).") from error
    if not names:
        raise CheckpointError(f"{index} names no files.")
    return [resolve_file(source, name, revision=revision) for name in names]


@contextlib.contextmanager
def open_tensors(source: str | Path, *, revision: str | None = None) -> Iterator[StoredTensors]:
    """Opens the weight files of a checkpoint for as long as the context lasts.

    Raises:
        CheckpointError: no weights, a file that cannot be read or is truncated, a tensor in two files.
    """
    paths = weight_files(source, revision=revision)
    with contextlib.ExitStack() as stack:
        file_of: dict[str, Any] = {}
        for path in paths:
            file = stack.enter_context(_open(path))
            for name in file.keys():  # noqa: SIM118 - safe_open has keys() but is no mapping
                if name in file_of:
                    raise CheckpointError(f"Tensor {name} is in two files of {path.parent}.")
                file_of[name] = file
        yield StoredTensors(paths[0].parent, file_of)


def checkpoint_fingerprint(source: str | Path, *, revision: str | None = None) -> str:
    """Returns the sha256 (hex) over config.json and every byte of the weights: equal only for equal models.

    Raises:
        CheckpointError: a file is missing.
    """
    digest = hashlib.sha256()
    for file in (
        resolve_file(source, "config.json", revision=revision),
        *weight_files(source, revision=revision),
    ):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _open(file: Path) -> Any:
    try:
        file.open("rb").close()  # safetensors says of an unreadable file that it is not there
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); fetch or copy it again."
        ) from error
