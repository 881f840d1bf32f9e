"""Making a store of `layer_{l}_batch_{n}.pkl` files, as older code for this model wrote them.

A pickle can run any program when it is loaded, so these are read by an unpickler that knows plain Python
containers, numbers and strings, and numpy arrays of numbers, and refuses everything else.

Accepted in each file: a list of items, or a dict with one item per task id. An item is an array of rows
[rows, hidden] (also [1, rows, hidden]), or a dict with that array under `activation` or `activations` and
optionally `task_id` (also `task_idx`) and `sample_index` (also `sample_idx`). Every layer of a batch must
hold the same items in the same order.

The files do not say which tokens the rows belong to. So the imported sequences have token ids of -1, no
prompt, NaN log-probabilities and finish_reason "imported"; they cannot be replayed or resumed.
"""

import hashlib
import io
import pickle
import pickletools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from activation_store.format import (
    DTYPES,
    FinishedSequence,
    SequenceId,
    StoreError,
    StoreSettings,
    hook_name,
    sequence_key,
)
from activation_store.writer import ActivationWriter

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
        if not isinstance(task_id, str | int) or not isinstance(sample, int | np.integer | None):
            raise StoreError(f"item {place} has a task id or sample index that is neither text nor number")
        if not isinstance(item, np.ndarray) or item.dtype not in DTYPES.values():
            raise StoreError(f"the item of task {str(task_id)!r} has no array of {', '.join(DTYPES)}")
        rows = item[0] if item.ndim == 3 and len(item) == 1 else item
        if rows.ndim != 2 or not len(rows):
            raise StoreError(
                f"the activations of task {str(task_id)!r} have shape {item.shape}, not [rows, hidden]"
            )
        yield LegacyItem(str(task_id), None if sample is None else int(sample), rows)


def import_legacy(source: str | Path, directory: str | Path, hidden_size: int) -> int:
    """Makes a store of all `layer_{l}_batch_{n}.pkl` files in a directory.

    All files are read and checked before the store is made. An import that was interrupted is continued by
    the same call.

    Args:
        source: the directory of the pickles.
        directory: the new store.
        hidden_size: the model's; rows of any other width are refused.

    Returns:
        How many sequences of the pickles are in the store. Those whose rows are not finite are not among
        them: the store has them as failed.

    Raises:
        StoreError: there are no such files, one holds anything else, their layers do not hold the same
            sequences, or the store is one of anything else.
    """
    batches = _find_batches(Path(source))
    layers = sorted(batches[min(batches)])
    longest, dtype = 0, None
    digest = hashlib.sha256()
    ids: list[SequenceId] = []
    seen: Counter[str] = Counter()
    for batch, of_batch in sorted(batches.items()):
        if sorted(of_batch) != layers:
            numbers = f"layers {sorted(of_batch)}, batch {min(batches)} has {layers}"
            raise StoreError(f"batch {batch} has {numbers}")
        for path, items in (read := _read_batch(of_batch)):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
            for item in items:
                dtype = dtype or item.rows.dtype
                _check_rows(path, item, hidden_size, dtype)
        longest = max(longest, *(len(item.rows) for item in read[0][1]))
        ids += [one.id for one in _sequences(read, seen)]
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
    keys = {sequence_key(settings, one) for one in ids}  # raises where a task id cannot be stored
    seen.clear()
    with ActivationWriter(directory, settings, provenance={"imported_from": str(source)}) as writer:
        for _, of_batch in sorted(batches.items()):
            sequences = _sequences(_read_batch(of_batch), seen)
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


def _sequences(layers: list[tuple[Path, list[LegacyItem]]], seen: Counter[str]) -> list[FinishedSequence]:
    """Returns the items of a batch, one list a layer, as sequences; a task's n-th item is its sample n."""
    first_path, first_items = layers[0]
    sequences = []
    for place, item in enumerate(first_items):
        rows = []
        for path, items in layers:
            if len(items) != len(first_items) or items[place][:2] != item[:2]:
                raise StoreError(f"{path} and {first_path} do not hold the same sequences")
            if items[place].rows.shape != item.rows.shape:
                raise StoreError(f"{path} and {first_path} have different shapes for task {item.task_id}")
            rows.append(items[place].rows)
        count = len(item.rows)
        sequences.append(
            FinishedSequence(
                # Task ids collide in these files: what tells their sequences apart is the order.
                SequenceId(item.task_id, 0, seen[item.task_id], "identity", np.empty(0, np.int32)),
                np.full(count, -1, np.int32),
                np.full(count, np.nan, np.float32),
                "imported",
                np.stack(rows),
            )
        )
        seen[item.task_id] += 1
    return sequences
