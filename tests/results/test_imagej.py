"""ImageJ ROIs: read with roifile, filled by both rules that readers use, they are exactly the region's pixels."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.results.imagej import outlines, write_rois
from hpddrnet_trt.results.regions import Regions, regions
from tests.toy import CLASSES

roifile: Any = pytest.importorskip("roifile")
pytest.importorskip("skimage")


def _winding(rings: list[npt.NDArray[Any]], shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """How often the rings run around each pixel's centre."""
    found = np.zeros(shape, np.int64)
    for ring in rings:
        for (x, y), (next_x, next_y) in zip(ring.astype(int), np.roll(ring, -1, axis=0).astype(int), strict=True):
            assert (x == next_x) != (y == next_y)  # along an edge, and not on the spot
            if x == next_x:
                found[min(y, next_y) : max(y, next_y), x:] += 1 if next_y > y else -1
    return found


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=10), elements=st.integers(0, 2)),
    st.sampled_from([1, 2]),
)
def test_outlines_enclose_exactly_the_regions_pixels(labels: np.ndarray, connectivity: Literal[1, 2]) -> None:
    found = regions(labels, CLASSES, connectivity=connectivity)
    for number, rings in enumerate(outlines(found), start=1):
        winding = _winding(rings, labels.shape)
        assert np.array_equal(winding != 0, found.numbers == number)  # Java's rule for ImageJ's composites
        assert np.array_equal(winding % 2 == 1, found.numbers == number)


def _rings(roi: Any) -> list[npt.NDArray[Any]]:
    closed = roi.coordinates(multi=True)
    return [ring[:-1] if np.array_equal(ring[0], ring[-1]) else ring for ring in closed]


def _picture() -> Regions:
    labels = np.zeros((30, 40), np.uint8)
    labels[5:20, 5:20] = 1
    labels[8:12, 8:12] = 2  # in a hole
    labels[14:16, 10:18] = 0
    labels[29, 39] = 1
    return regions(labels, CLASSES, background=["grain"])


def test_files_read_back(tmp_path: Path) -> None:
    """Written over an archive without regions, to which roifile's own writer would append."""
    none = regions(np.zeros((3, 3), np.uint8), CLASSES, background=["grain"])
    assert roifile.roiread(write_rois(tmp_path / "a.rois.zip", none)) == []
    found = _picture()
    path = write_rois(tmp_path / "a.rois.zip", found)
    read = roifile.roiread(path)
    assert [roi.name for roi in read] == ["1-pore", "2-clay", "3-pore"]
    assert [roi.composite for roi in read] == [True, False, False]
    assert read[1].roitype == roifile.ROI_TYPE.TRACED
    assert read[0].stroke_color == bytes([255, 250, 100, 0])
    assert read[0].properties == {"class": "pore", "region": 1}
    assert [(roi.left, roi.top, roi.right, roi.bottom) for roi in read] == [
        (5, 5, 20, 20), (8, 8, 12, 12), (39, 29, 40, 30)
    ]  # fmt: skip
    assert {roi.position for roi in read} == {0}
    for number, roi in enumerate(read, start=1):
        assert np.array_equal(_winding(_rings(roi), (30, 40)) != 0, found.numbers == number)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["1-pore.roi", "2-clay.roi", "3-pore.roi"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.rois.zip"]



def test_names_that_a_zip_cannot_hold(tmp_path: Path) -> None:
    classes = [ClassInfo(name="../a/b:c\\*γ′", color=(1, 2, 3))]
    (roi,) = roifile.roiread(write_rois(tmp_path / "a.zip", regions(np.zeros((3, 3), np.uint8), classes)))
    assert roi.name == "1-_a_b_c__γ_"
    assert roi.props.splitlines()[0] == "class: ../a/b:c\\*γ′"


def test_too_many_regions_and_too_large_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"3 regions are more than .*limit 2.*leave out small ones"):
        write_rois(tmp_path / "a.zip", _picture(), maximum=2)
    with pytest.raises(UsageError, match="reach to pixel 32767"):
        write_rois(tmp_path / "a.zip", regions(np.zeros((1, 32768), np.uint8), CLASSES))
    assert list(tmp_path.iterdir()) == []
