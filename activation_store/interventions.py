"""What was written into the model while the sequences of a store were made: one file of values.

The settings name it by its sha256, which is so in the manifest and in the key of every sequence. What the
values mean is for whoever writes them into a model; a store keeps the bytes.
"""

import hashlib

from activation_store.format import INTERVENTIONS, StoreError, StoreSettings
from activation_store.store_files import StoreFiles

MOST_BYTES = 1 << 28


def interventions_sha256(data: bytes) -> str:
    """Returns what `StoreSettings.interventions` is for a file of these bytes.

    Raises:
        StoreError: they are more than MOST_BYTES, or none.
    """
    if not 0 < len(data) <= MOST_BYTES:
        raise StoreError(
            f"interventions are a file of 1 to {MOST_BYTES} bytes, these are {len(data)}: name fewer layers "
            "or positions"
        )
    return hashlib.sha256(data).hexdigest()


def read_interventions(files: StoreFiles, settings: StoreSettings) -> bytes:
    """Returns the file of a store that has interventions.

    Raises:
        StoreError: it is missing, cannot be read, or is not the one that the manifest names.
    """
    where = f"{files.location}/{INTERVENTIONS}"
    try:
        data = files.read(INTERVENTIONS, 0, MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise StoreError(f"{where} is missing: {_MADE_AGAIN}") from error
    except OSError as error:
        raise StoreError(f"cannot read {where}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES or hashlib.sha256(data).hexdigest() != settings.interventions:
        raise StoreError(f"{where} is not the file that the manifest names (checksum): {_MADE_AGAIN}")
    return data


_MADE_AGAIN = "a run that continues the store with the same interventions writes it again"


def keep_interventions(
    files: StoreFiles, settings: StoreSettings, host: int, data: bytes | None, has_manifest: bool
) -> None:
    """Sees to it that a store has the file that its settings name, before any manifest or sequence does.

    Args:
        files: the store; the caller has taken `host`.
        settings: those of the store.
        host: in whose folder the file is made ready.
        data: the file's bytes; None where it must be there already, or where there are no interventions.
        has_manifest: whether a manifest names the file, so that one of other bytes is damaged.

    Raises:
        StoreError: the bytes are not those that the settings name, or the file is missing or damaged and they
            were not given, or it is there already, of a run that never wrote its manifest.
        StoreWriteError: it cannot be written.
    """
    if data is not None and interventions_sha256(data) != settings.interventions:
        raise StoreError("the interventions given are not those that the settings name by their checksum")
    if not settings.interventions:
        return
    if data is None:
        read_interventions(files, settings)
        return
    if not has_manifest:
        try:
            files.create(host, INTERVENTIONS, data)
        except FileExistsError:  # another host was quicker, or a run ended here
            pass
        else:
            return
    try:
        read_interventions(files, settings)
    except StoreError as error:
        if not has_manifest:
            raise StoreError(
                f"{files.location} has an {INTERVENTIONS} of another run: remove it or choose another "
                "directory"
            ) from error
        files.replace(INTERVENTIONS, data, host=host)
