"""What an activation store holds: settings, sequences, their keys, the manifest and the index lines.

```
DIRECTORY/
  manifest.json                        StoreSettings (must be equal to continue) and provenance (may differ)
  interventions.safetensors            what was written into the model, if anything was (interventions.py)
  host-00000.json                      what decides the last bits of host 0's sequences (host_files.py)
  host-00000/index.jsonl               one SequenceRecord per line
  host-00000/shard-000000.safetensors  the rows of one batch (layout: shard.py)
```
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, NamedTuple, get_type_hints

import ml_dtypes
import msgspec
import numpy as np

from activation_store import schema
from activation_store.checked_json import canonical_json, seal_line, unseal_line
from activation_store.hook_labels import hook_label, hooks_text
from activation_store.schema import (
    Count,
    Finite,
    Key,
    Length,
    Name,
    Nanoseconds,
    OptionalNumerics,
    OptionalSha256,
    Sentence,
    Width,
)
from qwen2_core.hook_points import RESID_POST, parse_name

MANIFEST = "manifest.json"
INTERVENTIONS = "interventions.safetensors"
LINE_BYTES = 1 << 17  # no index line is longer
ROW_BYTES = 17  # of a row's columns in a shard, whatever its hooks take
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# "imported": rows taken over from another code base, whose tokens are not known.
FinishReason = Annotated[str, msgspec.Meta(pattern=r"\A(?:stop|length|failed|imported)\Z")]

# Exactly the names that the functions below give: no other digits, no second spelling of a number.
_SHARD = re.compile(r"shard-([0-9]{6}|[1-9][0-9]{6,11})\.safetensors")
_HOST = re.compile(r"host-([0-9]{5}|[1-9][0-9]{5,8})")
Strengths = Annotated[tuple[Finite, ...], msgspec.Meta(max_length=1024)]
OptionalShardName = Annotated[str, msgspec.Meta(pattern=rf"\A(?:{_SHARD.pattern})?\Z")]


class StoreError(ValueError):
    """Says in one sentence why a store cannot be opened, continued or read as asked."""


class StoreUsageError(StoreError):
    """Says why what is asked for cannot be had, however sound the store is."""


class StoreWriteError(StoreError):
    """Says why writing failed (disk full, permission lost, ...); what was committed before is safe."""


def hook_name(layer: int) -> str:
    """Returns the name of decoder block `layer`'s output: `hook_name(10) == "blocks.10.hook_resid_post"`.

    Those of other points are given by `qwen2_core.hook_points.full_name`.
    """
    return f"blocks.{layer}.{RESID_POST}"


def hook_layer(name: str) -> int:
    """Returns the layer in the name of a block's output; raises StoreError for any other name."""
    try:
        label = hook_label(name)
    except ValueError:
        label = None
    if not isinstance(label, int):
        raise StoreError(f"{name!r} is not a hook name of the form blocks.<layer>.{RESID_POST}")
    return label


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


