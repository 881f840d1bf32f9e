"""Tables of tokens for pandas. The only module of the store that imports pandas."""

import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from activation_store.format import SequenceRecord, StoreError
from activation_store.rows import LayerChoice, RowColumns

_OF_SEQUENCE = ("task_id", "test_index", "sample_index", "augmentation", "key")
_NAMES = ("task_id", "augmentation", "key")  # the same few values over and over: kept as categories


def token_table(rows: Iterable[tuple[RowColumns, SequenceRecord]], choice: LayerChoice) -> Any:
    """Returns a DataFrame with one line for each row; the columns are those of `to_dataframe`.

    Raises:
        StoreError: pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise StoreError("a DataFrame needs pandas: pip install pandas") from error
    found = list(rows)
    counts = [len(columns.positions) for columns, _ in found]
    table: dict[str, Any] = {}
    for name in _OF_SEQUENCE:
        values = [getattr(record, name) for _, record in found]
        if name in _NAMES:
            categories = list(dict.fromkeys(values))
            numbers = dict(zip(categories, range(len(categories)), strict=True))
            codes = np.repeat([numbers[value] for value in values], counts).astype(np.int32)
            table[name] = pandas.Categorical.from_codes(codes, categories)
        else:
            table[name] = np.repeat(np.array(values, np.int32), counts)
    columns = [
        ("position", np.int32, [one.positions for one, _ in found]),
        ("token_id", np.int32, [one.token_ids for one, _ in found]),
        ("is_generated", bool, [one.is_generated for one, _ in found]),
        ("logprob", np.float32, [one.logprobs for one, _ in found]),
    ]
    for layer in choice.layers:
        norms = [one.norms[layer] if isinstance(one.norms, dict) else one.norms for one, _ in found]
        columns.append((f"norm_{layer}", np.float32, norms))
    for name, dtype, parts in columns:
        table[name] = np.concatenate([np.empty(0, dtype), *parts])
    return pandas.DataFrame(table)
