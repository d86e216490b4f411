"""When one number says a pixel's size: a scale in one direction only would make areas wrong."""

from __future__ import annotations

import math

SQUARE = 5e-3  # relative difference of width and height that is still rounding in stated sizes
SQUARE_MEASURED = 1e-2  # ... that is still error in sizes somebody measured, as by moving a stage


def is_square(width: float, height: float, tolerance: float = SQUARE) -> bool:
    """Whether a pixel of ``width`` x ``height``, in any unit of length, is square but for ``tolerance``."""
    return math.isclose(width, height, rel_tol=tolerance)
