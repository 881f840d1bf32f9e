"""Where prompts lie: those of one text in one row, and no row is given away that a slot reads."""

from __future__ import annotations

import numpy as np

from qwen2_engine.prompt_rows import PromptRows


def test_a_prompt_is_written_once_and_found_by_all_others_of_its_text():
    rows = PromptRows(3)
    assert rows.place(b"a", ()) == (0, False)
    assert rows.place(b"a", {0}) == (0, True)
    assert rows.place(b"b", {0}) == (1, False)
    assert rows.place(b"a", {0, 1}) == (0, True)


def test_a_prompt_stays_where_it_is_until_its_row_is_needed():
    rows = PromptRows(2)
    rows.place(b"a", ())
    rows.place(b"b", {0})
    assert rows.place(b"a", {1}) == (0, True)
    assert rows.place(b"c", {1}) == (0, False)
    assert rows.place(b"a", {0}) == (1, False)


def test_every_prompt_finds_a_row_and_none_that_is_read_is_written_over():
    """Random prompts in eight slots, of which some end: what a slot reads is its own prompt, always."""
    rng, rows, written = np.random.default_rng(0), PromptRows(8), {}
    slots: list[tuple[bytes, int] | None] = [None] * 8
    found = 0
    for _ in range(2000):
        slot = int(rng.integers(8))
        slots[slot] = None
        key = bytes([rng.integers(12)])
        row, there = rows.place(key, {taken[1] for taken in slots if taken})
        if not there:
            written[row] = key
        slots[slot] = key, row
        found += there
        assert all(written[taken[1]] == taken[0] for taken in slots if taken)
    assert 200 < found < 1800
