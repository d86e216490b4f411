"""Numbers for people."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Three significant digits without exponent, e.g. ``0.123``, ``4.56``, ``1230``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as ``98.76 %``, a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"
