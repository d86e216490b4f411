"""What figures with one horizontal bar per entry share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpddrnet_trt.report.figure_labels import WRAP, wrapped
from hpddrnet_trt.report.style import new_figure

WIDTH = 7.6  # inches of a figure with one panel
FAR_APART = 20  # a slowest entry this many times the fastest leaves no room for the fastest on a linear axis
FAR = "(entries are too far apart for one axis of ms)"


def bar_figure(entries: int, extra: float = 1.2) -> Any:
    """A figure with a bar's height for each entry; ``extra``: inches for title, axis and legend."""
    return new_figure(WIDTH, max(2.6, extra + 0.4 * entries))


def name_bars(axes: Any, names: Sequence[str], width: int = WRAP) -> None:
    """Entries from the top, named on the y axis in lines of at most ``width`` characters."""
    axes.set_yticks(range(len(names)), [wrapped(name, width) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)


def value_right(axes: Any, x: float, place: int, text: str) -> None:
    """A text right of the end of a bar."""
    axes.annotate(text, (x, place), (5, 0), textcoords="offset points", va="center", fontsize=9)


def share_text(share: float) -> str:
    """Percent of a fraction, with a decimal below ten."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def far_apart(values: Sequence[float]) -> bool:
    """Whether the smallest of these bars would vanish on a linear axis."""
    return max(values) > FAR_APART * max(min(values), 1e-9)
