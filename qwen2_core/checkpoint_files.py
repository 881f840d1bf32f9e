"""The files of a Hugging Face checkpoint: finds them in a folder or on the hub, opens and hashes them.

A checkpoint is a folder, or a hub model, with ``config.json`` and its weights as safetensors: either one
``model.safetensors``, or several files and a ``model.safetensors.index.json`` that names them. Where there
are both, the one file counts, as for Transformers. What a config and a tensor mean is said elsewhere:
:mod:`qwen2_core.config` and :mod:`qwen2_core.weights`.

Names are taken within the folder only, and only regular files are read. A file may be a symbolic link, as in
the cache of the hub: whoever made the folder decides where its files lie.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qwen2_core.errors import CheckpointError
from qwen2_core.hub import cached_snapshot, fetch, list_files

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "adapter_config.json",
    _INDEX,
)
_JSON_BYTES = 1 << 26  # more than any config or index has
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_ADDRESS = re.compile(r"(?:https?://[^/]+/)?(\w[\w.-]*/\w[\w.-]*)(?:/|/tree/.*)?")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclasses.dataclass(frozen=True)
class StoredTensors:
    """The tensors of a checkpoint's open weight files, by their names in the files."""

    directory: Path
    files: Mapping[str, Any]  # the open safetensors file that each tensor is in

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns every tensor's shape, from the files' headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.files.items()}

    def dtypes(self) -> dict[str, str]:
        """Returns every tensor's type as safetensors names it, such as ``BF16``."""
        return {name: file.get_slice(name).get_dtype() for name, file in self.files.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, in the shape and dtype that it is stored in."""
        return self.files[name].get_tensor(name)


def is_hub_id(source: str | Path) -> bool:
    """Returns whether ``source`` names a hub model: it looks like an id, and no folder here is meant.

    A folder of nearly this name is taken to be meant, unless the hub's cache has the model.
    """
    name = str(source)
    if not _HUB_ID.fullmatch(name) or _path(source).exists():
        return False
    return cached_snapshot(name) is not None or _near_folder(Path(name)) is None


def checkpoint_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint; of a hub model the cache's, whose name is the commit.

    Fetches a hub model's configuration and tokenizer where the cache does not have them, but no weights.

    Args:
        source: a folder in Hugging Face layout, or a hub id such as ``Qwen/Qwen2.5-0.5B-Instruct``.
        revision: branch, tag or commit of a hub model.

    Raises:
        CheckpointError: there is no such folder or model.
    """
    folder = _path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the model's directory or a hub id.")
    if not is_hub_id(source):
        near = _near_folder(folder)
        hub = f" (For the hub's, first run `hf download {source}`.)" if _HUB_ID.fullmatch(str(source)) else ""
        meant = _HUB_ADDRESS.fullmatch(str(source))
        on_the_hub = f"; for the hub's, give {meant[1]}." if meant else "."
        hint = f"; did you mean {near}?{hub}" if near else on_the_hub
        raise CheckpointError(f"There is no model directory {folder}{hint}")
    cached = cached_snapshot(str(source), revision)
    return cached or _fetch_small(str(source), revision)


def resolve_file(source: str | Path, name: str, *, revision: str | None = None) -> Path:
    """Returns the path of one file of a checkpoint, which is fetched if the checkpoint is on the hub.

    Raises:
        CheckpointError: no such folder, model or file, or the file is no regular one.
    """
    folder = checkpoint_folder(source, revision=revision)
    if not _is_there(folder / name) and is_hub_id(source):
        folder = _fetch_small(str(source), folder.name)
    if not _is_there(folder / name):
        hint = "give a directory in Hugging Face layout"
        if _is_there(folder / "adapter_config.json"):
            hint = "it is a PEFT adapter: merge it into its base model first"
        raise CheckpointError(f"{folder} has no {name}; {hint}.")
    return folder / name


def optional_file(source: str | Path, name: str, *, revision: str | None = None) -> Path | None:
    """Returns the path of a file that a checkpoint need not have, or None. Does not ask the hub for it alone.

    Raises:
        CheckpointError: no such folder or model, or the file is no regular one.
    """
    path = checkpoint_folder(source, revision=revision) / name
    return path if _is_there(path) else None


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that must hold one JSON object.

    Raises:
        CheckpointError: it holds something else, or more than any such file.
    """
    if not _is_there(path):
        raise CheckpointError(f"{path} is not there.")
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_JSON_BYTES >> 20} MB; it is no config or index.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deep.") from error
    except CheckpointError:
        raise
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; is it a Hugging Face {path.name}?")
    return value


def weight_files(source: str | Path, *, revision: str | None = None) -> list[Path]:
    """Returns the paths of the safetensors files: ``model.safetensors``, or else those that the index names.

    A hub model's are fetched where the cache does not have them.

    Raises:
        CheckpointError: no weights, or an index that names a file that is not there.
    """
    folder = checkpoint_folder(source, revision=revision)
    if is_hub_id(source):
        _fetch_weights(str(source), folder)
    distributed = [name for name in _names(folder) if _DISTRIBUTED.fullmatch(name)]
    if distributed:
        raise CheckpointError(
            f"{folder} holds a distributed checkpoint ({min(distributed)}): load and save it first."
        )
    if _is_there(folder / "adapter_config.json"):
        raise CheckpointError(f"{folder} holds a PEFT adapter: merge it into its base model first.")
    if _is_there(folder / _SINGLE):
        return [folder / _SINGLE]
    if not _is_there(folder / _INDEX):
        raise CheckpointError(_no_weights(folder))
    paths = [folder / name for name in _index_names(folder / _INDEX)]
    for path in paths:
        if not _is_there(path):
            raise CheckpointError(f"{folder} has no {path.name}, which its {_INDEX} names; fetch or copy it.")
    return paths


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


def weights_dtype(source: str | Path, *, revision: str | None = None) -> str | None:
    """Returns the dtype that the weights are in: what the index says, or that of the first float tensor.

    It is Transformers' choice for a config that names none. None where no tensor is of floats.
    """
    paths = weight_files(source, revision=revision)
    if paths[0].name != _SINGLE:
        metadata = read_json_object(paths[0].parent / _INDEX).get("metadata")
        if isinstance(metadata, dict) and "dtype" in metadata:
            dtype = str(metadata["dtype"]).removeprefix("torch.")
            if dtype not in FLOATS.values():
                raise CheckpointError(
                    f"{paths[0].parent / _INDEX} says the dtype {dtype[:60]!r}, which is not one of "
                    f"{', '.join(FLOATS.values())}: give dtype=."
                )
            return dtype
    with _open(paths[0]) as file:
        for name in file.keys():  # noqa: SIM118
            dtype = FLOATS.get(file.get_slice(name).get_dtype())
            if dtype is not None:
                return dtype
    return None


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


def has_weights(folder: Path) -> bool:
    """Tells whether all the weights of a checkpoint are in its folder.

    Raises:
        CheckpointError: something else is in the place of one.
    """
    if _is_there(folder / _SINGLE):
        return True
    return _is_there(folder / _INDEX) and all(
        _is_there(folder / name) for name in _index_names(folder / _INDEX)
    )


def _path(source: str | Path) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"A model is a directory or a hub id, not {source!r}.")
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, or of an unknown user
        raise CheckpointError(f"{str(source)[:200]!r} is no path ({error}).") from error
    return path


def _fetch_small(repo_id: str, revision: str | None) -> Path:
    names = set(list_files(repo_id, revision))
    if "config.json" not in names:
        raise CheckpointError(f"The hub model {repo_id} has no config.json; it is no checkpoint.")
    return fetch(repo_id, [name for name in _SMALL if name in names], revision)


def _fetch_weights(repo_id: str, folder: Path) -> None:
    """Fetches the weights of a snapshot, unless they are all there."""
    if has_weights(folder):
        return
    names = list_files(repo_id, folder.name)
    # The cache may be of another tool, without the small files either.
    fetch(repo_id, [name for name in _SMALL if name in names], folder.name)
    if _SINGLE in names:
        fetch(repo_id, [_SINGLE], folder.name)
    elif _INDEX in names:
        fetch(repo_id, _index_names(folder / _INDEX), folder.name)
    else:
        raise CheckpointError(f"The hub model {repo_id} has no {_SINGLE}{_found_instead(names)}.")


def _index_names(index: Path) -> list[str]:
    """Returns the names of the weight files that an index has, sorted; each is a plain file name."""
    try:
        weight_map = read_json_object(index).get("weight_map")
    except CheckpointError as error:
        raise CheckpointError(f"{index} is no safetensors index ({error})") from error
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} is no safetensors index (it has no object weight_map).")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]*\.safetensors", name):
            raise CheckpointError(
                f"{index} says that {tensor} is in {name!r}: a weight file has a plain name that ends in "
                ".safetensors, and lies in the same folder."
            )
    if not weight_map:
        raise CheckpointError(f"{index} names no files.")
    return sorted(set(weight_map.values()))


def _names(folder: Path) -> list[str]:
    try:
        return [file.name for file in folder.iterdir()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}.") from error


def _no_weights(folder: Path) -> str:
    names = _names(folder)
    shards = sorted(name for name in names if re.fullmatch(r"model-.*-of-.*\.safetensors", name))
    if shards:
        return (
            f"{folder} has {shards[0]} and others, but no {_INDEX} that names them all: fetch or copy it too."
        )
    return f"{folder} has a config.json but no {_SINGLE}{_found_instead(names)}."


def _found_instead(names: Iterable[str]) -> str:
    """Returns which other weights there are, and what to do with them, in parentheses; or nothing."""
    names = sorted(names)
    variants = [name for name in names if name.endswith(".safetensors") or ".safetensors.index." in name]
    if variants:
        return f" (only {', '.join(variants[:3])}: rename or save it as {_SINGLE})"
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"))]
    return f" (only {', '.join(others[:3])}: convert it to safetensors first)" if others else ""


def _is_there(path: Path) -> bool:
    """Returns whether a file is there.

    Raises:
        CheckpointError: something else is, such as a folder, a pipe or a device, which may never end.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a loop of links; NUL in the name
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file.")
    return True


def _near_folder(path: Path) -> Path | None:
    """Returns the folder whose path is nearest to one that is not there, or None where none is near."""
    near = Path(path.anchor)
    for part in path.parts[len(near.parts) :]:
        if (near / part).is_dir():
            near /= part
            continue
        try:
            names = {file.name.lower(): file.name for file in itertools.islice(near.iterdir(), 10_000)}
        except OSError:
            return None
        match = difflib.get_close_matches(part.lower(), names, 1, cutoff=0.75)
        if not match or not (near / names[match[0]]).is_dir():
            return None
        near /= names[match[0]]
    return near


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
