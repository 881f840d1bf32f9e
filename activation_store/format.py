"""What an activation store holds: settings, sequences, their keys, the manifest and the index lines.

```
DIRECTORY/
  manifest.json                        StoreSettings (must be equal to continue) and provenance (may differ)
  host-00000/index.jsonl               one SequenceRecord per line
  host-00000/shard-000000.safetensors  the rows of one batch (layout: shard.py)
```
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# "imported": rows taken over from another code base, whose tokens are not known.
FINISH_REASONS = ("stop", "length", "failed", "imported")

_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_post")
_SHARD = re.compile(r"shard-(\d+)\.safetensors")
_HOST = re.compile(r"host-(\d+)")


class StoreError(ValueError):
    """Says in one sentence why a store cannot be opened, continued or read as asked."""


class StoreWriteError(StoreError):
    """Says why writing failed (disk full, permission lost, ...); what was committed before is safe."""


def hook_name(layer: int) -> str:
    """Returns the name of decoder block `layer`'s output: `hook_name(10) == "blocks.10.hook_resid_post"`."""
    return f"blocks.{layer}.hook_resid_post"


def hook_layer(name: str) -> int:
    """Returns the layer of a hook name; raises StoreError for any other name."""
    match = _HOOK.fullmatch(name)
    if match is None:
        raise StoreError(f"{name!r} is not a hook name of the form blocks.<layer>.hook_resid_post")
    return int(match.group(1))


def host_name(host_index: int) -> str:
    """Returns the name of a host folder: `host_name(7) == "host-00007"`."""
    return f"host-{host_index:05d}"


def host_number(name: str) -> int | None:
    """Returns the index in a host folder's name: `host_number("host-00007") == 7`; None for other names."""
    match = _HOST.fullmatch(name)
    return int(match.group(1)) if match else None


def shard_name(number: int) -> str:
    """Returns the name of a shard: `shard_name(12) == "shard-000012.safetensors"`."""
    return f"shard-{number:06d}.safetensors"


def shard_number(name: str) -> int | None:
    """Returns the number in a shard's name: `shard_number("shard-000012.safetensors") == 12`, else None."""
    match = _SHARD.fullmatch(name)
    return int(match.group(1)) if match else None


