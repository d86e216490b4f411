"""Which factor brings a picture to a model's pixel size, and when it says that the result may be wrong."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from hpddrnet_trt.core.magnification import TOLERANCE, rescaling
from hpddrnet_trt.core.manifest import DataRecord

ONE, RANGE = (10e-9, 10e-9), (10e-9, 20e-9)


@pytest.mark.parametrize(
    ("size", "trained", "factor"),
    [
        (None, ONE, None), (10e-9, ONE, 1.0), (10e-9 * (TOLERANCE - 0.01), ONE, 1.0), (20e-9, ONE, 2.0),
        (2.5e-9, ONE, 0.25), (15e-9, RANGE, 1.0), (40e-9, RANGE, 2.0), (5e-9, RANGE, 0.5),
    ],
)  # fmt: skip
def test_a_picture_is_brought_to_the_nearest_pixel_size(
    size: float | None, trained: tuple[float, float], factor: float | None
) -> None:
    found = rescaling(size, trained, (100, 100))
    assert found.factor == (None if factor is None else pytest.approx(factor))
    assert found.remark is None


def test_enlarging_far_is_done_and_told_with_both_figures() -> None:
    found = rescaling(40e-9, ONE, (100, 100))
    assert found.factor == pytest.approx(4)
    assert found.remark is not None
    assert all(figure in found.remark for figure in ("40 nm", "10 nm", "enlarged 4 times"))


@pytest.mark.parametrize("size", [0.0, -1.0, math.nan, math.inf, 1.0, 1e-15])
def test_senseless_pixel_sizes_never_rescale_and_are_told(size: float) -> None:
    found = rescaling(size, ONE, (100, 100))
    assert found.factor is None
    assert found.remark is not None
    assert "no microscope" in found.remark


@pytest.mark.parametrize(("size", "shape"), [(1e-6, (100, 100)), (1e-10, (100, 100)), (50e-9, (10_000, 10_000))])
def test_what_is_too_far_apart_is_read_as_it_is_and_told(size: float, shape: tuple[int, int]) -> None:
    found = rescaling(size, ONE, shape)
    assert found.factor is None
    assert found.remark is not None
    assert "too far apart" in found.remark


def test_the_description_of_the_data_knows_at_which_pixel_size_it_was_read() -> None:
    assert DataRecord(name="a").read_at_m is None  # as of every older file
    assert DataRecord(name="a", pixel_size_m=RANGE).read_at_m == RANGE
    assert DataRecord(name="a", pixel_size_m=RANGE, common_pixel_size_m=12e-9).read_at_m == (12e-9, 12e-9)
    for wrong in ((2e-9, 1e-9), (0.0, 1e-9), (1e-9, 1.0)):
        with pytest.raises(ValidationError):
            DataRecord(name="a", pixel_size_m=wrong)