@dataclass(frozen=True)
class StoreSettings:
    """Everything that decides the stored bytes: a directory is continued only under equal settings.

    `widths` may name every point that is stored; those as wide as `hidden_size` are left out of it. A setting
    that is empty by default is not in the manifest and in no key, so that both are as they were without it.

    Raises:
        StoreError: a value of a type, or a dtype, width or hook name, that no store can have.
    """

    model_fingerprint: Name  # sha256 hex over weights and config
    hook_names: tuple[Name, ...]  # ("blocks.10.hook_resid_post", ...); () when capture is off
    hidden_size: Width  # of a row, but for the points in `widths`
    dtype: Name  # "float32" | "bfloat16" | "float16"
    capture_prompt: bool
    max_output_tokens: Length  # 0: the sequences are prompts, of which nothing was generated
    sampling: dict[Name, Finite]  # temperature, top_k, top_p; min_p, repetition_penalty where in use
    seed: Count
    eos_token_ids: tuple[Length, ...]
    tokenizer_sha256: Name
    prompt: dict[Name, Name]  # grid_encoder, prompt_version
    widths: dict[Name, Width] = field(default_factory=dict)  # {"mlp.hook_post": 4864}
    interventions: OptionalSha256 = ""  # of INTERVENTIONS: what was written into the model; "" for nothing
    capture_before: bool = False  # rows are those before interventions at their own point, not after
    residual_dtype: Name = ""  # of the model's residual stream; "" for that of the rows

    def __post_init__(self) -> None:
        try:
            schema.checked({name: _plain(value) for name, value in vars(self).items()}, _SETTINGS_FORM)
        except ValueError as error:
            raise StoreError(f"a store cannot have these settings ({error})") from error
        if not self.max_output_tokens and not (self.capture_prompt and self.hook_names):
            raise StoreError("a store of sequences without generated tokens captures the rows of prompts")
        if self.dtype not in DTYPES:
            raise StoreError(
                f"activations cannot be stored as {self.dtype!r}: choose one of {', '.join(DTYPES)}"
            )
        try:
            points = {parse_name(name)[0] for name in self.hook_names}
        except ValueError as error:
            raise StoreError(str(error)) from error
        if len(set(self.hook_names)) != len(self.hook_names):
            raise StoreError(f"a hook name is given twice: {', '.join(self.hook_names)}")
        widths = {point: int(width) for point, width in self.widths.items() if width != self.hidden_size}
        for point in self.widths:
            if point not in points or (point == RESID_POST and widths.get(point)):
                raise StoreError(
                    f"a store of {hooks_text(self.hook_names)}, with hidden_size {self.hidden_size}, "
                    f"cannot have a width {self.widths[point]} of {point!r}"
                )
        if self.capture_before and not self.interventions:
            raise StoreError("capture_before says nothing where there are no interventions: leave it out")
        if self.residual_dtype not in ("", "float32", self.dtype):
            raise StoreError(
                f"residual_dtype {self.residual_dtype!r} is neither float32 nor the rows' {self.dtype}"
            )
        object.__setattr__(self, "widths", dict(sorted(widths.items())))
        if self.residual_dtype == self.dtype:
            object.__setattr__(self, "residual_dtype", "")

    def __repr__(self) -> str:
        """Says in a line what is stored; `to_json()` has every setting."""
        width = "" if self.widths else f" of width {self.hidden_size}"
        steered = f", interventions {self.interventions[:8]!r}" if self.interventions else ""
        return (
            f"StoreSettings(model {self.model_fingerprint[:8]!r}, {hooks_text(self.hook_names)}{width} "
            f"in {self.dtype}, {'with' if self.capture_prompt else 'without'} prompts, "
            f"up to {self.max_output_tokens} tokens, sampling {self.sampling}, seed {self.seed}{steered})"
        )

    @property
    def least_tokens(self) -> int:
        """How many tokens a sequence has at least that were generated."""
        return min(1, self.max_output_tokens)

    @functools.cached_property
    def hook_widths(self) -> dict[str, int]:
        """How many values a row of each hook has; the hooks are in their order."""
        return {name: self.widths.get(parse_name(name)[0], self.hidden_size) for name in self.hook_names}

    @functools.cached_property
    def hooks_by_point(self) -> dict[str, list[str]]:
        """The hooks of each point, in their order: their rows are handed over as one stacked array."""
        found: dict[str, list[str]] = {}
        for name in self.hook_names:
            found.setdefault(parse_name(name)[0], []).append(name)
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values; sampling values are floats, so that 0 and 0.0 are the same setting."""
        values = asdict(self)
        values["hook_names"] = list(self.hook_names)
        values["eos_token_ids"] = sorted(int(token) for token in self.eos_token_ids)
        values["sampling"] = {name: float(value) for name, value in self.sampling.items()}
        for name in _LEFT_OUT:
            if not values[name]:
                del values[name]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StoreSettings":
        """Returns the settings that `to_json` gave; raises StoreError for any other values."""
        expected = {field.name for field in fields(cls)}
        left_out = {name for name in _LEFT_OUT if name not in values}
        if odd := set(values) ^ (expected - left_out):
            names = ", ".join(sorted(odd))
            raise StoreError(f"settings do not have the fields of this program: {names}")
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        settings = cls(**plain)
        for name in _LEFT_OUT - left_out:  # one form only: the keys are made of it
            if not values[name] or values[name] != getattr(settings, name):
                raise StoreError(f"{name} has values that this program leaves out: {values[name]!r:.200}")
        return settings

    def differences(self, asked: "StoreSettings") -> list[str]:
        """Returns one phrase per field in which `asked` differs from these settings; [] for equal ones."""
        mine, theirs = self.to_json(), asked.to_json()

        def shown(value: Any) -> str:
            return "nothing" if value is None else json.dumps(value)

        return [
            f"{name} is {shown(mine.get(name))} there and {shown(theirs.get(name))} here"
            for name in mine | theirs
            if mine.get(name) != theirs.get(name)
        ]


# Of the manifest and of keys, where they are empty.
_LEFT_OUT = frozenset({"widths", "interventions", "capture_before", "residual_dtype"})


@dataclass(frozen=True)
class SequenceId:
    """Names a sequence before it is generated: its puzzle, its sample and its prompt."""

    task_id: str
    test_index: int
    sample_index: int
    augmentation: str  # "identity" or the name of the transformation applied to the puzzle
    prompt_token_ids: np.ndarray  # int32 [prompt_length]
    # Of each intervention of the store, in the file's order; () for those that the file says.
    strengths: tuple[float, ...] = ()

    def __repr__(self) -> str:
        """Says in a line which sequence it is, without the prompt's tokens."""
        steered = f", strengths {list(self.strengths)}" if self.strengths else ""
        return (
            f"SequenceId({self.task_id!r} test {self.test_index} {self.augmentation} sample "
            f"{self.sample_index}, prompt of {len(self.prompt_token_ids)} tokens{steered})"
        )


