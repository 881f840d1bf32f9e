"""One report of several processes: their figures are left in the store, and added up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from activation_store.local_files import write_atomic
from arc_runner.cluster.figures import (
    figures_of,
    forget_figures,
    gather_figures,
    leave_figures,
    merge_figures,
)
from arc_runner.report import Report

WHERE = ("directory", "url")


def store(tmp_path: Path, where: str, hosts: int = 3) -> str:
    """A store with host folders, as writers make them."""
    if where == "url":
        return f"memory:/{tmp_path}"
    for host in range(hosts):
        (tmp_path / f"host-{host:05d}").mkdir()
    return str(tmp_path)


def of_process(index: int, tokens: int, made_at: str = "") -> dict[str, object]:
    return figures_of(Report("m", "cpu", tokens_generated=tokens, made_at=made_at), index, 2)


@pytest.mark.parametrize("where", WHERE)
def test_figures_are_found_until_they_are_forgotten(where: str, tmp_path: Path):
    directory = store(tmp_path, where)
    assert gather_figures(directory) == []
    for index in (2, 0):
        leave_figures(directory, of_process(index, 5))
    assert [one["process"] for one in gather_figures(directory)] == [0, 2]
    assert [one["process"] for one in gather_figures(directory, count=2)] == [0]
    leave_figures(directory, of_process(2, 7))
    assert [one["tokens_generated"] for one in gather_figures(directory)] == [5, 7]
    forget_figures(directory, 2)
    forget_figures(directory, 1)  # which has left none
    assert [one["process"] for one in gather_figures(directory)] == [0]


DAMAGED = [b"", b"{", b"[1]", b"null", b"[" * 100_000, b"\xff", b'{"process": 1}']


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_figures_are_left_out_with_a_warning(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
):
    directory = store(tmp_path, "directory")
    leave_figures(directory, of_process(0, 5))
    write_atomic(tmp_path / "host-00001" / "figures.json", [data])
    assert [figures["process"] for figures in gather_figures(directory)] == [0]
    assert "host-00001/figures.json are damaged; the report is without them" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("process", 0), ("sequences_made", "2"), ("tokens_generated", 1.5), ("made_at", None), ("device", 3)],
)
def test_figures_of_another_form_are_left_out(tmp_path: Path, name: str, value: object):
    directory = store(tmp_path, "directory")
    changed = of_process(1, 5) | {name: value}
    write_atomic(tmp_path / "host-00001" / "figures.json", [json.dumps(changed).encode()])
    assert gather_figures(directory) == []


def test_the_merged_figures_have_the_time_of_the_last_process():
    figures = [
        of_process(i, 5, made_at) for i, made_at in enumerate(("2026-01-02 03:04:09", "2026-01-02 03:04:05"))
    ]
    report = Report("m", "cpu")
    merge_figures(report, figures)
    assert (report.made_at, report.tokens_generated) == ("2026-01-02 03:04:09", 10)
    assert [(one["process"], one["sequences_made"]) for one in report.processes] == [(0, 2), (1, 2)]
