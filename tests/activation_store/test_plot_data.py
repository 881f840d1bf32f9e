"""What plots show: norms by position, components of rows, when shards were written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from activation_fakes import batch, sequence, settings

from activation_store import ActivationStore, ActivationWriter, FinishedSequence, StoreError, StoreSettings
from activation_store.plot_data import (
    column_starts,
    measure_norms,
    principal_components,
    project,
    sample_sequences,
    survey,
)

FLOAT32 = settings(dtype="float32")


def write(directory: Path, *batches: list[FinishedSequence], of: StoreSettings = FLOAT32) -> ActivationStore:
    with ActivationWriter(directory, of, provenance={}) as writer:
        for one in batches:
            writer.submit(one)
    return ActivationStore(directory)


def with_norms(one: FinishedSequence, norms: np.ndarray) -> FinishedSequence:
    """The sequence with rows of these norms [rows] in every layer."""
    assert one.rows is not None
    rows = one.rows / np.linalg.norm(one.rows, axis=2, keepdims=True) * norms[:, None]
    return dataclasses.replace(one, rows=rows.astype(np.float32))


@pytest.mark.parametrize("length", [0, 1, 16, 17, 100, 9_000])
def test_columns_cover_all_positions_and_the_first_ones_are_alone(length: int):
    starts = column_starts(length)
    assert (starts[0], starts[-1]) == (0, length)
    assert (np.diff(starts) > 0).all()
    assert len(starts) <= 49
    assert list(starts[:17]) == list(range(17))[: length + 1]


def test_norms_are_averaged_by_position_of_prompt_and_answer(tmp_path: Path):
    first, second = (sequence(task, of=FLOAT32, prompt=3, generated=2) for task in ("a", "b"))
    store = write(
        tmp_path / "store",
        [
            with_norms(first, np.array([1000, 10, 10, 7, 8])),
            with_norms(second, np.array([3000, 10, 20, 7, 9])),
        ],
    )
    norms = measure_norms(store, list(store.sequences()))
    assert norms.prompt is not None
    assert norms.generated is not None
    np.testing.assert_allclose(norms.prompt.means, [[2000, 10, 15]] * 3, rtol=1e-5)
    np.testing.assert_allclose(norms.generated.means, [[7, 8.5]] * 3, rtol=1e-5)
    assert {kind: mean[0] for kind, mean in norms.means.items()} == pytest.approx(
        {"first token of a prompt": 2000, "other tokens of a prompt": 12.5, "generated tokens": 7.75}
    )


def test_a_store_without_prompt_rows_has_norms_of_answers_alone(tmp_path: Path):
    of = settings(capture_prompt=False)
    store = write(tmp_path / "store", batch("a", of=of), of=of)
    norms = measure_norms(store, list(store.sequences()))
    assert norms.prompt is None
    assert list(norms.means) == ["generated tokens"]


def test_a_large_store_is_sampled_over_its_whole_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = write(tmp_path / "store", *(batch(f"t{number}") for number in range(9)), of=settings())
    found = survey(store)
    assert len(sample_sequences(store, found)) == 18
    monkeypatch.setattr("activation_store.plot_data.MOST_SHARDS", 3)
    tasks = [record.task_id for record in sample_sequences(store, found)]
    assert tasks == ["t0", "t0", "t4", "t4", "t8", "t8"]
    monkeypatch.setattr("activation_store.plot_data.MOST_NORM_ROWS", 30)
    assert 1 <= len(sample_sequences(store, found)) < 6


def test_a_survey_counts_what_each_shard_has(tmp_path: Path):
    bad = sequence("bad")
    assert bad.rows is not None
    bad.rows[0, 0, 0] = np.nan
    store = write(tmp_path / "store", batch("a"), [*batch("bb"), bad], of=settings())
    found = survey(store)
    assert [shard.sequences for shard in found.shards.values()] == [2, 2]
    assert [shard.tokens for shard in found.shards.values()] == [
        sum(record.generated_length for record in store.sequences(task_ids=task)) for task in ("a", "bb")
    ]
    assert found.failed == 1
    assert found.began is not None
    assert found.began <= min(shard.seconds for shard in found.shards.values())


def test_a_store_of_failures_has_nothing_to_show(tmp_path: Path):
    bad = sequence("bad")
    assert bad.rows is not None
    bad.rows[:] = np.inf
    with pytest.raises(StoreError, match="has no sequence that could be shown; 1 failed: run the main job"):
        survey(write(tmp_path / "store", [bad], of=settings()))


def test_components_tell_apart_what_lies_apart(tmp_path: Path):
    far = np.zeros(16, np.float32)
    far[3] = 100
    made = batch("a", "bb", of=FLOAT32)
    moved = []
    for one in made:
        assert one.rows is not None
        moved.append(dataclasses.replace(one, rows=one.rows + far * (one.id.task_id == "a")))
    store = write(tmp_path / "store", moved)
    records = list(store.sequences())
    outcomes = {record.key: record.task_id == "a" for record in records if record.sample_index == 0}
    found = principal_components(store, 11, records, outcomes)
    kinds = np.array(found.kinds)
    assert set(kinds) == {"solved", "not solved", "answer", "prompt"}
    solved, other = (found.points[kinds == kind, 0] for kind in ("solved", "not solved"))
    assert abs(solved.mean() - other.mean()) > 90
    assert found.explained[0] > 0.9


def test_the_first_token_of_a_prompt_is_no_point(tmp_path: Path):
    one = sequence("a", of=FLOAT32, prompt=3, generated=2)
    store = write(tmp_path / "store", [with_norms(one, np.array([1e6, 1, 1, 1, 1]))])
    found = principal_components(store, 10, list(store.sequences()), {})
    assert found.kinds == ["prompt", "prompt", "answer", "answer"]
    assert np.abs(found.points).max() < 3


def test_points_are_drawn_from_all_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("activation_store.plot_data.MOST_POINTS", 20)
    store = write(tmp_path / "store", batch("a", "bb", "ccc", of=FLOAT32))
    found = principal_components(store, 10, list(store.sequences()), {})
    assert sorted(found.kinds) == ["answer"] * 10 + ["prompt"] * 10


def test_rows_that_lie_on_a_line_have_one_component():
    points, explained = project(np.outer([0.0, 1.0, 3.0], [3.0, 4.0]))
    assert explained == pytest.approx((1, 0), abs=1e-9)
    np.testing.assert_allclose(np.abs(np.diff(points[:, 0])), [5, 10])
    assert project(np.ones((3, 1)))[1] == (0, 0)