@dataclass(frozen=True)
class FinishedSequence:
    """A generated sequence as handed to the writer; n generated tokens, EOS included.

    Row r of a layer belongs to the token that was read: prompt tokens first where they are captured,
    then generated token t at position `len(prompt) + t`. The layers of an array are in the order in which
    the settings' `hook_names` have them, and all arrays have the same number of rows.
    """

    id: SequenceId
    token_ids: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # float32 [n]
    finish_reason: str  # "stop" | "length"; "length" too where the settings allow no token
    # Of hook_resid_post: [layers, n or prompt_length + n, hidden], any strides; None where it is not stored.
    rows: np.ndarray | None
    key: str | None = None  # the sequence's key in a store of these settings, where it is known already
    points: Mapping[str, np.ndarray] = field(
        default_factory=dict
    )  # of each other point: [layers, rows, width]

    def __repr__(self) -> str:
        """Says in a line what there is, without the values."""
        rows = "no rows" if self.rows is None else f"rows {list(self.rows.shape)} in {self.rows.dtype}"
        points = "".join(f", {point} {list(of_point.shape)}" for point, of_point in self.points.items())
        of_tokens = f"{len(self.token_ids)} tokens ({self.finish_reason})"
        return f"FinishedSequence({self.id}, {of_tokens}, {rows}{points})"

    def rows_of(self, point: str) -> np.ndarray | None:
        """Returns the rows [layers, rows, width] of a point; None where there are none."""
        return self.rows if point == RESID_POST else self.points.get(point)


