"""Making a store of `layer_{l}_batch_{n}.pkl` files, as older code for this model wrote them.

A pickle can run any program when it is loaded, so these are read by an unpickler that knows plain Python
containers, numbers and strings, and numpy arrays of numbers, and refuses everything else.

Accepted in each file: a list of items, or a dict with one item per task id. An item is an array of rows
[rows, hidden] (also [1, rows, hidden]), or a dict with that array under `activation` or `activations` and
optionally `task_id` (also `task_idx`) and `sample_index` (also `sample_idx`). Every layer of a batch must
hold the same items in the same order. Where the sample indices tell all items of a task apart they are kept,
otherwise its n-th item is sample n.

The files do not say which tokens the rows belong to. So the imported sequences have token ids of -1, no
prompt, NaN log-probabilities and finish_reason "imported"; they cannot be replayed or resumed.
"""

import hashlib
import io
import pickle
import pickletools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from activation_store.format import (
    DTYPES,
    MANIFEST,
    FinishedSequence,
    SequenceId,
    StoreError,
    StoreSettings,
    StoreUsageError,
    hook_name,
    sequence_key,
)
from activation_store.manifest import MANIFEST_BYTES, decode_manifest
from activation_store.remote_files import open_files
from activation_store.writer import ActivationWriter
from qwen2_core.messages import masked

_FILE = re.compile(r"layer_([0-9]{1,6})_batch_([0-9]{1,12})\.pkl")
_ALLOWED = {
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("ml_dtypes", "bfloat16"),
    ("collections", "OrderedDict"),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        module = re.sub(r"^numpy\.core\b", "numpy._core", module_name)  # as written before numpy 2
        if (module, global_name) in _STAND_INS:
            return _STAND_INS[module, global_name]
        if (module, global_name) not in _ALLOWED:
            raise StoreError(f"it needs {module_name}.{global_name}, which is no plain type or array")
        return super().find_class(module, global_name)


def _latin1(text: str, encoding: str) -> bytes:
    """Decodes the bytes of an array as pickle protocols 0 to 2 write them."""
    if encoding != "latin1":
        raise StoreError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


def _new_array(kind: object, shape: object, code: object) -> np.ndarray:
    """Returns the empty array that numpy's pickles fill afterwards."""
    return np.empty(0, np.int8)


def _number_dtype(*arguments: Any) -> np.dtype:
    dtype = np.dtype(*arguments)
    if dtype.hasobject:
        raise StoreError("it holds an array of Python objects")
    return dtype


_STAND_INS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _latin1,
    # Only named, as an argument of _reconstruct: called, it would make arrays of any size and strides.
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _number_dtype,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
}


class LegacyItem(NamedTuple):
    """The rows of one sequence in one layer."""

    task_id: str
    sample_index: int | None  # None: not said
    rows: np.ndarray  # [rows, hidden] in a dtype that a store can hold


def read_legacy(path: str | Path) -> list[LegacyItem]:
    """Returns the items of one file. Raises StoreError for anything else, before such an object is made."""
    path = Path(path)
    try:
        if not path.is_file():
            raise StoreError("it is no file")
        data = path.read_bytes()
        _check_opcodes(data)
        items = list(_items(_PlainUnpickler(io.BytesIO(data)).load()))
        if not items:
            raise StoreError("it holds no items")
        if sum(item.rows.nbytes for item in items) > len(data):
            raise StoreError(f"its arrays are larger than its {len(data)} bytes")
        return items
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise StoreError(f"{path} is refused: {str(error)[:500]}") from error


def _check_opcodes(data: bytes) -> None:
    """Raises StoreError where a pickle would take memory out of proportion, or is followed by another one."""
    end = 0
    for opcode, argument, position in pickletools.genops(data):
        end = position or 0
        if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
            raise StoreError("it numbers more objects than it can hold")
    if end + 1 < len(data):
        raise StoreError(f"something follows the pickle, which ends at byte {end + 1}: one dump a file")


