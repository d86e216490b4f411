"""The figure of a comparison: how the error grows along the network, and where it is made."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Any

from hpddrnet_trt.accuracy.comparison import Comparison
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.files import write_bytes
from hpddrnet_trt.graph.layers import short
from hpddrnet_trt.report.style import new_figure, png, style

# Okabe and Ito's colours, told apart with any colour vision.
_ALL, _OWN, _FIRST = "#0072B2", "#E69F00", "#D55E00"
_LABELLED = 3  # a block of fewer layers in a row gets no name


def save_figure(comparison: Comparison, target: str | Path) -> Path:
    """Write :func:`comparison_figure` as PNG.

    Raises :class:`UsageError` for another ending or a comparison without layers, :class:`MissingDependency`
    without matplotlib.
    """
    if Path(target).suffix.lower() != ".png":
        raise UsageError(f"the figure {target} must end with .png")
    return write_bytes(target, png(comparison_figure(comparison)))


def comparison_figure(comparison: Comparison) -> Any:
    """Error of each layer (line) and the part it makes by itself (dots), logarithmic, along B's graph.

    Blocks are shaded in turn and named; layers that diverge are marked, the first one with its name.
    """
    layers = comparison.layers
    if not layers:
        raise UsageError("only labels were compared, there is no error along the layers to draw")
    places = range(len(layers))
    finite = [value for layer in layers for value in (layer.error, layer.own) if 0 < value < math.inf]
    low, high = _decades(min(finite, default=1e-6)), 10 ** math.ceil(math.log10(max([*finite, comparison.limit])) + 0.2)

    def drawn(value: float) -> float:
        """Not a number leaves a gap for what has no error, infinite errors are at the top."""
        return math.nan if value == 0 else min(max(value, low), high)

    with style():
        figure = new_figure(13.5, 6.2)
        axes = figure.subplots()
        _shade_blocks(axes, comparison)
        axes.plot(
            places, [drawn(layer.error) for layer in layers], color=_ALL, linewidth=1.6,
            label="error, inherited ones included",
        )  # fmt: skip
        axes.plot(
            places, [drawn(layer.own) for layer in layers], "o", color=_OWN, markersize=5, markeredgecolor="white",
            markeredgewidth=0.6, label="error that the layer makes by itself",
        )  # fmt: skip
        axes.axhline(
            comparison.limit, color="#666666", linestyle="--", linewidth=1.1,
            label=f"limit of what a layer may make: {100 * comparison.limit:g} %",
        )  # fmt: skip
        _mark_divergences(axes, comparison, drawn)
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_xlim(-1, len(layers))
        axes.set_ylabel("RMS of the difference / RMS of A's values")
        axes.grid(axis="x", visible=False)
        axes.set_title(f"Error along the network: {_name(comparison.b)} against {_name(comparison.a)}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9.5)
    return figure


def _shade_blocks(axes: Any, comparison: Comparison) -> None:
    runs = [
        (block, [place for place, _ in entries])
        for block, entries in groupby(enumerate(comparison.layers), lambda entry: entry[1].block)
    ]
    ticks = []
    for number, (block, inside) in enumerate(runs):
        if number % 2:
            axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color="#eef1f5", linewidth=0, zorder=0)
        if len(inside) >= min(_LABELLED, len(comparison.layers)):
            ticks.append((sum(inside) / len(inside), short(block)))
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks], rotation=90, fontsize=8)
    axes.tick_params(axis="x", length=0)


def _mark_divergences(axes: Any, comparison: Comparison, drawn: Any) -> None:
    first = comparison.first
    if first is None:
        return
    marked = [place for place, layer in enumerate(comparison.layers) if comparison.diverges(layer)]
    axes.plot(
        marked, [drawn(comparison.layers[place].own) for place in marked], "o", color=_FIRST, markersize=8,
        markeredgecolor="white", markeredgewidth=0.8, label="layers that diverge",
    )  # fmt: skip
    axes.axvline(marked[0], color=_FIRST, linewidth=1.4)
    right = marked[0] > len(comparison.layers) / 2
    axes.annotate(
        f"first: {short(first.name)}", (marked[0], 0.97), (-7 if right else 7, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right" if right else "left", va="top", color=_FIRST, weight="bold",
    )  # fmt: skip


def _decades(smallest: float) -> float:
    """The power of ten below, not under 1e-8, where FP32's own noise ends."""
    return float(10 ** math.floor(math.log10(max(smallest, 1e-8))))


def _name(described: str) -> str:
    """``/a/b/model.onnx (int8)`` without the folder."""
    path, _, form = described.rpartition(" (")
    return f"{Path(path).name} ({form}"
