"""Deterministic made-up sequences for the tests of the activation store."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from activation_store import ActivationWriter, FinishedSequence, SequenceId, StoreSettings, hook_name
from activation_store.checked_json import seal_line, unseal_line
from activation_store.format import DTYPES
from qwen2_core.hook_points import RESID_POST

EOS = 5
SETTINGS = StoreSettings(
    model_fingerprint="ab" * 32,
    hook_names=tuple(hook_name(layer) for layer in (10, 11, 12)),
    hidden_size=16,
    dtype="bfloat16",
    capture_prompt=True,
    max_output_tokens=12,
    sampling={"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    seed=7,
    eos_token_ids=(EOS,),
    tokenizer_sha256="cd" * 32,
    prompt={"grid_encoder": "minimal", "prompt_version": "1"},
)


# Some layers each of every kind of point, with four widths.
HOOKS = (
    *(f"blocks.{layer}.hook_resid_{place}" for layer in (10, 11) for place in ("pre", "mid", "post")),
    *(f"blocks.12.{point}" for point in ("hook_attn_out", "hook_mlp_out", "mlp.hook_post")),
    *(f"blocks.{layer}.attn.hook_{name}" for name in "kvqz" for layer in (11, 9)),
    *(f"blocks.0.{norm}.hook_normalized" for norm in ("ln1", "ln2")),
    "ln_final.hook_normalized",
)
WIDTHS = {"mlp.hook_post": 24, "attn.hook_k": 4, "attn.hook_v": 4, "attn.hook_q": 16, "attn.hook_z": 16}


def settings(**changes: Any) -> StoreSettings:
    return dataclasses.replace(SETTINGS, **changes)


def sequence(
    task: str, sample: int = 0, *, of: StoreSettings = SETTINGS, prompt: int = 4, generated: int = 6
) -> FinishedSequence:
    """A sequence whose every value follows from its task, sample and the settings."""
    rng = np.random.default_rng(zlib.crc32(f"{task} {sample}".encode()))
    prompt_rng = np.random.default_rng(zlib.crc32(task.encode()))
    tokens = rng.integers(10, 500, generated).astype(np.int32)
    if generated < of.max_output_tokens:
        tokens[-1] = EOS
    n_rows = generated + (prompt if of.capture_prompt and sample == 0 else 0)
    points = {
        point: rng.standard_normal((len(hooks), n_rows, of.hook_widths[hooks[0]])).astype(DTYPES[of.dtype])
        for point, hooks in of.hooks_by_point.items()
    }
    return FinishedSequence(
        SequenceId(task, 0, sample, "identity", prompt_rng.integers(10, 500, prompt).astype(np.int32)),
        tokens,
        -rng.random(generated).astype(np.float32),
        "stop" if generated < of.max_output_tokens else "length",
        points.pop(RESID_POST, None),
        points=points,
    )


def batch(*tasks: str, samples: int = 2, of: StoreSettings = SETTINGS) -> list[FinishedSequence]:
    return [
        sequence(
            task, sample, of=of, prompt=3 + len(task), generated=4 + (zlib.crc32(task.encode()) + sample) % 9
        )
        for task in tasks
        for sample in range(samples)
    ]


def read_index(directory: Path, host: int = 0) -> list[dict[str, Any]]:
    """The index lines of a host, without their checksums."""
    lines = (directory / f"host-{host:05d}" / "index.jsonl").read_bytes().splitlines()
    return [json.loads(unseal_line(line)) for line in lines]


def write_index(directory: Path, lines: list[dict[str, Any]], host: int = 0) -> None:
    """Writes index lines with checksums that fit, whatever they say."""
    sealed = (seal_line(json.dumps(line, separators=(",", ":")).encode()) + b"\n" for line in lines)
    (directory / f"host-{host:05d}" / "index.jsonl").write_bytes(b"".join(sealed))


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the tensors of the first shard and makes its size and checksum fit again."""
    path = directory / "host-00000" / "shard-000000.safetensors"
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load_file(path).items()}
    change(tensors)
    data = safetensors.numpy.save({name: np.ascontiguousarray(t) for name, t in tensors.items()})
    path.write_bytes(data)
    lines = read_index(directory)
    for line in lines:
        if line["shard"] == path.name:
            line |= {"shard_bytes": len(data), "shard_sha256": hashlib.sha256(data).hexdigest()}
    write_index(directory, lines)


def make_two_shards(directory: Path) -> Path:
    """Makes a sound store of two shards: two tasks, and one."""
    with ActivationWriter(directory, SETTINGS, provenance={"jax": "1.2"}) as writer:
        writer.submit(batch("a", "bb"))
        writer.submit(batch("ccc"))
    return directory
