"""Square pixels: no unit, no order of the sides, and no rounding changes the answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.core.pixel_size import SQUARE, SQUARE_MEASURED, is_square

sizes = st.floats(1e-12, 1e-3)


@given(sizes, st.floats(0.5, 2), st.sampled_from((SQUARE, SQUARE_MEASURED)))
def test_sides_are_alike_in_any_unit(width: float, ratio: float, tolerance: float) -> None:
    height = width * ratio
    if abs(abs(1 - min(ratio, 1 / ratio)) - tolerance) < 1e-9:
        return  # on the border itself, where rounding decides
    assert is_square(width, height, tolerance) == is_square(height, width, tolerance)
    assert is_square(width, height, tolerance) == is_square(1e9 * width, 1e9 * height, tolerance)


@pytest.mark.parametrize(
    ("ratio", "stated", "measured"),
    [(1.0, True, True), (1.004, True, True), (1.008, False, True), (1.02, False, False)],
)
def test_tolerances(ratio: float, stated: bool, measured: bool) -> None:
    assert is_square(1e-9, ratio * 1e-9) is stated
    assert is_square(1e-9, ratio * 1e-9, SQUARE_MEASURED) is measured
