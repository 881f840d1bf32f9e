"""Plots of a store as PNG files: norms by layer and position, a PCA of one layer, the course of the run."""

import importlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.format import StoreError, StoreUsageError, StoreWriteError
from activation_store.local_files import write_atomic
from activation_store.output_places import store_name, target_outside
from activation_store.plot_data import (
    Components,
    NormMap,
    Norms,
    Survey,
    measure_norms,
    principal_components,
    sample_sequences,
    survey,
)
from activation_store.reader import ActivationStore

_SIZE = (10, 5.2)  # inches
_DPI = 144
# Colours that also those can tell apart who do not see red and green (Okabe and Ito).
_KINDS = {
    "prompt": ("prompt", "#999999", "."),
    "answer": ("answer", "#0072B2", "o"),
    "not solved": ("answer, not solved", "#D55E00", "x"),
    "solved": ("answer, solved", "#0072B2", "o"),
}
_SINK_COLOUR = "#D55E00"
_SINK = 4  # times the median norm: what is beyond would leave no colours for the rest
_LINES = {
    "first token of a prompt": (_SINK_COLOUR, "o"),
    "other tokens of a prompt": ("#777777", "s"),
    "generated tokens": ("#0072B2", "^"),
}


def plot_store(
    store: ActivationStore, folder: str | os.PathLike[str], layers: Sequence[int] = ()
) -> Iterator[Path | str]:
    """Draws a store into PNG files named after it; yields the path of each, or why one is not drawn.

    Args:
        store: the store to read.
        folder: where the files go; it is made if need be, and earlier plots in it are replaced.
        layers: those to draw a PCA of; without any, the middle one that is stored.

    Raises:
        StoreUsageError: a layer is not stored, nothing is stored at all, or the folder is in the store.
        StoreError: matplotlib is not installed, or the store is damaged.
        StoreWriteError: a file cannot be written.
    """
    for layer in layers:
        store.require_layer(layer)
    target = target_outside(store, folder)
    figures = _figures()
    found = survey(store)
    name = store_name(store)

    def written(figure: Any, kind: str) -> Path:
        return _write(figure, target / f"{name}-{kind}.png")

    if store.layers:
        sample = sample_sequences(store, found)
        drawn = f"{len(sample):,} of {found.sequences:,} sequences" if len(sample) < found.sequences else ""
        norms = measure_norms(store, sample)
        yield written(draw_norms(figures(), norms, store.layers, _title(name, drawn)), "norms")
        outcomes = store.outcomes()
        for layer in layers or (store.layers[len(store.layers) // 2],):
            try:
                components = principal_components(store, layer, sample, outcomes)
            except StoreUsageError as error:
                yield f"no PCA: {error}"
                continue
            text = _title(name, f"{len(components.kinds):,} rows" + (f" of {drawn}" if drawn else ""))
            yield written(draw_components(figures(), components, text), f"pca-layer-{layer}")
    else:
        yield "no norms and no PCA: the store was made without activations"
    yield written(draw_timeline(figures(), found, _title(name)), "timeline")


def _figures() -> Any:
    """Returns what makes an empty figure, which never opens a window."""
    try:
        figure = importlib.import_module("matplotlib.figure")
        agg = importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError as error:
        raise StoreError(
            'plots need matplotlib: pip install "qwen2-jax-activations[plots]", or pip install matplotlib'
        ) from error

    def make() -> Any:
        made = figure.Figure(_SIZE, dpi=_DPI, layout="constrained")
        agg.FigureCanvasAgg(made)
        return made

    return make


def _title(name: str, sample: str = "") -> str:
    return f"{name} ({sample})" if sample else name


def _write(figure: Any, path: Path) -> Path:
    data = io.BytesIO()
    with warnings.catch_warnings():  # of letters of a store's name that the font does not have
        warnings.simplefilter("ignore")
        figure.savefig(data, format="png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, [data.getvalue()])
    except OSError as error:
        raise StoreWriteError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _heading(figure: Any, what: str, title: str) -> None:
    figure.suptitle(f"{what} · {title}", fontsize=12, parse_math=False)


# --- Norms --------------------------------------------------------------------------------------------------


def draw_norms(figure: Any, norms: Norms, layers: Sequence[int], title: str) -> Any:
    """Draws mean norms by layer and position as colours, and by layer as lines, all on logarithmic scales.

    Attention sinks, of a hundred times the norm of the rest, have a colour of their own.
    """
    _heading(figure, "Norm of the residual stream", title)
    maps = [
        (values, label)
        for values, label in (
            (norms.prompt, "position in the prompt"),
            (norms.generated, "token of the answer"),
        )
        if values is not None
    ]
    widths = [*(1.0 for _ in maps), 0.8]
    grid = figure.add_gridspec(2, len(widths), width_ratios=widths, height_ratios=[1, 0.045])
    positive = np.concatenate([values.means[values.means > 0] for values, _ in maps])
    sinks = positive[positive > _SINK * np.median(positive)]
    others = positive[positive <= _SINK * np.median(positive)]
    low, high = (others.min(), others.max()) if len(others) else (1.0, 1.0)
    scale = importlib.import_module("matplotlib.colors").LogNorm(low, max(high, low * 1.01))
    colours = importlib.import_module("matplotlib").colormaps["viridis"].with_extremes(over=_SINK_COLOUR)
    mesh = None
    for number, (values, label) in enumerate(maps):
        ax = figure.add_subplot(grid[0, number])
        mesh = ax.pcolormesh(np.maximum(values.means, low), norm=scale, cmap=colours)
        _name_columns(ax, values)
        widening = "; columns widen" if len(values.starts) - 1 < values.starts[-1] else ""
        ax.set_xlabel(f"{label}{widening}")
        ax.set_yticks([])
        if number == 0:
            ax.set_ylabel("layer")
            _name_layers(ax, layers)
    if mesh is not None:
        key = figure.add_subplot(grid[1, : len(maps)])
        extend = "max" if len(sinks) else "neither"
        bar = figure.colorbar(mesh, cax=key, orientation="horizontal", extend=extend)
        beyond = f"; orange: attention sinks, up to {sinks.max():,.0f}" if len(sinks) else ""
        bar.set_label(f"mean norm, in logarithmic colours{beyond}")
        _plain_numbers(bar.ax.xaxis)
    lines, key = figure.add_subplot(grid[0, -1]), figure.add_subplot(grid[1, -1])
    _draw_lines(lines, norms, layers)
    key.axis("off")
    key.legend(*lines.get_legend_handles_labels(), loc="center", fontsize=9, frameon=False)
    return figure


def _draw_lines(ax: Any, norms: Norms, layers: Sequence[int]) -> None:
    for kind, means in norms.means.items():
        colour, marker = _LINES[kind]
        ax.plot(layers, means, color=colour, marker=marker, markersize=4, label=kind)
    ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.set_ylabel("mean norm")
    ax.set_xticks(layers[:: max(1, len(layers) // 7)])
    _plain_numbers(ax.yaxis)
    ax.grid(alpha=0.3, which="both")


def _name_layers(ax: Any, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 14)
    ax.set_yticks(np.arange(len(layers))[::step] + 0.5, [str(layer) for layer in layers[::step]])


def _name_columns(ax: Any, values: NormMap) -> None:
    """Names about eight columns, the first one always, by their first position."""
    columns = len(values.starts) - 1
    places = np.unique(np.linspace(0, columns - 1, min(columns, 8)).round().astype(int))
    ax.set_xticks(places + 0.5, [f"{values.starts[place]:,}" for place in places])


def _plain_numbers(axis: Any) -> None:
    """Writes 25,000 and 0.5 where a logarithmic axis would write powers of ten."""
    ticker = importlib.import_module("matplotlib.ticker")
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
    low, high = sorted(axis.get_view_interval())
    few = high / max(low, 1e-300) < 1_000  # too few powers of ten to read a value from
    axis.set_minor_locator(ticker.LogLocator(subs=(2, 5) if few else (1,)))
    axis.set_minor_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))


# --- Principal components -----------------------------------------------------------------------------------


def draw_components(figure: Any, components: Components, title: str) -> Any:
    """Draws each row as a point, coloured by whether its sequence solved its puzzle."""
    _heading(figure, f"PCA of layer {components.layer}", title)
    ax = figure.subplots()
    kinds = np.array(components.kinds)
    for kind, (label, colour, marker) in _KINDS.items():
        points = components.points[kinds == kind]
        if len(points):
            ax.scatter(
                *points.T,
                s=22 if marker != "." else 14,
                c=colour,
                marker=marker,
                alpha=0.55,
                linewidths=1.0 if marker == "x" else 0,
                label=f"{label} ({len(points):,} rows)",
            )
    for name, axis, share in zip("12", (ax.xaxis, ax.yaxis), components.explained, strict=True):
        axis.set_label_text(f"component {name} ({share:.0%} of the variance)")
    if "prompt" in components.kinds:
        ax.set_title("without the first token of each prompt, an attention sink", fontsize=9, color="#555555")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=9)
    return figure


# --- The course of a run ------------------------------------------------------------------------------------


def draw_timeline(figure: Any, found: Survey, title: str) -> Any:
    """Draws how many sequences and generated tokens were stored by when: a step for each shard."""
    _heading(figure, "Course of the run", title)
    shards = sorted(found.shards.values(), key=lambda shard: shard.seconds)
    start = shards[0].seconds if found.began is None else found.began
    unit, seconds = _time_unit(shards[-1].seconds - start)
    times = np.array([shard.seconds - start for shard in shards]) / seconds
    locator = importlib.import_module("matplotlib.ticker").MaxNLocator
    axes = figure.subplots(2, 1, sharex=True)
    for ax, values, label in (
        (axes[0], [shard.sequences for shard in shards], "sequences"),
        (axes[1], [shard.tokens for shard in shards], "generated tokens"),
    ):
        total = np.cumsum(values)
        ax.step([0, *times], [0, *total], where="post", color="#0072B2")
        if len(shards) <= 200:
            ax.plot(times, total, "o", color="#0072B2", markersize=4)
        ax.set_ylim(bottom=0)
        ax.set_ylabel(label)
        ax.yaxis.set_major_locator(locator(nbins=5, integer=True))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.grid(alpha=0.3)
    began = datetime.fromtimestamp(start, UTC)
    event = "the first shard was written" if found.began is None else "the store was made"
    axes[1].set_xlabel(f"{unit} since {event}, {began:%Y-%m-%d %H:%M:%S} UTC")
    of_hosts = f"{_count(len(shards), 'shard')} of {_count(len({shard.host for shard in shards}), 'host')}"
    failed = f"; {found.failed:,} sequences failed and have no shard" if found.failed else ""
    axes[0].set_title(
        f"what was stored by when, a step for each shard ({of_hosts}){failed}",
        fontsize=9,
        color="#555555",
    )
    return figure


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _time_unit(seconds: float) -> tuple[str, float]:
    for unit, length in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds > 2 * length:
            return unit, length
    return "seconds", 1.0
