"""The manifest of a store: its settings and provenance as JSON that carries its own checksum."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from activation_store import schema
from activation_store.checked_json import seal, unseal
from activation_store.format import StoreError, StoreSettings
from activation_store.schema import Count

SCHEMA_VERSION = 2
# Version 1 had no checksums in manifest and index lines, and no `numerics`.
READ_VERSIONS = (1, SCHEMA_VERSION)
MANIFEST_BYTES = 1 << 20  # no manifest is larger


class _Version(msgspec.Struct):
    """What every manifest has, whatever its schema."""

    schema_version: Count


class _Manifest(_Version, forbid_unknown_fields=True):
    """The form of a manifest of this schema."""

    settings: dict[str, Any]
    provenance: dict[str, Any]
    checksum: str | None = None


def encode_manifest(settings: StoreSettings, provenance: Mapping[str, Any]) -> bytes:
    """Returns the manifest's text.

    Raises:
        ValueError: `provenance` is not JSON, or the manifest would be larger than MANIFEST_BYTES.
    """
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings.to_json(),
        "provenance": dict(provenance),
    }
    data = (json.dumps(seal(manifest), indent=2, allow_nan=False) + "\n").encode()
    if len(data) > MANIFEST_BYTES:
        raise StoreError(f"the manifest would have {len(data)} bytes; at most {MANIFEST_BYTES} are allowed")
    return data


def decode_manifest(data: bytes, where: str) -> tuple[StoreSettings, dict[str, Any]]:
    """Returns (settings, provenance); raises StoreError for a damaged text or another schema version.

    The checksum is not looked at, see `manifest_problem`: of a text that can be read, all is returned.
    """
    try:
        if len(data) > MANIFEST_BYTES:
            raise ValueError(f"more than {MANIFEST_BYTES} bytes")
        values = schema.from_json(data)
        # First the version: another one's manifest may have any other fields.
        version = schema.checked(values, _Version).schema_version
        if version not in READ_VERSIONS:
            known = ", ".join(map(str, READ_VERSIONS))
            raise StoreError(f"it has schema version {version}; this program reads versions {known}")
        manifest = schema.checked(values, _Manifest)
        return StoreSettings.from_json(manifest.settings), manifest.provenance
    except StoreError as error:
        raise StoreError(f"{where}: {error}") from error
    except ValueError as error:
        raise StoreError(f"{where} is damaged: it is not the JSON of a store's manifest ({error})") from error


def manifest_version(data: bytes) -> int:
    """Returns the schema version of a manifest that `decode_manifest` has read."""
    return json.loads(data)["schema_version"]


def manifest_problem(data: bytes) -> str | None:
    """Returns why a manifest that `decode_manifest` has read cannot be relied on; None where it can.

    One of schema version 1 has no checksum.
    """
    manifest = json.loads(data)
    fits = unseal(manifest)[1]
    if fits is None and manifest["schema_version"] > 1:
        return "its checksum is missing"
    return "its checksum does not fit: something in it has changed" if fits is False else None
