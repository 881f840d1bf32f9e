"""The activation store: durable, resumable, checked activations of every token, and their reader.

    with ActivationWriter("activations", settings, provenance={...}) as writer:
        writer.submit(finished_sequences)                # durable in the background, batch by batch
    store = ActivationStore("activations")
    for batch in ShuffledBatches(store, layer=12, batch_size=4096):
        ...

``python -m activation_store`` is the command line that looks after a store.
"""

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
from activation_store.reader import ActivationStore, RowColumns, RowFilter, write_outcomes
from activation_store.repair import drop_sequences, repair_store
from activation_store.retry import RetryPolicy, at_once
from activation_store.saelens_export import export_saelens
from activation_store.shuffle import RowBatch, ShuffledBatches
from activation_store.statistics import LayerStatistics
from activation_store.verify import verify_store
from activation_store.writer import ActivationWriter, check_settings

Patience = RetryPolicy  # its name in earlier versions

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