def _items(content: Any) -> Iterator[LegacyItem]:
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list):
        pairs = [("unknown", item) for item in content]
    else:
        raise StoreError(f"it holds a {type(content).__name__}, not a list or dict of items")
    for place, (task_id, item) in enumerate(pairs):
        sample = None
        if isinstance(item, dict):
            task_id = item.get("task_id", item.get("task_idx", task_id))
            sample = item.get("sample_index", item.get("sample_idx"))
            item = item.get("activation", item.get("activations"))
        # Nothing else is turned into text: a nested list of a few bytes can be gigabytes of it.
        if not _is_text_or_number(task_id) or not (sample is None or _is_number(sample)):
            raise StoreError(f"item {place} has a task id or sample index that is neither text nor number")
        if sample is not None and not 0 <= sample < 1 << 31:
            raise StoreError(f"item {place} has the sample index {sample}; they count from 0")
        if not isinstance(item, np.ndarray) or item.dtype not in DTYPES.values():
            raise StoreError(f"the item of task {str(task_id)!r} has no array of {', '.join(DTYPES)}")
        rows = item[0] if item.ndim == 3 and len(item) == 1 else item
        if rows.ndim != 2 or not len(rows):
            raise StoreError(
                f"the activations of task {str(task_id)!r} have shape {item.shape}, not [rows, hidden]"
            )
        yield LegacyItem(str(task_id), None if sample is None else int(sample), rows)


def _is_text_or_number(value: Any) -> bool:
    return isinstance(value, str) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def import_legacy(source: str | Path, directory: str | Path, hidden_size: int) -> int:
    """Makes a store of all `layer_{l}_batch_{n}.pkl` files in a directory.

    All files are read and checked before the store is made. An import that was interrupted is continued by
    the same call.

    Args:
        source: the directory of the pickles.
        directory: the new store.
        hidden_size: the model's; rows of any other width are refused.

    Returns:
        How many sequences of the pickles are in the store. Those with a row that is not finite, or all zero,
        are not among them: the store has them as failed.

    Raises:
        StoreUsageError: the source is a URL.
        StoreError: there are no such files, one holds anything else, their layers do not hold the same
            sequences, or the store is one of anything else.
    """
    if "://" in str(source):
        raise StoreUsageError(f"pickles are read from a local directory, not from {masked(str(source))}")
    batches = _find_batches(Path(source))
    layers = sorted(batches[min(batches)])
    longest, dtype = 0, None
    digest = hashlib.sha256()
    named: dict[str, list[int | None]] = {}  # the sample indices of each task's items, in order
    for batch, of_batch in sorted(batches.items()):
        if sorted(of_batch) != layers:
            numbers = f"layers {sorted(of_batch)}, batch {min(batches)} has {layers}"
            raise StoreError(f"batch {batch} has {numbers}")
        for path, items in (read := _read_batch(of_batch)):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
            for item in items:
                dtype = dtype or item.rows.dtype
                _check_rows(path, item, hidden_size, dtype)
        _check_layers(read)
        for item in read[0][1]:
            longest = max(longest, len(item.rows))
            named.setdefault(item.task_id, []).append(item.sample_index)
    settings = StoreSettings(
        model_fingerprint="unknown",
        hook_names=tuple(map(hook_name, layers)),
        hidden_size=hidden_size,
        dtype=next(name for name, known in DTYPES.items() if known == dtype),
        capture_prompt=False,
        max_output_tokens=longest,
        sampling={},
        seed=0,
        eos_token_ids=(),
        tokenizer_sha256="unknown",
        # Which pickles, so that no others are taken for the rest of an interrupted import.
        prompt={"imported": "layer_batch_pickles", "pickles_sha256": digest.hexdigest()},
    )
    samples = {task_id: _samples(indices) for task_id, indices in named.items()}
    ids = [_id(task_id, sample) for task_id, of_task in samples.items() for sample in of_task]
    keys = {sequence_key(settings, one) for one in ids}  # raises where a task id cannot be stored
    _check_same_pickles(directory, settings)
    left = {task_id: iter(of_task) for task_id, of_task in samples.items()}
    with ActivationWriter(directory, settings, provenance={"imported_from": str(source)}) as writer:
        for _, of_batch in sorted(batches.items()):
            sequences = _sequences(_read_batch(of_batch), left)
            writer.submit(
                [one for one in sequences if sequence_key(settings, one.id) not in writer.committed]
            )
    return sum(not writer.committed[key].failed for key in keys)


