"""Grey windows: from any depth to 8 bits, with one window for the whole picture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.data.micrograph import Percentiles, to_grey8


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_8_bit_passes_unchanged(pixels: np.ndarray) -> None:
    grey, window = to_grey8(pixels)
    np.testing.assert_array_equal(grey, pixels)
    assert window == (0.0, 255.0)


@given(
    st.one_of(
        hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)),
        hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)),
    )
)
def test_windowing_keeps_order_and_is_repeatable(pixels: np.ndarray) -> None:
    if not np.isfinite(pixels).any():
        with pytest.raises(ContractError, match="no finite value"):
            to_grey8(pixels)
        return
    grey, window = to_grey8(pixels)
    assert window[0] < window[1]
    again, same = to_grey8(pixels, window)
    np.testing.assert_array_equal(grey, again)
    assert same == window
    values = np.nan_to_num(pixels, nan=-np.inf).ravel()
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(grey.ravel()[order].astype(int)) >= 0)


def test_default_window_leaves_hot_pixels_outside() -> None:
    pixels = np.random.default_rng(0).normal(1000, 50, (200, 200)).astype(np.uint16)
    pixels[0, :5] = 65535
    grey, (black, white) = to_grey8(pixels)
    assert 700 < black < 1000 < white < 1300
    assert 110 < np.median(grey) < 145


def test_window_is_linear_and_clips() -> None:
    pixels = np.array([[0, 100, 160, 200, 300]], dtype=np.uint16)
    grey, _ = to_grey8(pixels, (100, 200))
    assert grey.tolist() == [[0, 0, 153, 255, 255]]
    assert to_grey8(pixels.astype(np.float32), (100, 200))[0].tolist() == grey.tolist()
    assert to_grey8(pixels.clip(0, 255).astype(np.uint8), (100, 200))[0].tolist() == grey.tolist()


def test_constant_picture_and_wrong_arrays() -> None:
    grey, window = to_grey8(np.full((4, 4), 77, np.uint16))
    assert grey.max() == 0
    assert window == (77, 78)
    for wrong in (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2)), np.zeros((0, 4), np.uint8)):
        with pytest.raises(ContractError, match="two-dimensional"):
            to_grey8(wrong)
    for window in ((5.0, 5.0), (9.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ContractError, match="window"):
            to_grey8(np.zeros((2, 2), np.uint16), window)


def test_8_bit_is_not_even_copied() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert to_grey8(pixels)[0] is pixels


@given(
    hnp.arrays(
        st.sampled_from([np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32)]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements={"allow_nan": False, "allow_infinity": False, "min_value": 0, "max_value": 200},
    ),
    st.floats(0, 49),
    st.floats(50, 100),
)
def test_percentiles_are_numpys(pixels: np.ndarray, black: float, white: float) -> None:
    expected = tuple(np.percentile(pixels.astype(np.float64), (black, white)))
    window = to_grey8(pixels, Percentiles(black, white))[1]
    if expected[0] < expected[1]:
        assert window == pytest.approx(expected, rel=1e-9, abs=1e-9)
    else:
        assert window[0] < window[1]


def test_percentiles_stretch_8_bit_pictures_too() -> None:
    pixels = np.tile(np.arange(100, 150, dtype=np.uint8), (20, 1))
    grey, window = to_grey8(pixels, Percentiles(0, 100))
    assert window == (100, 149)
    assert (grey.min(), grey.max()) == (0, 255)
    np.testing.assert_array_equal(to_grey8(pixels, window)[0], grey)


@pytest.mark.parametrize(("black", "white"), [(-1, 50), (50, 50), (99, 1), (0, 101), (float("nan"), 99)])
def test_senseless_percentiles(black: float, white: float) -> None:
    with pytest.raises(ContractError, match="percentiles"):
        Percentiles(black, white)
