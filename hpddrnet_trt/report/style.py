"""Figures of one style, drawn with matplotlib's Agg canvas (no display, no global state)."""

from __future__ import annotations

import base64
import io
import math
from contextlib import AbstractContextManager
from typing import Any

from hpddrnet_trt.core.errors import require

_STYLE = {
    "font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "hatch.linewidth": 0.7, "legend.frameon": False,
    "svg.fonttype": "path", "svg.hashsalt": "hpddrnet-trt",
}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """The context to draw in."""
    context: AbstractContextManager[None] = _matplotlib("matplotlib").rc_context(_STYLE)
    return context


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, inches, whose parts make room for each other."""
    figure = _matplotlib("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    _matplotlib("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def logarithmic(axes: Any) -> None:
    """A logarithmic x axis with plain numbers."""
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis without exponents at 1, 2 and 5 times the powers of ten, more over a narrow range."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 2.0
    ticker = _matplotlib("matplotlib.ticker")
    narrow = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5)
    axis.set_major_locator(ticker.LogLocator(subs=narrow if decades < 1.7 else (1, 3) if decades < 4 else (1,)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def png(figure: Any) -> bytes:
    """The figure as PNG at 160 dpi."""
    return _saved(figure, "png")


def svg_address(figure: Any) -> str:
    """The figure as ``data:`` address of an SVG picture."""
    return "data:image/svg+xml;base64," + base64.b64encode(_saved(figure, "svg")).decode("ascii")


def _saved(figure: Any, form: str) -> bytes:
    stream = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {}  # the same result gives the same file
    with style():
        figure.savefig(stream, format=form, dpi=160, facecolor="white", metadata=metadata)
    return stream.getvalue()


def _matplotlib(module: str) -> Any:
    return require(module, "benchmark", "draw the report's figures")
