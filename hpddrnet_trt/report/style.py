"""How every page and figure looks: one palette, one way to draw (matplotlib's Agg canvas), one base template.

Colours are Okabe and Ito's, told apart with any colour vision; the templates' are in ``style.css.j2``.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpddrnet_trt.benchmark.table import sentence
from hpddrnet_trt.core.errors import require
from hpddrnet_trt.core.text import megabytes, number, percent

BLUE, ORANGE, GREEN, PINK, AMBER, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
YELLOW, INDIGO, OCHRE = "#F0E442", "#332288", "#8C6D1F"  # further ones, for more than six of a kind
BLACK, GREY, PALE = "#111111", "#6b7580", "#c9ced4"
COLORS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
OVERLAY_ALPHA = 115  # of 255, opacity of labels over a micrograph
DIMMED = (10, 14, 22)  # what is right in a map of differences
DIFFERENT = (255, 176, 0)  # bright amber: told from grey by brightness alone
WRAP = 26  # characters of a line of a name
WIDTH = 7.6  # inches of a figure with one panel
NARROW = 5.0  # the same for a telephone, as wide as its screen at 72 dpi
_NAME_SIZE = 8.5
_STEP = 6  # pixels between places that are tried for a name
_GAP = 3  # pixels that stay free around a name
_POINT = 8  # pixels around the middle of a marker that stay free
_NEAR = 14  # pixels: a name farther from its point gets a line to it
_RC = {
    "font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "hatch.linewidth": 0.7, "legend.frameon": False,
    "svg.fonttype": "path", "svg.hashsalt": "hpddrnet-trt",
}  # fmt: skip

Grey8 = npt.NDArray[np.uint8]
Palette = Sequence[tuple[int, int, int]]
Numbers = npt.NDArray[np.float64]


# -- figures ---------------------------------------------------------------------------------------


def style() -> AbstractContextManager[None]:
    """The context to draw in."""
    context: AbstractContextManager[None] = _matplotlib("matplotlib").rc_context(_RC)
    return context


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, inches, whose parts make room for each other."""
    figure = _matplotlib("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    _matplotlib("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def panels(count: int, width: float, height: float, *, columns: int) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels in rows of ``columns``, each so many inches wide and high."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = new_figure(width * columns, height * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in grid[count:]:
        spare.remove()
    return figure, grid[:count]


def is_narrow(axes: Any) -> bool:
    """Whether the axes are of a figure for a telephone."""
    return bool(axes.get_figure(root=True).get_figwidth() <= NARROW)


def put_title(axes: Any, text: str) -> None:
    axes.set_title(wrapped(text, 30) if is_narrow(axes) else text)


def label_axes(axes: Any, title: str, x: str, y: str) -> None:
    put_title(axes, title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


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


def wrapped(text: str, width: int = WRAP) -> str:
    """In lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(text, width))


def name_bars(axes: Any, names: Sequence[str]) -> None:
    """Entries from the top, named on the y axis of horizontal bars."""
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)


def value_right(axes: Any, x: float, place: int, text: str) -> None:
    """A text right of the end of a bar."""
    axes.annotate(text, (x, place), (5, 0), textcoords="offset points", va="center", fontsize=9)


class Named(NamedTuple):
    """A point in data coordinates and what to write beside it."""

    x: float
    y: float
    text: str
    color: str


def name_points(axes: Any, points: Sequence[Named], line: Sequence[tuple[float, float]] = ()) -> list[Any]:
    """Write each name at the free place next to its point, off the ``line`` where possible; returns the texts.

    Call it last: axes limits and everything outside must be in place. Places on a grid are compared:
    on another name is worst, then on a marker or on a line to a name, then far away. (adjustText was tried: it
    leaves names on markers, on each other and beyond the axes.)
    """
    figure = axes.get_figure(root=True)
    figure.draw_without_rendering()
    area = axes.get_window_extent()
    spots: Numbers = axes.transData.transform([(point.x, point.y) for point in points])
    texts = [axes.text(0, 0, wrapped(point.text), fontsize=_NAME_SIZE, color=point.color, ha="center", va="center",
                       linespacing=1.05, zorder=9, in_layout=False) for point in points]  # fmt: skip
    corners: Numbers = axes.transData.transform(line) if line else np.empty((0, 2))
    markers = np.vstack([np.column_stack([spots - _POINT, spots + _POINT]), *map(_along, corners, corners[1:])])
    names: Numbers = np.empty((0, 4))
    for point, spot, text in zip(points, spots, texts, strict=True):
        extent = text.get_window_extent()
        half = np.array([extent.width, extent.height]) / 2 + _GAP
        others = spots[np.any(spots != spot, axis=1)]
        centre, clear = _best(_centres(area, half), half, spot, others, names, markers)
        text.set_position(axes.transAxes.inverted().transform(centre))
        text.set_transform(axes.transAxes)
        names = np.vstack([names, [*(centre - half), *(centre + half)]])
        if not clear:
            end = np.clip(spot, centre - half, centre + half)
            markers = np.vstack([markers, _along(spot, end)])
            ends = axes.transAxes.inverted().transform([spot, end])
            axes.plot(*ends.T, transform=axes.transAxes, color=point.color, linewidth=0.7, alpha=0.7, zorder=2)
    return texts


def _centres(area: Any, half: Numbers) -> Numbers:
    """Middles ``[K, 2]`` of a grid on which a name stays inside the axes."""
    x = np.arange(area.x0 + half[0], max(area.x1 - half[0], area.x0 + half[0] + 1), _STEP)
    y = np.arange(area.y0 + half[1], max(area.y1 - half[1], area.y0 + half[1] + 1), _STEP)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _best(
    centres: Numbers, half: Numbers, spot: Numbers, others: Numbers, names: Numbers, markers: Numbers
) -> tuple[Numbers, bool]:
    """The best middle for a name of half size ``half``, and whether it is clear without a line whose name it is."""
    gaps = _gaps(centres, half, spot)
    nearest_other = np.min([_gaps(centres, half, other) for other in others], axis=0, initial=np.inf)
    clear = (gaps <= _NEAR) & (gaps < nearest_other - 2)
    path = spot + (np.clip(spot, centres - half, centres + half) - spot) * np.linspace(0, 1, 12)[:, None, None]
    crossable = np.vstack([names, np.column_stack([others - _POINT, others + _POINT])])
    crossed = sum(_hits(points, np.zeros(2), crossable) for points in path)
    cost = gaps + 1e5 * _hits(centres, half, names) + 400.0 * _hits(centres, half, markers)
    cost += 60.0 * crossed + 20.0 * ~clear
    cost += 0.05 * np.hypot(*(centres - spot).T)  # beside the point's middle rather than shifted
    place = int(np.argmin(cost))
    return centres[place], bool(clear[place])


def _gaps(centres: Numbers, half: Numbers, spot: Numbers) -> Numbers:
    """Distance of ``spot`` from each box."""
    return np.asarray(np.hypot(*np.maximum(np.abs(centres - spot) - half, 0).T))


def _hits(centres: Numbers, half: Numbers, boxes: Numbers) -> Numbers:
    """How many of ``boxes`` ``[M, 4]`` (left, bottom, right, top) each box around ``centres`` ``[K, 2]`` touches."""
    low, high = (centres - half)[:, None], (centres + half)[:, None]
    return np.all((low < boxes[:, 2:]) & (high > boxes[:, :2]), axis=2).sum(axis=1).astype(np.float64)


def _along(start: Numbers, end: Numbers) -> Numbers:
    """Small boxes along a line."""
    points = start + (end - start) * np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / 8))[:, None]
    return np.column_stack([points - 1, points + 1])


def legend_below(figure: Any, *panels: Any, columns: int = 6) -> None:
    """One legend for what the panels show, each name once."""
    pairs = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    entries = {label: handle for handle, label in pairs}
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=min(columns, len(entries)), fontsize=9.5
    )


def patch_legend(figure: Any, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """A legend of areas below, three in a row, as far as they fit: names with colours or hatches."""
    patches = _matplotlib("matplotlib.patches")
    handles = [patches.Patch(label=name, **look) for name, look in entries]
    longest = max(len(handle.get_label()) for handle in handles)
    fitting = 3 if figure.get_figwidth() > NARROW else 2 if longest < 24 else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=min(fitting, len(handles)), fontsize=9)


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


# -- pictures --------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """One drawing over a micrograph, a PNG data address; None is the micrograph alone."""

    title: str
    note: str
    overlay: str | None


class Gallery(NamedTuple):
    """A micrograph with its panels, in groups that stand together; ``number``: on its page, from 1."""

    number: int
    name: str
    note: str
    ratio: str  # CSS aspect ratio, width / height
    base: str  # data address of the micrograph
    groups: list[list[Panel]]


def gallery(number: int, name: str, note: str, grey: Grey8, groups: list[list[Panel]]) -> Gallery:
    """Of a micrograph uint8 ``[H, W]``."""
    height, width = grey.shape
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, format="JPEG", quality=88)  # good enough to look at
    address = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return Gallery(number, name, note, f"{width} / {height}", address, groups)


def overlay_colors(palette: Palette) -> npt.NDArray[np.uint8]:
    """RGBA ``[256, 4]`` of classes over a micrograph; transparent beyond the palette."""
    colors = np.zeros((256, 4), dtype=np.uint8)
    colors[: len(palette), :3] = palette
    colors[: len(palette), 3] = OVERLAY_ALPHA
    return colors


def palette_png(indices: Grey8, colors: npt.NDArray[np.uint8]) -> str:
    """uint8 ``[H, W]`` drawn in the RGBA colours ``[256, 4]``: small, and transparent where they are."""
    height, width = indices.shape
    image = Image.frombytes("P", (width, height), np.ascontiguousarray(indices).tobytes())
    image.putpalette(colors[:, :3].tobytes())
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True, transparency=colors[:, 3].tobytes())
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


# -- pages -----------------------------------------------------------------------------------------


def render(template: str, *, filters: dict[str, Any] | None = None, **values: Any) -> str:
    """A template of this folder filled with ``values``: a page in one file, which loads nothing from outside.

    Texts are escaped. Templates may use the filters ``percent``, ``number``, ``megabytes`` and ``sentence``, and
    those given. Raises :class:`MissingDependency` without jinja2.
    """
    jinja2 = require("jinja2", "benchmark", "write the report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpddrnet_trt", "report"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    own = {"percent": percent, "number": number, "megabytes": megabytes, "sentence": sentence}
    environment.filters.update({**own, **(filters or {})})
    page: str = environment.get_template(template).render(**values)
    return page
