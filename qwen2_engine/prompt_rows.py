"""Says in which row of the KV cache each prompt lies, so that slots which continue one prompt share a row.

There are as many rows as slots. So a prompt that comes to a free slot always finds a row that no slot in use
reads.
"""

from __future__ import annotations

from collections.abc import Collection


class PromptRows:
    """The rows for prompts of one group of devices, none of which holds a prompt at first."""

    def __init__(self, rows: int) -> None:
        self._keys: list[bytes | None] = [None] * rows

    def place(self, key: bytes, in_use: Collection[int]) -> tuple[int, bool]:
        """Returns the row for a prompt, and whether the prompt lies there already.

        If it does not, it must be written there, in place of what no sequence reads any more.

        Args:
            key: decides what is read of the prompt (``prompt_reading.prompt_key``).
            in_use: the rows that slots in use read; not all rows.
        """
        if key in self._keys:
            return self._keys.index(key), True
        row = next(row for row in range(len(self._keys)) if row not in in_use)
        self._keys[row] = key
        return row, False
