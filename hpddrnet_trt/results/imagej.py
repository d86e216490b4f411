"""Regions as a zip of ImageJ ROIs, for ImageJ's and Fiji's ROI manager.

Outlines follow the pixels' edges, as ImageJ's wand draws them: the ROI selects exactly the region's pixels.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, require
from hpddrnet_trt.core.files import atomic_path
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.results.regions import Regions

MAXIMUM = 10_000  # regions: ImageJ's ROI manager takes minutes to open more
_LARGEST_SIDE = 2**15 - 1  # ROI coordinates are 16-bit
_MOVE_TO, _LINE_TO, _CLOSE = 0.0, 1.0, 4.0  # java.awt.geom.PathIterator


def write_rois(path: str | Path, regions: Regions, *, maximum: int = MAXIMUM) -> Path:
    """Write one ROI a region as ``.zip`` (extra ``results``), named by number and class, in the class's colour.

    Numbers are those of :class:`~hpddrnet_trt.results.regions.Regions` and of the CSV of regions. A region without
    holes is a traced polygon, one with holes a composite of its outline and theirs. Properties say class and region;
    the stack position is left open, so that the ROIs show on every slice.

    Raises :class:`UsageError` for more than ``maximum`` regions and for images of more than 32767 pixels a side.
    """
    roifile = require("roifile", "results", "write ImageJ ROIs")
    if len(regions) > maximum:
        raise UsageError(
            f"{len(regions)} regions are more than ImageJ's ROI manager handles (limit {maximum}); leave out small "
            "ones or the background class, or write a CSV of regions instead"
        )
    if max(regions.numbers.shape) > _LARGEST_SIDE:
        raise UsageError(
            f"ImageJ ROIs reach to pixel {_LARGEST_SIDE}, the image has {regions.numbers.shape}; write OME-TIFF or "
            "OME-Zarr instead"
        )
    digits = len(str(len(regions)))
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, rings in enumerate(outlines(regions)):
            entry = regions.classes[regions.class_index[index]]
            name = f"{index + 1:0{digits}d}-{_file_name(entry.name)}"
            archive.writestr(f"{name}.roi", _roi(roifile, rings, name, entry, index + 1).tobytes())
    return Path(path)


def outlines(regions: Regions) -> Iterator[list[npt.NDArray[np.int32]]]:
    """For each region its outline, then those of its holes: int32 ``[N, 2]`` corners (x, y) on the pixels' edges.

    The top left pixel's corners are (0, 0) to (1, 1). Outline and holes run in opposite directions.
    """
    for number, (left, top, width, height) in enumerate(regions.box_px.tolist(), start=1):
        mask = (regions.numbers[top : top + height, left : left + width] == number).astype(np.uint8)
        # OpenCV traces the centres of border pixels. In a picture twice as large these lie beside the edges of the
        # original's pixels, and halving brings them onto the corners: exact, also at diagonal neighbours.
        double = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        traced, _ = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        rings = [_corners((ring[:, 0, :] + 1) // 2) + np.array([left, top], np.int32) for ring in traced]
        # OpenCV does not promise an order: the outline is the ring that encloses most.
        yield sorted(rings, key=lambda ring: -abs(_area(ring)))


def _corners(points: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """A closed path without repeated points and without points on straight lines."""
    points = points[np.any(points != np.roll(points, 1, axis=0), axis=1)]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _area(ring: npt.NDArray[np.int32]) -> float:
    """Signed area of a closed path."""
    x, y = ring.T.astype(np.float64)
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _roi(roifile: Any, rings: list[npt.NDArray[np.int32]], name: str, entry: ClassInfo, number: int) -> Any:
    if len(rings) == 1:
        roi = roifile.ImagejRoi.frompoints(rings[0], name=name)
        roi.roitype = roifile.ROI_TYPE.TRACED
        roi.options = roifile.ROI_OPTIONS.NONE
        # roifile adds a pixel to the bounds, as for points; these are corners
        roi.right, roi.bottom = (int(value) for value in rings[0].max(axis=0))
    else:
        roi = roifile.ImagejRoi()
        roi.roitype = roifile.ROI_TYPE.RECT  # which a composite is stored as
        roi.name = name
        roi.left, roi.top = (int(value) for value in rings[0].min(axis=0))
        roi.right, roi.bottom = (int(value) for value in rings[0].max(axis=0))
        roi.multi_coordinates = np.concatenate([_path(ring) for ring in rings]).astype(np.float32)
        roi.shape_roi_size = len(roi.multi_coordinates)
    roi.stroke_color = bytes([255, *entry.color])
    roi.props = f"class: {entry.name}\nregion: {number}\n"
    return roi


def _path(ring: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Steps of a composite ROI: (move, x, y), (line, x, y) ..., close."""
    steps = np.concatenate([np.full((len(ring), 1), _LINE_TO), ring], axis=1)
    steps[0, 0] = _MOVE_TO
    return np.append(steps.ravel(), _CLOSE)


def _file_name(text: str) -> str:
    """What a name inside a zip may hold on every system."""
    return re.sub(r"[^\w .()+-]", "_", text).strip(" .")[:80] or "class"
