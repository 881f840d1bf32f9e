"""What loading the weights says."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from runner_cases import arguments, four

from arc_runner import loaded_model
from arc_runner.command_line import parse_options
from arc_runner.job import prepare
from arc_runner.loaded_model import LoadedModel


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about products on CPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bfloat16_without_the_cpu_kernel_is_said_with_the_reason(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(loaded_model, "unavailable_reason", lambda: "the reason")
    job, _ = prepare(parse_options(arguments(four(tmp_path), dtype=dtype)))
    LoadedModel.load(job)
    said = capsys.readouterr().out
    assert ("bfloat16 is multiplied by XLA" in said and "the reason" in said) == (dtype == "bfloat16")
