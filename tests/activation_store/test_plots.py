"""`plot`: which files are drawn, of which stores, and what is said where one cannot be."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from activation_fakes import batch, sequence, settings

from activation_store import ActivationStore, ActivationWriter, hook_name
from activation_store.__main__ import main
from activation_store.plot_data import NormMap, Norms, survey

pytest.importorskip("matplotlib", reason="plots need the extra `plots`")
from matplotlib.figure import Figure

from activation_store.plots import draw_norms, draw_timeline

pytestmark = pytest.mark.usefixtures("small")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the pictures of few pixels, which are soon drawn."""
    monkeypatch.setattr("activation_store.plots._DPI", 20)


def write(directory: Path, *batches: Any, **changes: Any) -> str:
    with ActivationWriter(directory, settings(**changes), provenance={}) as writer:
        for one in batches:
            writer.submit(one)
    return str(directory)


def plotted(store: str, folder: Path, *words: str) -> set[str]:
    """The names of the files that the command draws."""
    assert main(["plot", store, "--output", str(folder), *words]) == 0
    files = list(folder.iterdir())
    assert all(file.read_bytes().startswith(PNG) for file in files)
    return {file.name for file in files}


def test_plots_are_drawn_without_a_window_and_their_paths_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    store = write(tmp_path / "runs", batch("a", "bb"), batch("ccc"))
    plotted(store, tmp_path / "plots", "--layer", "10, 12")
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "plots" / name)
        for name in ("runs-norms.png", "runs-pca-layer-10.png", "runs-pca-layer-12.png", "runs-timeline.png")
    ]
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    "changes",
    [{"hook_names": (hook_name(5),), "dtype": "float16"}, {"capture_prompt": False, "dtype": "float32"}],
    ids=["one layer", "no prompt rows"],
)
def test_a_store_of_one_layer_or_without_prompt_rows_is_plotted(tmp_path: Path, changes: dict[str, Any]):
    of = settings(**changes)
    assert len(plotted(write(tmp_path / "s", batch("a", of=of), **changes), tmp_path / "plots")) == 3


def test_a_name_of_any_letters_is_a_title_and_part_of_a_file_s_name(tmp_path: Path):
    of = settings(hook_names=())
    store = write(tmp_path / "$x^{2}$ \u6f22/", batch("a", of=of), hook_names=())
    assert plotted(store, tmp_path / "plots") == {"_x_2_\u6f22-timeline.png"}


def test_without_activations_only_the_timeline_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = write(tmp_path / "s", batch("a", of=settings(hook_names=())), hook_names=())
    assert plotted(store, tmp_path / "plots") == {"s-timeline.png"}
    assert "no norms and no PCA: the store was made without activations" in capsys.readouterr().out


def test_too_few_rows_for_a_pca_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    of = settings(capture_prompt=False)
    store = write(tmp_path / "s", [sequence("a", of=of, generated=1)], capture_prompt=False)
    assert plotted(store, tmp_path / "plots") == {"s-norms.png", "s-timeline.png"}
    assert "no PCA: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "{store}/plots"], "is in the store itself"),
        (["--output", "gs://bucket/plots"], "to a local place"),
        (["--layer", "3"], "layer 3 is not in"),
        (["--layer", "10,x"], "is no whole number"),
    ],
)
def test_bad_usage_is_a_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    store = write(tmp_path / "s", batch("a"))
    try:
        code = main(["plot", store, *(word.format(store=store) for word in words)])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err


def test_an_empty_store_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = write(tmp_path / "s")
    assert main(["plot", store, "--output", str(tmp_path / "plots")]) == 2
    assert "has no sequence that could be shown: run the main job first" in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


def test_a_missing_matplotlib_is_a_sentence_that_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", write(tmp_path / "s", batch("a")), "--output", str(tmp_path / "plots")]) == 1
    assert 'pip install "qwen2-jax-activations[plots]"' in capsys.readouterr().err


def test_sinks_leave_the_colours_to_the_other_norms():
    means = np.array([[25_105.0, 190, 200], [24_000, 180, 210]])
    norms = Norms(NormMap(np.arange(4), means), None, {"first token of a prompt": means[:, 0]}, 1)
    figure = draw_norms(Figure(), norms, [10, 11], "store")
    (mesh,) = figure.axes[0].collections
    assert mesh.get_clim() == pytest.approx((180, 210))
    over = importlib.import_module("matplotlib").colors.to_hex(mesh.cmap.get_over())
    assert over == "#d55e00"
    assert any("attention sinks, up to 25,105" in ax.get_xlabel() for ax in figure.axes)
    assert list(figure.axes[-2].lines[0].get_ydata()) == [25_105, 24_000]


def test_a_timeline_ends_at_all_sequences_and_tokens(tmp_path: Path):
    store = ActivationStore(write(tmp_path / "s", batch("a"), batch("bb"), batch("ccc")))
    figure = draw_timeline(Figure(), survey(store), "store")
    totals = [ax.lines[0].get_ydata() for ax in figure.axes]
    assert list(totals[0]) == [0, 2, 4, 6]
    assert totals[1][-1] == sum(record.generated_length for record in store)
    assert "3 shards of 1 host" in figure.axes[0].get_title()
