"""The error that a checkpoint which cannot be used is refused with."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""
