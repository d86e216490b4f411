"""Label maps in numbers: area fractions and connected regions, in pixels and, where the pixel size is known, metres."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, require
from hpddrnet_trt.core.manifest import IGNORE_INDEX, ClassInfo
from hpddrnet_trt.data.labels import check_labels

_BLOCK = 1 << 20  # pixels counted at a time: OpenCV counts in single precision, exact up to 2^24
_ROUND = 1e-6  # axes closer than this, relative to the major one, have no direction


@dataclass(frozen=True)
class AreaFraction:
    """One class in one image. ``fraction`` of all pixels, 0 to 1; ``area_m2`` None when the pixel size is unknown;
    ``low`` and ``high``: the 95 % interval of the true fraction, None where there is none."""

    name: str
    pixels: int
    fraction: float
    area_m2: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Regions:
    """Connected regions of one class each, numbered from 1 in the order of their first pixel, row by row.

    ``numbers``: int32 ``[H, W]``, the region of each pixel, 0 for none. All other arrays have one entry a
    region, at ``number - 1``:

    - ``class_index`` uint8, ``area_px`` int64 in pixels;
    - ``equivalent_diameter_px``: of the disc of equal area;
    - ``centroid_px`` ``[N, 2]``: x, y; the centre of the top left pixel is (0, 0);
    - ``axes_px`` ``[N, 2]``: major and minor axis of the ellipse of equal second moments;
    - ``orientation_deg``: of the major axis against the horizontal, counter-clockwise as seen, 0 to 180; NaN for
      regions without a direction (one pixel, a square, a disc);
    - ``box_px`` int64 ``[N, 4]``: left, top, width, height;
    - ``touches_border`` bool: cut by the image's border, so that area and shape are a part's.
    """

    numbers: npt.NDArray[np.int32]
    class_index: npt.NDArray[np.uint8]
    area_px: npt.NDArray[np.int64]
    equivalent_diameter_px: npt.NDArray[np.float64]
    centroid_px: npt.NDArray[np.float64]
    axes_px: npt.NDArray[np.float64]
    orientation_deg: npt.NDArray[np.float64]
    box_px: npt.NDArray[np.int64]
    touches_border: npt.NDArray[np.bool_]
    classes: tuple[ClassInfo, ...]
    pixel_size_m: float | None

    def __len__(self) -> int:
        return len(self.class_index)

    @property
    def area_m2(self) -> npt.NDArray[np.float64] | None:
        """Areas in square metres; None when the pixel size is unknown."""
        return None if self.pixel_size_m is None else self.area_px.astype(np.float64) * self.pixel_size_m**2

    @property
    def equivalent_diameter_m(self) -> npt.NDArray[np.float64] | None:
        """Equivalent diameters in metres; None when the pixel size is unknown."""
        return None if self.pixel_size_m is None else self.equivalent_diameter_px * self.pixel_size_m


def area_fractions(
    labels: npt.NDArray[np.uint8], classes: Sequence[ClassInfo], pixel_size_m: float | None = None
) -> list[AreaFraction]:
    """Pixels, fraction and area (square metres, None when ``pixel_size_m`` is) of each class, in their order.

    ``labels``: uint8 ``[H, W]``. Fractions are of all pixels, also of those that no class has.
    """
    check_labels(labels)
    flat = labels.ravel()
    counts = np.zeros(256, np.int64)
    for start in range(0, flat.size, _BLOCK):
        counts += cv2.calcHist([flat[start : start + _BLOCK]], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    area = None if pixel_size_m is None else check_pixel_size(pixel_size_m) ** 2
    return [
        AreaFraction(entry.name, int(count), float(count / labels.size), None if area is None else float(count * area))
        for entry, count in zip(classes, counts, strict=False)
    ]


def regions(
    labels: npt.NDArray[np.uint8],
    classes: Sequence[ClassInfo],
    pixel_size_m: float | None = None,
    *,
    background: Collection[str] = (),
    connectivity: Literal[1, 2] = 2,
    smallest: int = 1,
) -> Regions:
    """Connected regions of equal class, measured with scikit-image (extra ``results``).

    ``labels``: uint8 ``[H, W]``. ``background``: names of classes that are not taken apart; by default every class
    counts, also a matrix around all others, which is then one large region. ``connectivity``: 2, diagonal
    neighbours belong together; 1, only those that share an edge. ``smallest``: regions of fewer pixels are left
    out. Pixels that no class has belong to no region.

    Raises :class:`UsageError` for a background that is no class and for impossible numbers.
    """
    check_labels(labels)
    if pixel_size_m is not None:
        check_pixel_size(pixel_size_m)
    if connectivity not in (1, 2):
        raise UsageError(f"connectivity is 1 (shared edges) or 2 (corners too), got {connectivity}")
    if smallest < 1:
        raise UsageError(f"the smallest region has at least 1 pixel, got {smallest}")
    wanted = check_background(background, classes)
    skimage = require("skimage.measure", "results", "measure regions")
    foreground = np.full(256, IGNORE_INDEX, np.uint8)
    foreground[wanted] = wanted
    kept = foreground[labels]
    numbers, count = skimage.label(kept, background=IGNORE_INDEX, connectivity=connectivity, return_num=True)
    numbers, count = _without_small(numbers, count, smallest)
    class_index = np.zeros(count + 1, np.uint8)
    class_index[numbers] = kept  # all pixels of a region say the same
    table = skimage.regionprops_table(
        numbers,
        properties=("area", "bbox", "centroid", "orientation", "axis_major_length", "axis_minor_length",
                    "equivalent_diameter_area"),
    )  # fmt: skip
    top, left, bottom, right = (table[f"bbox-{side}"].astype(np.int64) for side in range(4))
    height, width = labels.shape
    major, minor = table["axis_major_length"], table["axis_minor_length"]
    # scikit-image measures from the rows' axis, counter-clockwise as seen; we do as ImageJ does, from the x axis.
    degrees = np.mod(np.degrees(table["orientation"].astype(np.float64)) + 90, 180)
    return Regions(
        numbers=numbers,
        class_index=class_index[1:],
        area_px=table["area"].astype(np.int64),
        equivalent_diameter_px=table["equivalent_diameter_area"].astype(np.float64),
        centroid_px=np.stack([table["centroid-1"], table["centroid-0"]], axis=1).astype(np.float64),
        axes_px=np.stack([major, minor], axis=1).astype(np.float64),
        orientation_deg=np.where(major - minor > _ROUND * major, degrees, np.nan),
        box_px=np.stack([left, top, right - left, bottom - top], axis=1),
        touches_border=(left == 0) | (top == 0) | (right == width) | (bottom == height),
        classes=tuple(classes),
        pixel_size_m=pixel_size_m,
    )


def check_background(background: Collection[str], classes: Sequence[ClassInfo]) -> list[int]:
    """Indices of the classes that are not ``background``; :class:`UsageError` for a name that is no class."""
    if isinstance(background, str):
        raise UsageError(f"background is a list of class names, got the text {background!r}; write [{background!r}]")
    names = [entry.name for entry in classes]
    for name in background:
        if name not in names:
            raise UsageError(f"background {name!r} is no class of this model; choose from: {', '.join(names)}")
    return [index for index, name in enumerate(names) if name not in background]


def check_pixel_size(pixel_size_m: float) -> float:
    """The pixel size in metres, or :class:`UsageError` when it is none: 0 is not a size, None means unknown."""
    if not (np.isfinite(pixel_size_m) and pixel_size_m > 0):
        raise UsageError(f"a pixel size is a positive number of metres, got {pixel_size_m}; None means unknown")
    return float(pixel_size_m)


def _without_small(numbers: npt.NDArray[Any], count: int, smallest: int) -> tuple[npt.NDArray[np.int32], int]:
    """Drop regions of fewer pixels and number the others anew, in the same order."""
    if smallest == 1:
        return numbers.astype(np.int32), count
    large = np.bincount(numbers.ravel(), minlength=count + 1) >= smallest
    large[0] = False
    renamed = np.where(large, np.cumsum(large), 0).astype(np.int32)
    return renamed[numbers], int(large.sum())