class SequenceRecord(NamedTuple):
    """What one index line says of a committed sequence.

    `host` is not in the line: it is the folder the line was found in.

    A failed sequence has `n_rows == 0`, no shard (`shard == ""`) and says in `failure` where it broke.
    """

    host: int
    key: Key
    shard: OptionalShardName
    task_id: Name
    test_index: Length
    sample_index: Length
    augmentation: Name
    seed: Count
    row_start: Length  # first row in the shard
    n_rows: Length
    prompt_start: Length  # first token in the shard's prompt_token_ids
    prompt_length: Length
    generated_length: Length
    finish_reason: FinishReason
    shard_bytes: Count
    shard_sha256: OptionalSha256
    shard_sequences: Length  # index lines of this shard: fewer of them means a torn commit
    shard_mtime_ns: Nanoseconds  # when it was written; a resume re-hashes only shards where this changed
    failure: Sentence | None
    numerics: OptionalNumerics = ""  # which of its host's made it (host_files.py); "" where not known
    strengths: Strengths = ()  # of the store's interventions (SequenceId)

    def __repr__(self) -> str:
        """Says in a line which sequence it is and what there is of it; `_asdict()` has every field."""
        there = f"{self.prompt_length} + {self.generated_length} tokens, {self.n_rows} rows"
        return (
            f"SequenceRecord({self.task_id!r} test {self.test_index} {self.augmentation} sample "
            f"{self.sample_index}: {self.failure if self.failed else there}, {self.finish_reason}, "
            f"key {self.key!r})"
        )

    def identity(self, prompt_token_ids: np.ndarray) -> SequenceId:
        """Returns the sequence's name with a prompt, int32 [prompt_length]."""
        return SequenceId(
            self.task_id,
            self.test_index,
            self.sample_index,
            self.augmentation,
            prompt_token_ids,
            self.strengths,
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


def sequence_key(settings: StoreSettings, sequence_id: SequenceId) -> str:
    """Returns the key that a resumed run compares: 32 hex digits over the settings, the prompt and the name.

    Task id, test and sample index and augmentation are part of it, so two tasks with one prompt differ; so
    are strengths, where there are any.

    Raises:
        StoreError: the name is none that an index line can hold.
    """
    name = [
        sequence_id.task_id,
        sequence_id.test_index,
        sequence_id.sample_index,
        sequence_id.augmentation,
    ]
    try:
        schema.checked(name, tuple[Name, Length, Length, Name])
        if sequence_id.strengths:
            name.append(list(map(float, schema.checked(_plain(sequence_id.strengths), Strengths))))
    except ValueError as error:
        raise StoreError(f"a sequence cannot be stored as {str(name)[:200]} ({error})") from error
    digest = hashlib.sha256(canonical_json([settings.to_json(), name]).encode())
    digest.update(np.asarray(sequence_id.prompt_token_ids, dtype="<i4").tobytes())
    return digest.hexdigest()[:32]


# Key and shard come first and have a fixed width, so that opening an index need not parse whole lines.
KEY_SLICE = slice(8, 40)
_LINE_FIELDS = SequenceRecord._fields[1:]  # all but `host`
_LINE_FORM = schema.form(
    "index line",
    {name: get_type_hints(SequenceRecord, include_extras=True)[name] for name in _LINE_FIELDS},
    SequenceRecord._field_defaults,
)
_DECODER = msgspec.json.Decoder(_LINE_FORM)
_SETTINGS_FORM = schema.form("settings", get_type_hints(StoreSettings, include_extras=True), {})


def encode_line(record: SequenceRecord) -> bytes:
    """Returns the record's index line, with its checksum and newline.

    Raises:
        StoreError: `decode_line` would refuse it.
    """
    values = dict(zip(_LINE_FIELDS, record[1:], strict=True))
    if not record.strengths:  # as before there were any
        del values["strengths"]
    line = seal_line(json.dumps(values, separators=(",", ":"), allow_nan=False).encode()) + b"\n"
    decode_line(line, record.host)
    return line


def line_key(line: bytes) -> bytes | None:
    """Returns the 16 bytes of a line's key without parsing the rest; None for what is no index line."""
    if not (line.startswith(b'{"key":"') and line.endswith(b"}") and len(line) <= LINE_BYTES):
        return None
    try:
        key = bytes.fromhex(line[KEY_SLICE].decode())
    except ValueError:
        return None
    return key if len(key) == 16 else None


def decode_line(line: bytes, host: int) -> SequenceRecord:
    """Returns the record of an index line, with or without its newline; StoreError when it is not one.

    What it returns is of the right types, within range and without contradiction: `shard` is a name in the
    host's folder, and the rows fit into `shard_bytes`. Lines of the manifest's schema version 1, which have
    neither checksum nor `numerics`, are read too.
    """
    try:
        text = unseal_line(line.removesuffix(b"\n"))
        key = line_key(text)
        if key is None:
            raise ValueError(f"it begins with {line[:80]!r}")
        record = SequenceRecord(host, *msgspec.structs.astuple(_DECODER.decode(unseal_line(text))))
        if bytes.fromhex(record.key) != key:
            raise ValueError("its key is given twice")
        _check_consistency(record)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"not an index line ({schema.reason(error)})") from error
    return record


def _check_consistency(record: SequenceRecord) -> None:
    """Raises ValueError where the fields of an index line contradict each other."""
    if record.failed:
        if record.shard or record.failure is None or record.n_rows:
            raise ValueError("a failed sequence has no shard, has no rows and says why")
        return
    if not record.shard or not record.shard_sha256 or record.failure is not None:
        raise ValueError("a sequence that has not failed has a shard and its checksum, and no failure")
    generated = record.generated_length
    if not max(1, generated) <= record.n_rows <= generated + record.prompt_length:
        raise ValueError(
            f"{record.n_rows} rows for {record.prompt_length} prompt and {generated} generated tokens"
        )
    needed = ROW_BYTES * (record.row_start + record.n_rows) + 4 * (record.prompt_start + record.prompt_length)
    if needed > record.shard_bytes:
        raise ValueError(f"its rows do not fit into a shard of {record.shard_bytes} bytes")


def _plain(value: Any) -> Any:
    """Returns numpy's numbers, also those in a tuple or dict, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return {name: _plain(of_name) for name, of_name in value.items()}
    return value
