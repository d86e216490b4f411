"""Numbers, sizes and lengths for people and for files: one table of units, one way to write each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Metres of every unit of length that a file or a person names.
METRES = {
    "m": 1.0, "meter": 1.0, "cm": 1e-2, "centimeter": 1e-2, "mm": 1e-3, "millimeter": 1e-3,
    "µm": 1e-6, "μm": 1e-6, "um": 1e-6, "micron": 1e-6, "microns": 1e-6, "micrometer": 1e-6,
    "nm": 1e-9, "nanometer": 1e-9, "Å": 1e-10, "A": 1e-10, "angstrom": 1e-10, "pm": 1e-12, "picometer": 1e-12,
}  # fmt: skip
_SHOWN = ("m", "mm", "µm", "nm")
SQUARE = 5e-3  # relative difference of width and height that is still rounding in stated sizes
SQUARE_MEASURED = 1e-2  # ... that is still error in sizes somebody measured, as by moving a stage


def number(value: float) -> str:
    """Three significant digits without exponent, e.g. ``0.123``, ``4.56``, ``1230``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as ``98.76 %``, a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def megabytes(count: float) -> str:
    """Bytes as ``12.3 MB``."""
    return f"{count / 1e6:.1f} MB"


def scaled(count: float) -> str:
    """A count with three digits and a prefix, e.g. ``812``, ``24.1 k``, ``1.26 M``, ``3.40 G``."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{number(count / size)} {prefix}"
    return f"{count:g}"


def duration(seconds: float) -> str:
    """A time for people, e.g. ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def length(metres: float, digits: int = 4) -> str:
    """A length in the unit that suits it, e.g. ``5 nm``, ``1.25 µm``, with at most so many significant digits."""
    unit = next((unit for unit in _SHOWN if metres >= METRES[unit] * (1 - 1e-9)), _SHOWN[-1])
    return f"{metres / METRES[unit]:.{digits}g} {unit}"


def micrometres(metres: float) -> float:
    """``metres`` in micrometres, without the last digits' noise: 50e-9 is 0.05, not 0.049999999999999996."""
    return float(f"{metres * 1e6:.12g}")


def plain(value: Any) -> Any:
    """``value`` with None for every NaN and infinity in it, which JSON does not know."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aligned(lines: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """Lines of a table for a terminal; columns to the right except those in ``left``."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def is_square(width: float, height: float, tolerance: float = SQUARE) -> bool:
    """Whether a pixel of ``width`` x ``height``, in any unit of length, is square but for ``tolerance``.

    Where it is not, a scale in one direction only would make areas wrong.
    """
    return math.isclose(width, height, rel_tol=tolerance)