def _find_batches(source: Path) -> dict[int, dict[int, Path]]:
    """Returns the files by batch and layer."""
    batches: dict[int, dict[int, Path]] = {}
    for path in sorted(source.glob("*.pkl")):
        if match := _FILE.fullmatch(path.name):
            of_batch = batches.setdefault(int(match.group(2)), {})
            layer = int(match.group(1))
            if layer in of_batch:
                raise StoreError(f"{path} and {of_batch[layer]} are both layer {layer} of one batch")
            of_batch[layer] = path
    if not batches:
        raise StoreError(f"{source} has no layer_<l>_batch_<n>.pkl")
    return batches


def _read_batch(of_batch: dict[int, Path]) -> list[tuple[Path, list[LegacyItem]]]:
    return [(of_batch[layer], read_legacy(of_batch[layer])) for layer in sorted(of_batch)]


def _check_rows(path: Path, item: LegacyItem, hidden_size: int, dtype: np.dtype) -> None:
    where = f"{path}: the activations of task {item.task_id!r}"
    if item.rows.shape[1] != hidden_size:
        raise StoreError(f"{where} are {item.rows.shape[1]} wide, the model's hidden size is {hidden_size}")
    if item.rows.dtype != dtype:
        raise StoreError(f"{where} are {item.rows.dtype}, those before them {dtype}")


def _samples(indices: list[int | None]) -> list[int]:
    """Returns the sample index of each item of a task: as the files say, where that tells all of them apart.

    Otherwise the n-th item is sample n.
    """
    said = [index for index in indices if index is not None]
    return said if len(set(said)) == len(indices) else list(range(len(indices)))


def _id(task_id: str, sample: int) -> SequenceId:
    return SequenceId(task_id, 0, sample, "identity", np.empty(0, np.int32))


def _check_layers(layers: list[tuple[Path, list[LegacyItem]]]) -> None:
    """Raises StoreError unless all layers of a batch hold the same items in the same order."""
    first_path, first_items = layers[0]
    for path, items in layers[1:]:
        if [item[:2] for item in items] != [item[:2] for item in first_items]:
            raise StoreError(f"{path} and {first_path} do not hold the same sequences")
        for item, first in zip(items, first_items, strict=True):
            if item.rows.shape != first.rows.shape:
                raise StoreError(f"{path} and {first_path} have different shapes for task {item.task_id}")


def _check_same_pickles(directory: str | Path, settings: StoreSettings) -> None:
    """Raises StoreError where the store was imported from other pickles; the writer sees all the rest."""
    files = open_files(directory)
    try:
        data = files.read(MANIFEST, 0, MANIFEST_BYTES + 1)
    except OSError:
        return
    there = decode_manifest(data, f"{files.location}/{MANIFEST}")[0].prompt
    if there.get("imported") == settings.prompt["imported"] and there != settings.prompt:
        raise StoreError(
            f"these pickles are not those that {files.location} was imported from; name another --output"
        )


def _sequences(
    layers: list[tuple[Path, list[LegacyItem]]], samples: Mapping[str, Iterator[int]]
) -> list[FinishedSequence]:
    """Returns the items of a batch, one list a layer, as sequences; `samples` has each task's next index."""
    _check_layers(layers)  # also the second time they are read
    sequences = []
    for place, item in enumerate(layers[0][1]):
        count = len(item.rows)
        sequences.append(
            FinishedSequence(
                _id(item.task_id, next(samples[item.task_id])),
                np.full(count, -1, np.int32),
                np.full(count, np.nan, np.float32),
                "imported",
                np.stack([items[place].rows for _, items in layers]),
            )
        )
    return sequences
