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

import io
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from activation_store.format import DTYPES, FinishedSequence, SequenceId, StoreError, StoreSettings, hook_name
from activation_store.writer import ActivationWriter

_FILE = re.compile(r"layer_(\d+)_batch_(\d+)\.pkl")
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("ml_dtypes", "bfloat16"),
    ("collections", "OrderedDict"),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        module = re.sub(r"^numpy\.core\b", "numpy._core", module_name)  # as written before numpy 2
        if (module, global_name) == ("_codecs", "encode"):
            return _latin1
        if (module, global_name) not in _ALLOWED:
            raise StoreError(f"it needs {module_name}.{global_name}, which is no plain type or array")
        return super().find_class(module, global_name)


def _latin1(text: str, encoding: str) -> bytes:
    """Decodes the bytes of an array as pickle protocols 0 to 2 write them."""
    if encoding != "latin1":
        raise StoreError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


class LegacyItem(NamedTuple):
    """The rows of one sequence in one layer."""

    task_id: str
    sample_index: int | None  # None: not said
    rows: np.ndarray  # [rows, hidden] in a dtype that a store can hold


def read_legacy(path: str | Path) -> list[LegacyItem]:
    """Returns the items of one file. Raises StoreError for anything else, before such an object is made."""
    path = Path(path)
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        return list(_items(content))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise StoreError(f"{path} is refused: {error}") from error


def _items(content: Any) -> Iterator[LegacyItem]:
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list):
        pairs = [("unknown", item) for item in content]
    else:
        raise StoreError(f"it holds a {type(content).__name__}, not a list or dict of items")
    for task_id, item in pairs:
        sample = None
        if isinstance(item, dict):
            task_id = item.get("task_id", item.get("task_idx", task_id))
            sample = item.get("sample_index", item.get("sample_idx"))
            item = item.get("activation", item.get("activations"))
        if not isinstance(item, np.ndarray) or item.dtype not in DTYPES.values():
            raise StoreError(f"the item of task {task_id!r} has no array of {', '.join(DTYPES)}")
        rows = item[0] if item.ndim == 3 and len(item) == 1 else item
        if rows.ndim != 2 or not len(rows):
            raise StoreError(
                f"the activations of task {task_id!r} have shape {item.shape}, not [rows, hidden]"
            )
        yield LegacyItem(str(task_id), None if sample is None else int(sample), rows)


def import_legacy(source: str | Path, directory: str | Path, hidden_size: int) -> int:
    """Makes a store of all `layer_{l}_batch_{n}.pkl` files in a directory.

    Args:
        source: the directory of the pickles.
        directory: the new store.
        hidden_size: the model's; rows of any other width are refused.

    Returns:
        How many sequences were imported.

    Raises:
        StoreError: there are no such files, one holds anything else, their layers do not hold the same
            sequences, or the store has sequences already.
    """
    files: dict[int, dict[int, Path]] = {}  # batch -> layer -> file
    for path in Path(source).glob("*.pkl"):
        if match := _FILE.fullmatch(path.name):
            files.setdefault(int(match.group(2)), {})[int(match.group(1))] = path
    if not files:
        raise StoreError(f"{source} has no layer_<l>_batch_<n>.pkl")
    layers = sorted(files[min(files)])
    for batch, of_batch in sorted(files.items()):
        if sorted(of_batch) != layers:
            raise StoreError(f"batch {batch} has layers {sorted(of_batch)}, batch {min(files)} has {layers}")
    first = read_legacy(files[min(files)][layers[0]])[0].rows
    longest = max(len(item.rows) for batch in files.values() for item in read_legacy(batch[layers[0]]))
    settings = StoreSettings(
        model_fingerprint="unknown",
        hook_names=tuple(map(hook_name, layers)),
        hidden_size=hidden_size,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == first.dtype),
        capture_prompt=False,
        max_output_tokens=longest,
        sampling={},
        seed=0,
        eos_token_ids=(),
        tokenizer_sha256="unknown",
        prompt={"imported": "layer_batch_pickles"},
    )
    seen: Counter[str] = Counter()
    with ActivationWriter(directory, settings, provenance={"imported_from": str(source)}) as writer:
        if writer.committed:
            raise StoreError(f"{directory} already holds {len(writer.committed)} sequences; choose a new one")
        for _, of_batch in sorted(files.items()):
            writer.submit(
                _sequences([(of_batch[layer], read_legacy(of_batch[layer])) for layer in layers], seen)
            )
    return writer.sequences_written


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
