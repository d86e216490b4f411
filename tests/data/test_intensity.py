"""Any depth in 8 bits: the same picture gives the same grey levels, and a guess is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.manifest import IntensityRecord
from hpddrnet_trt.data.intensity import FullScale, Percentiles, bit_depth, range_of, to_grey8, training_range

# The ways in which an 8-bit picture is written in more bits.
COPIES: dict[str, Any] = {
    "both bytes": lambda grey: grey.astype(np.uint16) * 257,
    "high byte": lambda grey: grey.astype(np.uint16) << 8,
    "low byte": lambda grey: grey.astype(np.uint16),
    "12 bits, scaled": lambda grey: np.rint(grey * (4095 / 255)).astype(np.uint16),
    "12 bits, shifted": lambda grey: grey.astype(np.uint16) << 4,
    "14 bits, shifted": lambda grey: grey.astype(np.uint16) << 6,
    "float 0 to 1": lambda grey: (grey / np.float32(255)).astype(np.float32),
    "float 0 to 255": lambda grey: grey.astype(np.float32),
    "float 0 to 65535": lambda grey: grey.astype(np.float32) * 257,
}
bright = arrays.arrays(np.uint8, (4, 5), elements=st.integers(0, 255)).map(
    lambda grey: np.vstack([grey, [[20, 50, 90, 150, 201]]]).astype(
        np.uint8
    )  # some contrast; the bright half tells depth
)
dark = arrays.arrays(np.uint8, (3, 3), elements=st.integers(0, 59)).map(
    lambda grey: np.vstack([grey, np.full((1, 3), 59, np.uint8)])
)


@pytest.mark.parametrize("copy", COPIES)
@given(bright)
def test_copies_of_a_picture_in_any_depth_are_the_picture(copy: str, grey: npt.NDArray[np.uint8]) -> None:
    assert np.array_equal(to_grey8(COPIES[copy](grey)).pixels, grey)


@pytest.mark.parametrize("copy", ["both bytes", "high byte", "12 bits, shifted", "14 bits, shifted"])
@given(dark)
def test_dark_copies_are_recognised_by_their_bits(copy: str, grey: npt.NDArray[np.uint8]) -> None:
    assert np.array_equal(to_grey8(COPIES[copy](grey)).pixels, grey)


@pytest.mark.parametrize(
    ("largest", "full", "doubtful"),
    [(200, 255, True), (600, 1023, False), (400, 1023, True), (3001, 4095, False), (1501, 4095, True),
     (9001, 16383, False), (16385, 65535, False), (65535, 65535, False)],
)  # fmt: skip
def test_16_bit_files_are_as_deep_as_their_largest_value(largest: int, full: float, doubtful: bool) -> None:
    pixels = np.array([[0, 1, largest]] * 9, np.uint16)
    grey, window, remarks = to_grey8(pixels)
    assert window == (0, full)
    assert grey[0, 2] == round(largest / full * 255)
    assert [f"values reach {largest} only" in remark for remark in remarks] == [True] * doubtful


def test_depth_of_the_training_pictures_decides_about_dark_ones() -> None:
    dark = np.array([[3, 700]], np.uint16)
    assert to_grey8(dark).window == (0, 1023)
    assert to_grey8(dark, FullScale(bits=12)).window == (0, 4095)
    assert to_grey8(dark, FullScale(bits=12)).remarks == ()
    assert to_grey8(dark * 90, FullScale(bits=12)).window[1] > 60_000  # deeper than those: its own full scale


def test_what_would_keep_no_contrast_is_stretched_and_told() -> None:
    pixels = np.random.default_rng(0).normal(1000, 50, (200, 200)).astype(np.uint16)
    pixels[0, :5] = 65535  # hot pixels
    grey, (black, white), remarks = to_grey8(pixels)
    assert 700 < black < 1000 < white < 1300
    assert 110 < np.median(grey) < 145
    assert "of its full scale, which 8 bits would leave without contrast" in remarks[0]
    assert to_grey8(pixels, (0, 65535)).remarks == ()


@pytest.mark.parametrize("values", [[-3.0, 2.5], [0.0, 0.004], [0.0, 77.5], [0.0, 1e6]])
def test_floats_of_other_units_get_their_percentiles_and_a_remark(values: list[float]) -> None:
    pixels = np.linspace(*values, 10_000, dtype=np.float32).reshape(100, 100)
    grey, window, remarks = to_grey8(pixels)
    assert window == pytest.approx(np.percentile(pixels.astype(float), (0.1, 99.9)), rel=1e-4)
    assert "do not tell what is black and white" in remarks[0]
    assert (grey[0, 0], grey[-1, -1]) == (0, 255)
    assert to_grey8(pixels, window).remarks == ()


def test_pixels_that_are_no_numbers_are_black_and_told() -> None:
    pixels = np.array([[np.nan, 0.5, 1.0, np.inf, -np.inf]], np.float32)
    grey, _, remarks = to_grey8(pixels)
    assert grey.tolist() == [[0, 128, 255, 255, 0]]
    assert remarks == ("3 of its pixels are NaN or infinite: NaN is taken as black",)
    with pytest.raises(ContractError, match="holds no finite value"):
        to_grey8(np.full((2, 2), np.nan, np.float32))


def test_8_bits_pass_untouched_and_other_shares_of_full_scale_stretch_them() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert to_grey8(grey).pixels is grey
    assert to_grey8(grey, FullScale(0.2, 0.6)).window == pytest.approx((51, 153))


@given(arrays.arrays(np.uint16, (5, 6)), st.floats(0, 40), st.floats(41, 100))
def test_percentiles_are_numpys(pixels: npt.NDArray[np.uint16], black: float, white: float) -> None:
    expected = np.percentile(pixels, (black, white))
    _, window, _ = to_grey8(pixels, Percentiles(black, white))
    if expected[0] < expected[1]:
        assert window == pytest.approx(tuple(expected))
    else:  # nearly constant: what there is of a range
        assert window[0] < window[1]


@given(
    st.sampled_from([np.uint16, np.float32]).flatmap(lambda kind: arrays.arrays(kind, (4, 7))),
    st.sampled_from([None, (100.0, 200.0), Percentiles(1, 99)]),
)
def test_order_is_kept_and_the_range_repeats_it(pixels: npt.NDArray[Any], given_range: Any) -> None:
    if not np.isfinite(pixels).any():
        return
    grey, window, _ = to_grey8(pixels, given_range)
    assert np.array_equal(to_grey8(pixels, window).pixels, grey)
    order = np.argsort(np.nan_to_num(pixels, nan=-np.inf).ravel(), kind="stable")
    assert np.all(np.diff(grey.ravel()[order].astype(int)) >= 0)


def test_a_range_is_linear_and_clips() -> None:
    pixels = np.array([[0, 100, 160, 200, 255]], np.uint16)
    for kind in (np.uint8, np.uint16, np.float32):
        assert to_grey8(pixels.astype(kind), (100, 200)).pixels.tolist() == [[0, 0, 153, 255, 255]]


@pytest.mark.parametrize("wrong", [(5, 5), (2, 1), (0, float("nan")), (0, float("inf"))])
def test_empty_ranges_are_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(ContractError, match="intensity range"):
        to_grey8(np.zeros((2, 2), np.uint8), wrong)


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 2, 3), np.uint8), np.zeros((0, 2), np.uint8), np.zeros((2, 2), np.int64)]
)
def test_what_is_no_grey_picture_is_refused(pixels: npt.NDArray[Any]) -> None:
    with pytest.raises(ContractError, match="two-dimensional"):
        to_grey8(pixels)


@pytest.mark.parametrize(("black", "white"), [(-1, 50), (50, 50), (99, 1), (0, 101), (float("nan"), 99)])
def test_senseless_percentiles_and_shares(black: float, white: float) -> None:
    with pytest.raises(ContractError, match="percentiles"):
        Percentiles(black, white)
    if not black < white:
        with pytest.raises(ContractError, match="black < white"):
            FullScale(black, white)


# --- what a model records


def _record(*pictures: npt.NDArray[Any]) -> tuple[IntensityRecord, tuple[str, ...]]:
    return training_range(iter(pictures))


def test_training_on_8_bits_records_full_scale() -> None:
    narrow = np.full((9, 9), 100, np.uint8)
    assert _record(narrow, narrow) == (IntensityRecord(bits=8), ())


def test_training_on_more_bits_records_their_depth() -> None:
    ramp = np.linspace(0, 4000, 400).astype(np.uint16).reshape(20, 20)
    record, remarks = _record(ramp // 9, ramp)
    assert record == IntensityRecord(bits=12)
    assert "pictures of different depth are mixed (1 of 10 bits, 1 of 12 bits)" in remarks[0]


def test_pictures_that_use_little_of_their_depth_are_stretched_alike() -> None:
    ramp = np.linspace(30_000, 34_000, 400).astype(np.uint16).reshape(20, 20)
    record, remarks = _record(ramp, ramp + np.uint16(500))
    assert (record.unit, record.bits) == ("full-scale", 16)
    assert remarks == ("pictures use 6.9% of their full scale: that part becomes black to white",)
    window = to_grey8(ramp, range_of(record)).window
    assert window == pytest.approx((30_000, 34_500), abs=20)
    in_8_bits = (ramp >> 8).astype(np.uint8)  # the same picture in fewer bits: the same black and white
    assert to_grey8(in_8_bits, range_of(record)).window == pytest.approx(np.array(window) / 257, rel=1e-3)


def test_floats_of_other_units_record_values() -> None:
    one, other = (np.linspace(low, low + 4, 400, dtype=np.float32).reshape(20, 20) for low in (-3, -1))
    record, _ = _record(one, other)
    assert (record.unit, record.bits) == ("value", None)
    assert range_of(record) == pytest.approx((-3, 3), abs=0.02)


def test_records_become_ranges() -> None:
    assert range_of(None) == FullScale()
    assert range_of(IntensityRecord(bits=12)) == FullScale(bits=12)
    assert range_of(IntensityRecord(unit="percentile", black=1, white=99)) == Percentiles(1, 99)
    assert bit_depth(np.zeros((2, 2), np.float32)) is None
    with pytest.raises(ValueError, match="black < white"):
        IntensityRecord(black=1, white=1)
