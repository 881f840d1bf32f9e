"""The bytes of a shard: where every row lies, and norms and statistics as sums over blocks of 256 rows."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from activation_fakes import sequence, settings

from activation_store import FinishedSequence, SequenceId, StoreSettings
from activation_store.format import DTYPES
from activation_store.packing import PackedBatch, pack_batch

HIDDEN = 48
EVEN = ((300, 500), (8, 2), (70, 260), (514, 256))  # prompt and generated tokens of each sequence
ODD = ((300, 500), (7, 1), (71, 259), (513, 257))
Values = Callable[[int, tuple[int, ...]], np.ndarray]


def mixed_batch(
    of: StoreSettings, lengths: Sequence[tuple[int, int]], values: Values
) -> list[FinishedSequence]:
    """Sequences with and without prompt rows, whose rows lie in memory in four ways."""
    sequences = []
    for number, (prompt, generated) in enumerate(lengths):
        captured = prompt if of.capture_prompt and number != 2 else 0
        shape = (len(of.hook_names), captured + generated, HIDDEN)
        rows = values(number, shape).astype(DTYPES[of.dtype])
        if number == 1:  # every other row of a larger array
            wide = np.zeros((shape[0], 2 * shape[1], HIDDEN), rows.dtype)
            wide[:, ::2] = rows
            rows = wide[:, ::2]
        elif number == 2:  # one sequence of [layers, steps, batch, hidden], as the engine hands it over
            rows = np.stack([rows, -rows, rows], axis=2)[:, :, 1]
        elif number == 3:  # columns in reverse
            rows = np.ascontiguousarray(rows[..., ::-1])[..., ::-1]
        sequences.append(
            FinishedSequence(
                SequenceId(
                    f"task{number}", 0, number, "identity", np.arange(prompt, dtype=np.int32) + number
                ),
                np.arange(generated, dtype=np.int32) * 3 + number,
                -(np.arange(generated) % 17).astype(np.float32) / 8,
                "length",
                rows,
            )
        )
    return sequences


def whole_numbers(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Small whole numbers in pairs of c + x and c - x, of which every sum is exact on every machine."""
    pairs = (shape[0], shape[1] // 2, shape[2])
    # Raw numbers of a generator, which numpy promises never to change.
    x = 1 + (np.random.PCG64(seed).random_raw(math.prod(pairs)) % 3).astype(np.int64).reshape(pairs)
    return np.stack([2 + x, 2 - x], axis=2).reshape(shape)


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Values of which every sum is rounded, so that another order of adding gives other bytes."""
    return np.random.default_rng(seed).standard_normal(shape) * 3 + 1


def file_bytes(packed: PackedBatch) -> bytes:
    return b"".join(packed.chunks())


@pytest.mark.parametrize(
    ("dtype", "capture_prompt", "sha256"),
    [
        ("bfloat16", True, "52295e3219f1ee6be6a67eb23498a4c79b3b42db7cfc79a5a583c8644bb044d0"),
        ("float32", True, "8aab96810081d316e996a09195f9daef6f4096c454417d7de91741f55baf06c3"),
        ("bfloat16", False, "dc35c8d1fbe61b0f5cb4f5c3090f30594363d1c5f0d8201979173c852592ff65"),
    ],
)
def test_the_bytes_of_a_mixed_batch_are_those_of_the_first_release(
    dtype: str, capture_prompt: bool, sha256: str
):
    of = settings(dtype=dtype, hidden_size=HIDDEN, capture_prompt=capture_prompt, max_output_tokens=500)
    data = file_bytes(pack_batch(of, mixed_batch(of, EVEN, whole_numbers)))
    assert hashlib.sha256(data).hexdigest() == sha256


def measured_end_to_end(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Norms of rows that lie end to end in one array, and their mean, variance and mean norm, by blocks."""
    count, norm_sum = 0, 0.0
    mean, squared = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    norms = []
    for start in range(0, len(rows), 256):
        block = rows[start : start + 256].astype(np.float32)
        norms.append(np.sqrt(np.einsum("ij,ij->i", block, block)))
        norm_sum += float(norms[-1].sum(dtype=np.float64))
        of_block = block.mean(axis=0, dtype=np.float64)
        block -= of_block.astype(np.float32)
        step, total = of_block - mean, count + len(block)
        mean = mean + step * (len(block) / total)
        deviation = np.einsum("ij,ij->j", block, block).astype(np.float64)
        squared = squared + deviation + step * step * (count * len(block) / total)
        count = total
    return np.concatenate(norms), mean, squared / count, np.array(norm_sum / count)


@pytest.mark.parametrize("capture_prompt", [True, False])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_rows_are_measured_in_blocks_of_256_over_the_sequences_end_to_end(
    tmp_path: Path, dtype: str, capture_prompt: bool
):
    of = settings(dtype=dtype, hidden_size=HIDDEN, capture_prompt=capture_prompt, max_output_tokens=500)
    batch = mixed_batch(of, ODD, normal)
    (tmp_path / "shard").write_bytes(file_bytes(pack_batch(of, batch)))
    tensors = safetensors.numpy.load_file(tmp_path / "shard")
    generated = tensors["is_generated"].astype(bool)
    for layer, hook in enumerate(of.hook_names):
        rows = np.concatenate(
            [np.ascontiguousarray(one.rows[layer]) for one in batch if one.rows is not None]
        )
        assert tensors[hook].tobytes() == rows.tobytes()
        for group, mask in (("generated", generated), ("prompt", ~generated)):
            assert (f"statistics.{group}.mean" in tensors) == mask.any()
            if mask.any():
                norms, *expected = measured_end_to_end(rows[mask])
                assert tensors["norms"][layer, mask].tobytes() == norms.tobytes()
                for name, value in zip(("mean", "variance", "norm"), expected, strict=True):
                    found = tensors[f"statistics.{group}.{name}"][layer]
                    assert found.tobytes() == value.astype(np.float32).tobytes()


@pytest.mark.parametrize("capture_prompt", [True, False])
def test_the_bytes_do_not_depend_on_how_rows_lie_in_memory(capture_prompt: bool):
    of = settings(hidden_size=HIDDEN, capture_prompt=capture_prompt, max_output_tokens=500)
    batch = mixed_batch(of, ODD, normal)
    plain = [dataclasses.replace(one, rows=np.ascontiguousarray(one.rows)) for one in batch]
    by_column = [dataclasses.replace(one, rows=np.asfortranarray(one.rows)) for one in batch]
    expected = file_bytes(pack_batch(of, plain))
    assert file_bytes(pack_batch(of, batch)) == expected
    assert file_bytes(pack_batch(of, by_column)) == expected


def test_rows_are_written_from_the_arrays_they_came_in():
    of = settings(hidden_size=HIDDEN, max_output_tokens=500)
    batch = [sequence("a", of=of), sequence("bb", of=of)]
    buffers = [np.frombuffer(chunk, np.uint8) for chunk in pack_batch(of, batch).chunks()]
    for one in batch:
        assert one.rows is not None
        assert sum(np.shares_memory(one.rows, buffer) for buffer in buffers) == len(of.hook_names)