def layers_text(layers: Sequence[int]) -> str:
    """Returns layers in a few words: `layers_text([10, 11, 12]) == "10-12"`, else "0, 5, 12" or "none"."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[0] + len(layers))):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers)) or "none"


@dataclass(frozen=True)
class StoreSettings:
    """Everything that decides the stored bytes: a directory is continued only under equal settings.

    Raises:
        StoreError: a dtype, width or hook name that no store can have.
    """

    model_fingerprint: str  # sha256 hex over weights and config
    hook_names: tuple[str, ...]  # ("blocks.10.hook_resid_post", ...); () when capture is off
    hidden_size: int
    dtype: str  # "float32" | "bfloat16" | "float16"
    capture_prompt: bool
    max_output_tokens: int
    sampling: dict[str, float | int]  # temperature, top_k, top_p
    seed: int
    eos_token_ids: tuple[int, ...]
    tokenizer_sha256: str
    prompt: dict[str, str]  # grid_encoder, prompt_version

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise StoreError(
                f"activations cannot be stored as {self.dtype!r}: choose one of {', '.join(DTYPES)}"
            )
        if self.hidden_size < 1:
            raise StoreError(f"hidden_size must be at least 1, not {self.hidden_size}")
        for name in self.hook_names:
            hook_layer(name)
        if len(set(self.hook_names)) != len(self.hook_names):
            raise StoreError(f"a hook name is given twice: {', '.join(self.hook_names)}")

    def __repr__(self) -> str:
        """Says in a line what is stored; `to_json()` has every setting."""
        layers = layers_text([hook_layer(name) for name in self.hook_names])
        return (
            f"StoreSettings(model {self.model_fingerprint[:8]!r}, layers {layers} of width "
            f"{self.hidden_size} in {self.dtype}, {'with' if self.capture_prompt else 'without'} prompts, "
            f"up to {self.max_output_tokens} tokens, sampling {self.sampling}, seed {self.seed})"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values; sampling values are floats, so that 0 and 0.0 are the same setting."""
        values = asdict(self)
        values["hook_names"] = list(self.hook_names)
        values["eos_token_ids"] = sorted(int(token) for token in self.eos_token_ids)
        values["sampling"] = {name: float(value) for name, value in self.sampling.items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StoreSettings":
        """Returns the settings that `to_json` gave; raises StoreError when a field is missing or unknown."""
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            odd = ", ".join(sorted(set(values) ^ expected))
            raise StoreError(f"{MANIFEST}: settings do not have the fields of schema {SCHEMA_VERSION}: {odd}")
        plain = dict(values)
        plain["hook_names"] = tuple(values["hook_names"])
        plain["eos_token_ids"] = tuple(values["eos_token_ids"])
        return cls(**plain)

    def differences(self, asked: "StoreSettings") -> list[str]:
        """Returns one phrase per field in which `asked` differs from these settings; [] for equal ones."""
        mine, theirs = self.to_json(), asked.to_json()
        return [
            f"{name} is {json.dumps(mine[name])} there and {json.dumps(theirs[name])} here"
            for name in mine
            if mine[name] != theirs[name]
        ]


@dataclass(frozen=True)
class SequenceId:
    """Names a sequence before it is generated: its puzzle, its sample and its prompt."""

    task_id: str
    test_index: int
    sample_index: int
    augmentation: str  # "identity" or the name of the transformation applied to the puzzle
    prompt_token_ids: np.ndarray  # int32 [prompt_length]

    def __repr__(self) -> str:
        """Says in a line which sequence it is, without the prompt's tokens."""
        return (
            f"SequenceId({self.task_id!r} test {self.test_index} {self.augmentation} sample "
            f"{self.sample_index}, prompt of {len(self.prompt_token_ids)} tokens)"
        )


@dataclass(frozen=True)
class FinishedSequence:
    """A generated sequence as handed to the writer; n generated tokens, EOS included.

    Row r of a layer belongs to the token that was read: prompt tokens first where they are captured,
    then generated token t at position `len(prompt) + t`.
    """

    id: SequenceId
    token_ids: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # float32 [n]
    finish_reason: str  # "stop" | "length"
    rows: np.ndarray | None  # [layers, n or prompt_length + n, hidden], any strides; None when capture is off
    key: str | None = None  # the sequence's key in a store of these settings, where it is known already

    def __repr__(self) -> str:
        """Says in a line what there is, without the values."""
        rows = "no rows" if self.rows is None else f"rows {list(self.rows.shape)} in {self.rows.dtype}"
        return f"FinishedSequence({self.id}, {len(self.token_ids)} tokens ({self.finish_reason}), {rows})"


class SequenceRecord(NamedTuple):
    """What one index line says of a committed sequence.

    `host` is not in the line: it is the folder the line was found in.

    A failed sequence has `n_rows == 0`, no shard (`shard == ""`) and says in `failure` where it broke.
    """

    key: str
    shard: str
    task_id: str
    test_index: int
    sample_index: int
    augmentation: str
    seed: int
    row_start: int  # first row in the shard
    n_rows: int
    prompt_start: int  # first token in the shard's prompt_token_ids
    prompt_length: int
    generated_length: int
    finish_reason: str
    shard_bytes: int
    shard_sha256: str
    shard_sequences: int  # index lines of this shard: fewer of them means a torn commit
    shard_mtime_ns: int  # when it was written; a resume re-hashes only shards where this changed
    failure: str | None
    host: int

    def __repr__(self) -> str:
        """Says in a line which sequence it is and what there is of it; `_asdict()` has every field."""
        there = f"{self.prompt_length} + {self.generated_length} tokens, {self.n_rows} rows"
        return (
            f"SequenceRecord({self.task_id!r} test {self.test_index} {self.augmentation} sample "
            f"{self.sample_index}: {self.failure if self.failed else there}, {self.finish_reason}, "
            f"key {self.key!r})"
        )

    @property
    def path(self) -> str:
        """The shard's name below the store's directory."""
        return f"{host_name(self.host)}/{self.shard}"

    @property
    def prompt_rows(self) -> int:
        """How many of the rows belong to prompt tokens: 0, or the prompt's length."""
        return self.n_rows - self.generated_length if self.n_rows else 0

    @property
    def label(self) -> str:
        """The sequence's name in messages."""
        return (
            f"task {self.task_id} test {self.test_index} {self.augmentation} sample {self.sample_index} "
            f"({self.key[:8]})"
        )

    @property
    def failed(self) -> bool:
        """Whether the sequence was not finite, so that nothing of it is stored."""
        return self.finish_reason == "failed"


def canonical_json(value: Any) -> str:
    """Returns the one JSON text of a value: sorted keys, no spaces; raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sequence_key(settings: StoreSettings, sequence_id: SequenceId) -> str:
    """Returns the key that a resumed run compares: 32 hex digits over the settings, the prompt and the name.

    Task id, test and sample index and augmentation are part of it, so two tasks with one prompt differ.
    """
    name = [
        sequence_id.task_id,
        sequence_id.test_index,
        sequence_id.sample_index,
        sequence_id.augmentation,
    ]
    digest = hashlib.sha256(canonical_json([settings.to_json(), name]).encode())
    digest.update(np.asarray(sequence_id.prompt_token_ids, dtype="<i4").tobytes())
    return digest.hexdigest()[:32]


def encode_manifest(settings: StoreSettings, provenance: Mapping[str, Any]) -> bytes:
    """Returns the manifest's text; raises ValueError where `provenance` is not JSON."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings.to_json(),
        "provenance": dict(provenance),
    }
    return (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()


def decode_manifest(data: bytes, where: str) -> tuple[StoreSettings, dict[str, Any]]:
    """Returns (settings, provenance); raises StoreError for a damaged text or another schema version."""
    try:
        manifest = json.loads(data)
        version, settings, provenance = (
            manifest[key] for key in ("schema_version", "settings", "provenance")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{where} is damaged: it is not the JSON of a store's manifest") from error
    if version != SCHEMA_VERSION:
        raise StoreError(f"{where} has schema version {version}; this program reads version {SCHEMA_VERSION}")
    return StoreSettings.from_json(settings), provenance


# Key and shard come first and have a fixed width, so that opening an index need not parse whole lines.
KEY_SLICE = slice(8, 40)
_LINE_FIELDS = SequenceRecord._fields[:-1]
_DECODER = json.JSONDecoder()


def encode_line(record: SequenceRecord) -> bytes:
    """Returns the record's index line, newline included."""
    values = dict(zip(_LINE_FIELDS, record, strict=False))
    return (json.dumps(values, separators=(",", ":"), allow_nan=False) + "\n").encode()


def line_key(line: bytes) -> bytes | None:
    """Returns the 16 bytes of a line's key without parsing the rest; None for what is no index line."""
    if not (line.startswith(b'{"key":"') and line.endswith(b"}")):
        return None
    try:
        return bytes.fromhex(line[KEY_SLICE].decode())
    except ValueError:
        return None


def decode_line(line: bytes, host: int) -> SequenceRecord:
    """Returns the record of an index line, with or without its newline; StoreError when it is not one."""
    try:
        text = line.decode()
        values, end = _DECODER.raw_decode(text)  # not json.loads, which is twice as slow on bytes
        if text[end:] not in ("", "\n"):
            raise ValueError("something follows the object")
        if tuple(values) == _LINE_FIELDS:
            return SequenceRecord._make([*values.values(), host])
        return SequenceRecord(host=host, **values)
    except (ValueError, TypeError) as error:
        raise StoreError(f"an index line of {host_name(host)} is damaged: {line[:80]!r}") from error
