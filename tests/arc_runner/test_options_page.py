"""The tables of flags in docs/runner.md are those of --help."""

from __future__ import annotations

import re

import pytest
from runner_cases import REPOSITORY

from arc_runner.options import RunOptions
from arc_runner.options_page import fill

PAGE = REPOSITORY / "docs" / "runner.md"


def test_the_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert fill(page) == page, "python -m arc_runner.options_page docs/runner.md"


def test_the_page_has_every_flag_once():
    _, *parts = PAGE.read_text(encoding="utf-8").split("<!-- flags: ")
    tables = "".join(part.partition("<!-- end of flags -->")[0] for part in parts)
    flags = re.findall(r"^\| `--(\w+)[ `]", tables, re.MULTILINE)
    assert sorted(flags) == sorted([*RunOptions.__dataclass_fields__, "no_extract_activations"])


def test_a_table_is_replaced_and_the_rest_is_kept():
    page = "before\n<!-- flags: capture -->\n| old |\n<!-- end of flags -->\nafter\n"
    lines = fill(page).splitlines()
    assert lines[:4] == ["before", "<!-- flags: capture -->", "| flag | meaning | default |", "|---|---|---|"]
    assert lines[4].startswith("| `--layers_to_extract LAYER ...` | decoder blocks")
    assert lines[4].endswith(" | 10 to 23 |")
    assert "| `--extract_prompt` | store the rows of the prompts' tokens too | |" in lines
    assert lines[-2:] == ["<!-- end of flags -->", "after"]


def test_a_group_that_there_is_not_is_an_error():
    with pytest.raises(KeyError, match="captur"):
        fill("<!-- flags: captur -->\n<!-- end of flags -->\n")
