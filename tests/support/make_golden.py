"""Writes tests/golden from Transformers on torch (the ``parity`` extra): ``python tests/make_golden.py``.

Torch's own sums differ in their last bits from run to run, and so may the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import safetensors.numpy
import torch
import transformers
from golden_cases import CASES, FOLDER, LENGTHS, LOGIT_STRIDE, STEPS, check_values
from lively import Lively, assert_lively
from torch_reference import TorchReference


def golden(lively: Lively) -> dict[str, np.ndarray]:
    """For each prompt: its greedy tokens, some logits, and the check values of every row."""
    reference = TorchReference(lively)
    tensors = {}
    prompts = lively.prompts(LENGTHS)
    generated = reference.greedy(prompts, STEPS)
    assert_lively(generated)
    for prompt, tokens in zip(prompts, generated, strict=True):
        n = len(prompt)
        (logits,), rows = reference.forward(np.concatenate([prompt, tokens])[None])
        np.testing.assert_array_equal(logits[n - 1 : -1].argmax(-1), tokens)
        tensors[f"{n}.tokens"] = tokens
        tensors[f"{n}.logits"] = np.ascontiguousarray(logits[n - 1 :: LOGIT_STRIDE])
        tensors[f"{n}.rows"] = check_values(rows[list(lively.extract), 0], lively).astype(np.float32)
    return tensors


if __name__ == "__main__":
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    FOLDER.mkdir(exist_ok=True)
    for name, lively in CASES.items():
        path = FOLDER / f"{name}.safetensors"
        safetensors.numpy.save_file(golden(lively), path, metadata=made_with)
        path.chmod(0o644)
        print(f"{path}: {path.stat().st_size} bytes")
