"""A store of every kind of point, with rows of four widths, is read by the points' names like any other."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from activation_fakes import HOOKS, SETTINGS, WIDTHS, batch, read_index, rewrite, sequence, settings

from activation_store import (
    ActivationStore,
    ActivationWriter,
    FinishedSequence,
    RowFilter,
    ShuffledBatches,
    StoreError,
    StoreSettings,
    drop_sequences,
    export_saelens,
    sequence_key,
    verify_store,
)
from activation_store.__main__ import main
from activation_store.manifest import decode_manifest, encode_manifest
from activation_store.packing import pack_batch
from qwen2_core.hook_points import RESID_POST, parse_name, point_names

OF = settings(hook_names=HOOKS, widths=WIDTHS)
WIDE = "blocks.12.mlp.hook_post"
NARROW = "blocks.9.attn.hook_k"
LAST = "ln_final.hook_normalized"


@pytest.fixture(scope="module")
def made() -> list[FinishedSequence]:
    return batch("a", "bb", "ccc", of=OF)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, made: list[FinishedSequence]) -> ActivationStore:
    directory = tmp_path_factory.mktemp("points")
    with ActivationWriter(directory, OF, provenance={}) as writer:
        writer.submit(made[:4])
        writer.submit(made[4:])
    return ActivationStore(directory)


def rows_of(one: FinishedSequence, hook: str) -> np.ndarray:
    """The rows of a hook as a sequence was handed over with them."""
    point, _ = parse_name(hook)
    rows = one.rows_of(point)
    assert rows is not None
    return rows[[name for name in HOOKS if parse_name(name)[0] == point].index(hook)]


def test_the_fakes_have_every_point():
    assert {parse_name(hook)[0] for hook in HOOKS} == set(point_names())
    assert len(set(OF.hook_widths.values())) == 3


# --- What the settings and the manifest say -----------------------------------------------------------------


def test_the_manifest_of_a_default_store_is_as_before_there_were_points():
    data = encode_manifest(SETTINGS, {"jax": "1.2"})
    assert hashlib.sha256(data).hexdigest() == (
        "a74ef73f47df081e10119d0062f6fdff9a76f842ef0700afa3a795ca5ace8726"
    )


def test_a_manifest_says_the_widths_that_are_not_the_hidden_size():
    data = encode_manifest(OF, {})
    values = json.loads(data)["settings"]
    assert values["widths"] == {"attn.hook_k": 4, "attn.hook_v": 4, "mlp.hook_post": 24}
    assert decode_manifest(data, "manifest.json")[0] == OF
    assert "widths" not in json.loads(encode_manifest(settings(hook_names=HOOKS[:3]), {}))["settings"]


def test_widths_equal_to_the_hidden_size_make_no_other_key():
    identity = sequence("a").id
    same = settings(hook_names=HOOKS[-1:], widths={LAST: np.int64(16)})
    assert sequence_key(same, identity) == sequence_key(settings(hook_names=HOOKS[-1:]), identity)
    assert sequence_key(
        dataclasses.replace(OF, widths={**WIDTHS, "mlp.hook_post": np.int64(25)}), identity
    ) != (sequence_key(OF, identity))


@pytest.mark.parametrize(
    "changed",
    [
        {"widths": {}},
        {"widths": {"mlp.hook_post": 24, "attn.hook_k": 4, "attn.hook_v": 4, "attn.hook_z": 16}},
        {"widths": {"mlp.hook_post": True}},
        {"widths": {"mlp.hook_post": 24.0}},
        {"widths": {"mlp.hook_post": 0}},
        {"widths": {"mlp.hook_post": 1 << 40}},
        {"widths": {"hook_resid_post": 8}},
        {"widths": {"mlp.hook_pre": 24}},
        {"widths": {WIDE: 24}},
        {"widths": [24]},
        {"widths": None},
        {"interventions": ""},
        {"interventions": "ab" * 32, "capture_before": False},
        {"capture_before": True},
        {"capture_before": 1},
        {"interventions": None},
        {"interventions": "ab"},
        {"interventions": "AB" * 32},
        {"hook_names": ["blocks.01.attn.hook_z"]},
        {"hook_names": ["blocks.1.ln_final.hook_normalized"]},
        {"hook_names": ["hook_resid_mid"]},
    ],
)
def test_a_manifest_has_one_form_only(changed: dict[str, Any]):
    with pytest.raises(StoreError) as raised:
        StoreSettings.from_json(OF.to_json() | changed)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_store_continues_under_the_same_widths_only(store: ActivationStore):
    with pytest.raises(StoreError, match=r"widths is .* there and .* here"):
        ActivationWriter(
            store.directory, dataclasses.replace(OF, widths={**WIDTHS, "attn.hook_v": 5}), provenance={}
        )


def test_settings_and_store_say_what_is_stored(store: ActivationStore):
    there = "layers 10, 11, hook_resid_pre of layers 10, 11, hook_resid_mid of layers 10, 11, "
    assert there in repr(OF)
    assert there in repr(store)
    assert "ln_final.hook_normalized" in repr(store)
    assert store.layers == (10, 11)


# --- Rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_rows_come_back_by_name(store: ActivationStore, made: list[FinishedSequence], hook: str):
    for one, record in zip(made, store, strict=True):
        expected = rows_of(one, hook)
        assert store.rows(record, hook, dtype="stored").tobytes() == expected.tobytes()
        assert store.rows(record, hook).shape == (record.n_rows, OF.hook_widths[hook])
        norms = np.linalg.norm(expected.astype(np.float32), axis=1)
        np.testing.assert_allclose(store.columns(record, hook).norms, norms, rtol=1e-5)


def test_a_number_is_the_output_of_a_block_and_labels_it(store: ActivationStore):
    record = store[0]
    found = store.rows(record, [11, WIDE, "blocks.10.hook_resid_post"])
    assert list(found) == [11, WIDE, 10]
    assert (found[11] == store.rows(record, "blocks.11.hook_resid_post")).all()
    assert list(store.columns(record).norms) == [
        10 if hook == "blocks.10.hook_resid_post" else 11 if hook == "blocks.11.hook_resid_post" else hook
        for hook in HOOKS
    ]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (12, r"layer 12 is not in .*; it has layers 10, 11, hook_resid_pre of layers"),
        ("blocks.12.attn.hook_z", r"blocks\.12\.attn\.hook_z is not in"),
        ("attn.hook_z", "names no layer"),
    ],
)
def test_a_hook_that_is_not_stored_is_one_sentence(store: ActivationStore, layer: Any, message: str):
    with pytest.raises(StoreError, match=message):
        store.rows(store[0], layer)


@pytest.mark.parametrize("hook", [WIDE, NARROW, LAST, "blocks.10.hook_resid_mid"])
@pytest.mark.parametrize("group", ["generated", "prompt"])
def test_statistics_are_those_of_the_hooks_rows(
    store: ActivationStore, made: list[FinishedSequence], hook: str, group: str
):
    rows = np.concatenate(
        [
            rows_of(one, hook)[-n:] if group == "generated" else rows_of(one, hook)[:-n]
            for one in made
            if (n := len(one.token_ids))
        ]
    ).astype(np.float64)
    found = store.statistics(hook, group)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.variance, rows.var(0), rtol=1e-4)
    assert found.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-5)


def test_iterating_yields_rows_of_several_widths_and_filters_by_all_norms(store: ActivationStore):
    hooks = [WIDE, NARROW]
    everything = list(store.iterate(hooks))
    assert [rows[WIDE].shape[1] for rows, _, _ in everything] == [24] * 6
    assert [rows[NARROW].shape[1] for rows, _, _ in everything] == [4] * 6
    limit = float(np.median(np.concatenate([columns.norms[WIDE] for _, columns, _ in everything])))
    kept = list(store.iterate(hooks, rows=RowFilter(max_norm=limit)))
    assert (
        0 < sum(len(rows[NARROW]) for rows, _, _ in kept) < sum(len(rows[WIDE]) for rows, _, _ in everything)
    )
    assert all((columns.norms[hook] <= limit).all() for _, columns, _ in kept for hook in hooks)


def test_a_dataframe_names_the_norms_of_hooks(store: ActivationStore):
    pytest.importorskip("pandas")
    table = store.to_dataframe([10, WIDE])
    assert {"norm_10", f"norm_{WIDE}"} <= set(table.columns)
    assert len(table) == sum(record.n_rows for record in store)


@pytest.mark.parametrize("layers", [WIDE, [10, NARROW, WIDE, LAST]])
def test_a_shuffle_hands_out_each_row_once_in_the_same_order_whatever_the_hooks(
    store: ActivationStore, layers: Any
):
    by_place = {
        (record.key, int(position)): place
        for record in store
        for place, position in enumerate(store.columns(record).positions)
    }
    seen = set()
    hooks = [layers] if isinstance(layers, str) else layers
    alone = list(ShuffledBatches(store, 11, 7, seed=3))
    batches = ShuffledBatches(store, layers, 7, seed=3)
    for one, other in zip(batches, alone, strict=True):
        assert (one.positions == other.positions).all()
        rows = {layers: one.rows} if isinstance(layers, str) else one.rows
        for number, (place, position) in enumerate(zip(one.sequences, one.positions, strict=True)):
            key = batches.keys[place]
            seen.add((key, int(position)))
            for hook in hooks:
                stored = store.rows(store[key], hook)[by_place[key, int(position)]]
                assert (rows[hook][number] == stored).all()
    assert seen == by_place.keys()


def test_torch_batches_have_the_width_of_their_hook(store: ActivationStore):
    torch = pytest.importorskip("torch")
    batches = ShuffledBatches(store, [WIDE, NARROW], 8, framework="torch", dtype="stored")
    first = next(iter(torch.utils.data.DataLoader(batches.torch_dataset(), batch_size=None)))
    assert {hook: tuple(rows.shape) for hook, rows in first.rows.items()} == {WIDE: (8, 24), NARROW: (8, 4)}
    assert first.rows[WIDE].dtype == torch.bfloat16


def test_a_hook_is_exported_under_its_name_and_width(store: ActivationStore, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    arguments = ["--layer", WIDE, "--context_size", "6", "--output", str(tmp_path / "out")]
    assert main(["export", store.directory, *arguments]) == 0
    loaded = datasets.load_from_disk(str(tmp_path / "out")).with_format("numpy")
    assert loaded.features[WIDE].shape == (6, 24)
    stored = np.concatenate([store.rows(record, WIDE) for record in store])
    assert (loaded[:][WIDE].reshape(-1, 24) == stored[: len(loaded) * 6]).all()
    with pytest.raises(StoreError, match="exists already"):
        export_saelens(store, WIDE, tmp_path / "out", 6)


def test_stats_lists_every_hook(store: ActivationStore, capsys: pytest.CaptureFixture[str]):
    assert main(["stats", store.directory]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines[::2]] == [
        hook.split(".")[1] if hook.endswith(RESID_POST) else hook for hook in HOOKS
    ]


# --- Shards -------------------------------------------------------------------------------------------------


def test_a_shard_has_norms_of_all_hooks_and_moments_end_to_end(store: ActivationStore):
    tensors = safetensors.numpy.load_file(Path(store.directory) / "host-00000" / "shard-000000.safetensors")
    rows = len(tensors["token_ids"])
    assert tensors["norms"].shape == (len(HOOKS), rows)
    assert tensors["statistics.generated.mean"].shape == (sum(OF.hook_widths.values()),)
    assert tensors["statistics.generated.norm"].shape == (len(HOOKS),)
    assert {hook: tensors[hook].shape for hook in HOOKS} == {
        hook: (rows, OF.hook_widths[hook]) for hook in HOOKS
    }


def test_rows_of_every_point_are_written_from_the_arrays_they_came_in(made: list[FinishedSequence]):
    buffers = [np.frombuffer(chunk, np.uint8) for chunk in pack_batch(OF, made[:2]).chunks()]
    for one in made[:2]:
        for point, hooks in OF.hooks_by_point.items():
            rows = one.rows_of(point)
            assert rows is not None
            assert sum(np.shares_memory(rows, buffer) for buffer in buffers) == len(hooks)


def test_a_store_of_other_points_alone_needs_no_rows_of_resid_post(tmp_path: Path):
    of = settings(hook_names=(WIDE, LAST), widths={"mlp.hook_post": 24})
    made = batch("a", of=of)
    assert made[0].rows is None
    with ActivationWriter(tmp_path, of, provenance={}) as writer:
        writer.submit(made)
    store = ActivationStore(tmp_path)
    assert list(verify_store(store)) == []
    assert store.layers == ()
    assert store.rows(store[1], LAST, dtype="stored").tobytes() == made[1].points[LAST][0].tobytes()


FIRST = sequence("a", of=OF)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"points": {}}, "no activation rows, but the store captures"),
        ({"rows": None}, "no activation rows, but the store captures 2 layers"),
        ({"points": {**FIRST.points, LAST: FIRST.points[LAST][:, :-1]}}, "rows for 4 prompt and 6 generated"),
        ({"points": {**FIRST.points, LAST: FIRST.points[LAST][:, 4:]}}, "different numbers of rows"),
        ({"points": {**FIRST.points, LAST: FIRST.points[LAST][0]}}, r"not \[layers, rows, width\]"),
        ({"points": {**FIRST.points, LAST: FIRST.points[LAST][..., :8]}}, "8 wide, the store's are 16"),
        ({"points": {**FIRST.points, LAST: FIRST.points[LAST].astype(np.float32)}}, "float32, the store"),
        (
            {"points": {**FIRST.points, "attn.hook_z": FIRST.points["attn.hook_z"][:1]}},
            "rows of 1 layers, expected 2",
        ),
        ({"points": {**FIRST.points, RESID_POST: FIRST.rows}}, "these are `rows`"),
        ({"points": {**FIRST.points, "mlp.hook_pre": FIRST.points[LAST]}}, "does not capture"),
    ],
)
def test_a_sequence_with_other_points_than_the_settings_is_refused(changed: dict[str, Any], message: str):
    with pytest.raises(StoreError, match=message):
        pack_batch(OF, [dataclasses.replace(FIRST, **changed)])


def test_a_value_of_a_point_that_is_not_finite_fails_its_sequence():
    bad = {point: rows.copy() for point, rows in FIRST.points.items()}
    bad["mlp.hook_post"][0, 5, 3] = np.nan
    packed = pack_batch(OF, [dataclasses.replace(FIRST, points=bad), sequence("bb", of=OF)])
    assert packed.failures == {0: f"{WIDE} is not finite at position 5"}


# --- Verification -------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    with ActivationWriter(tmp_path / "store", OF, provenance={}) as writer:
        writer.submit(batch("a", "bb", of=OF))
    return tmp_path / "store"


def test_a_sound_store_has_no_findings(store: ActivationStore):
    assert list(verify_store(store)) == []


def test_a_changed_value_of_a_point_is_found(copied: Path):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[WIDE][2] *= 2

    rewrite(copied, change)
    (found,) = verify_store(ActivationStore(copied))
    assert f"{WIDE}: the rows do not have the norms that were stored with them, row 2" in found


@pytest.mark.parametrize("name", ["mean", "variance", "norm"])
def test_changed_statistics_of_a_point_are_found(copied: Path, name: str):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"statistics.generated.{name}"][-1] += 1

    rewrite(copied, change)
    (found,) = verify_store(ActivationStore(copied))
    assert f"{LAST}: the generated rows do not have the statistics" in found


@pytest.mark.parametrize("name", [WIDE, "statistics.generated.mean"])
def test_a_tensor_of_another_width_is_found(copied: Path, name: str):
    rewrite(copied, lambda tensors: tensors.update({name: tensors[name][..., :-1]}))
    assert any("is not a whole shard" in one for one in verify_store(ActivationStore(copied)))


@pytest.mark.parametrize(
    ("hook", "rows", "findings"),
    [
        ("blocks.12.hook_attn_out", slice(3, 4), 1),
        ("blocks.12.hook_attn_out", slice(None), 0),  # as in a block that adds nothing
        ("blocks.10.hook_resid_mid", slice(None), 1),
    ],
)
def test_rows_of_zeros_are_found_where_a_model_makes_none(
    tmp_path: Path, hook: str, rows: slice, findings: int
):
    point, _ = parse_name(hook)

    def zeroed(one: FinishedSequence) -> FinishedSequence:
        points = {name: array.copy() for name, array in one.points.items()}
        points[point][0, rows] = 0
        return dataclasses.replace(one, points=points)

    with ActivationWriter(tmp_path, OF, provenance={}) as writer:
        writer.submit(list(map(zeroed, batch("a", of=OF))))
    found = list(verify_store(ActivationStore(tmp_path)))
    assert len(found) == findings
    assert all(f"{hook}: row" in one and "is all zero" in one for one in found)


def test_statistics_are_measured_anew_where_sequences_were_dropped(copied: Path):
    key = read_index(copied)[0]["key"]
    assert drop_sequences(copied, {key}) == 1
    store = ActivationStore(copied)
    rows = np.concatenate([store.rows(one, WIDE)[one.prompt_rows :] for one in store])
    found = store.statistics(WIDE)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-5)
