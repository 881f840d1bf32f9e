"""The file of ``--steer``: what a run writes into the model, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from activation_store.hook_labels import layers_text
from activation_store.interventions import MOST_BYTES
from arc_runner.errors import UsageError
from qwen2_core.intervention_files import decode_interventions, encode_interventions
from qwen2_core.interventions import Intervention
from qwen2_core.messages import did_you_mean
from qwen2_core.steering import steer
from qwen2_jax import QwenConfig


def read_steering(path: str) -> bytes:
    """Returns a file of interventions in the form that a store keeps: equal ones are equal bytes.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            raise UsageError(f"--steer: {path} is not a file; name a file of interventions")
        if file.stat().st_size > MOST_BYTES:
            raise UsageError(
                f"--steer: {path} has {file.stat().st_size} bytes, more than {MOST_BYTES}; name fewer layers "
                "or positions"
            )
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--steer: cannot read {path}: {error.strerror}{did_you_mean(file)}") from error
    try:
        return encode_interventions(decode_interventions(data, path))
    except ValueError as error:
        raise UsageError(f"--steer: {error}") from error


def interventions_of(data: bytes | None) -> list[Intervention]:
    """Returns the interventions of a file that ``read_steering`` has returned; none of None."""
    return [] if data is None else decode_interventions(data, "--steer")


def check_steering(data: bytes | None, config: QwenConfig) -> None:
    """Checks that interventions fit a model.

    Raises:
        UsageError: a layer, position or width that it does not have.
    """
    try:
        steer(interventions_of(data), config, None)
    except ValueError as error:
        raise UsageError(f"--steer: {error}") from error


def steering_lines(data: bytes | None) -> Iterator[str]:
    """Yields a phrase for each intervention: what is done where, and how strongly."""
    for one in interventions_of(data):
        layers = ()
        if one.layers is not True:
            layers = one.layers if isinstance(one.layers, tuple) else (one.layers,)
        several = "s" if len(layers) > 1 else ""
        where = "all layers" if one.layers is True else f"layer{several} {layers_text(layers)}"
        of_model = one.layers is None
        listed = "" if isinstance(one.positions, str) else "positions "
        positions = one.positions if isinstance(one.positions, str) else ", ".join(map(str, one.positions))
        yield (
            f"{type(one).__name__} at {one.point}{'' if of_model else f' of {where}'}, {listed}{positions}, "
            f"strength {one.strength:g}"
        )
