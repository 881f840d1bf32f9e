"""The activation store: durable, resumable, checked activations of every token, and their reader.

    with ActivationWriter("activations", settings, provenance={...}) as writer:
        writer.submit(finished_sequences)                # durable in the background, batch by batch
    store = ActivationStore("activations")
    rows = store.rows(store[0], layer=12)                # float32; also tokens, text, a DataFrame
    for batch in ShuffledBatches(store, layer=12, batch_size=4096):
        ...

``python -m activation_store`` is the command line that looks after a store.

A module is imported when the first of its names is asked for, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_store.dataset_check import stale_sequences, verify_coverage
    from activation_store.format import (
        FinishedSequence,
        SequenceId,
        SequenceRecord,
        StoreError,
        StoreSettings,
        StoreWriteError,
        hook_layer,
        hook_name,
        sequence_key,
    )
    from activation_store.legacy_import import import_legacy
    from activation_store.outcomes import write_outcomes
    from activation_store.reader import ActivationStore
    from activation_store.repair import drop_sequences, repair_store
    from activation_store.retry import RetryPolicy, at_once
    from activation_store.rows import RowColumns, RowFilter
    from activation_store.saelens_export import export_saelens
    from activation_store.shuffle import RowBatch, ShuffledBatches
    from activation_store.statistics import LayerStatistics
    from activation_store.verify import verify_store
    from activation_store.writer import ActivationWriter, check_settings

    Patience = RetryPolicy

__all__ = [
    "ActivationStore",
    "ActivationWriter",
    "FinishedSequence",
    "LayerStatistics",
    "Patience",
    "RetryPolicy",
    "RowBatch",
    "RowColumns",
    "RowFilter",
    "SequenceId",
    "SequenceRecord",
    "ShuffledBatches",
    "StoreError",
    "StoreSettings",
    "StoreWriteError",
    "at_once",
    "check_settings",
    "drop_sequences",
    "export_saelens",
    "hook_layer",
    "hook_name",
    "import_legacy",
    "repair_store",
    "sequence_key",
    "stale_sequences",
    "verify_coverage",
    "verify_store",
    "write_outcomes",
]

# Which module has which names.
_MODULES = {
    "dataset_check": "stale_sequences verify_coverage",
    "format": "FinishedSequence SequenceId SequenceRecord StoreError StoreSettings StoreWriteError "
    "hook_layer hook_name sequence_key",
    "legacy_import": "import_legacy",
    "outcomes": "write_outcomes",
    "reader": "ActivationStore",
    "repair": "drop_sequences repair_store",
    "retry": "RetryPolicy at_once",
    "rows": "RowColumns RowFilter",
    "saelens_export": "export_saelens",
    "shuffle": "RowBatch ShuffledBatches",
    "statistics": "LayerStatistics",
    "verify": "verify_store",
    "writer": "ActivationWriter check_settings",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
_FORMER = {"Patience": "RetryPolicy"}  # names of earlier versions


def __getattr__(name: str) -> Any:
    present = _FORMER.get(name, name)
    if present not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[present]}"), present)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
