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
from hpddrnet_trt.results import separate as objects
from hpddrnet_trt.results.parts import figures, parts_of

_BLOCK = 1 << 20  # pixels counted at a time: OpenCV counts in single precision, exact up to 2^24


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
class RegionTable:
    """Figures of connected regions of one class each; all arrays have one entry a region.

    - ``class_index`` uint8, ``area_px`` int64 in pixels;
    - ``equivalent_diameter_px``: of the disc of equal area;
    - ``centroid_px`` ``[N, 2]``: x, y; the centre of the top left pixel is (0, 0);
    - ``axes_px`` ``[N, 2]``: major and minor axis of the ellipse of equal second moments;
    - ``orientation_deg``: of the major axis against the horizontal, counter-clockwise as seen, 0 to 180; NaN for
      regions without a direction (one pixel, a square, a disc);
    - ``box_px`` int64 ``[N, 4]``: left, top, width, height;
    - ``touches_border`` bool: cut by the image's border, so that area and shape are a part's;
    - ``perimeter_px``: by Crofton's formula in four directions, which is right on average for any direction;
    - ``circularity``: 4 pi area / perimeter^2, 1 for a disc; of a few pixels it can be more;
    - ``solidity``: area over that of the convex hull, both of pixels as squares; 1 for a convex region;
    - ``feret_px`` ``[N, 2]``: largest and smallest distance of two parallel lines that touch it on both sides;
    - ``neighbors`` int64: how many other regions it touches;
    - ``nearest_px``: from its centroid to the nearest one of its class, NaN where there is no other;
    - ``weight``: how many such regions stand for it in an unbiased count: 0 if cut by the border, else the share of
      places in the picture at which it would not be cut, inverted (Miles 1974; Lantuejoul 1980), counted in pixels:
      W H / ((W - width - 1) (H - height - 1)). Large regions are cut more often, so means and distributions need it.
    """

    class_index: npt.NDArray[np.uint8]
    area_px: npt.NDArray[np.int64]
    equivalent_diameter_px: npt.NDArray[np.float64]
    centroid_px: npt.NDArray[np.float64]
    axes_px: npt.NDArray[np.float64]
    orientation_deg: npt.NDArray[np.float64]
    box_px: npt.NDArray[np.int64]
    touches_border: npt.NDArray[np.bool_]
    perimeter_px: npt.NDArray[np.float64]
    circularity: npt.NDArray[np.float64]
    solidity: npt.NDArray[np.float64]
    feret_px: npt.NDArray[np.float64]
    neighbors: npt.NDArray[np.int64]
    nearest_px: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
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


@dataclass(frozen=True)
class Regions(RegionTable):
    """The regions of a picture, numbered from 1 in the order of their first pixel, row by row.

    ``numbers``: int32 ``[H, W]``, the region of each pixel, 0 for none; entries of :class:`RegionTable` are at
    ``number - 1``.
    """

    numbers: npt.NDArray[np.int32]


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
    separate: Collection[str] = (),
    confidence: npt.NDArray[np.float32] | None = None,
) -> Regions:
    """Connected regions of equal class, measured with scikit-image (extra ``results``).

    ``labels``: uint8 ``[H, W]``. ``background``: names of classes that are not taken apart; by default every class
    counts, also a matrix around all others, which is then one large region. ``connectivity``: 2, diagonal
    neighbours belong together; 1, only those that share an edge. ``smallest``: regions of fewer pixels are left
    out. ``separate``: names of classes whose touching objects are taken apart
    (:mod:`hpddrnet_trt.results.separate`), with the ``confidence`` ``[H, W]`` of the labels where there is one. Pixels
    that no class has belong to no region.

    Raises :class:`UsageError` for a background that is no class, for a class to separate that is none or background,
    and for impossible numbers.
    """
    check_labels(labels)
    wanted = check_choices(classes, pixel_size_m, background, connectivity, smallest)
    apart = check_separate(separate, background, classes)
    kept = of_classes(labels, wanted)
    whole = kept.copy()
    whole[np.isin(kept, apart)] = IGNORE_INDEX
    numbers, count = numbered(whole, connectivity)
    for index in apart:
        parts, of_class = objects.separate(kept == index, confidence, connectivity=connectivity, smallest=smallest)
        numbers = np.where(parts > 0, parts + count, numbers)
        count += of_class
    if apart:
        numbers = _in_order(numbers, count)
    numbers, count = _without_small(numbers, count, smallest)
    measured = parts_of(numbers, count)
    of_each = figures(measured)
    class_index = kept[measured.box[:, 1], measured.first_column]  # all pixels of a region say the same
    cut = at_border(measured.box, labels.shape)
    pairs, _ = objects.touching(numbers, connectivity)
    return Regions(
        numbers=numbers,
        class_index=class_index,
        touches_border=cut,
        neighbors=np.bincount(pairs.ravel(), minlength=count + 1)[1:].astype(np.int64),
        nearest_px=_nearest(of_each["centroid_px"], class_index),
        weight=weights(of_each["box_px"], cut, labels.shape),
        classes=tuple(classes),
        pixel_size_m=pixel_size_m,
        **of_each,
    )


def check_choices(
    classes: Sequence[ClassInfo], pixel_size_m: float | None, background: Collection[str], connectivity: int,
    smallest: int,
) -> list[int]:  # fmt: skip
    """Indices of the classes that are taken apart; :class:`UsageError` for what :func:`regions` refuses."""
    if pixel_size_m is not None:
        check_pixel_size(pixel_size_m)
    if connectivity not in (1, 2):
        raise UsageError(f"connectivity is 1 (shared edges) or 2 (corners too), got {connectivity}")
    if smallest < 1:
        raise UsageError(f"the smallest region has at least 1 pixel, got {smallest}")
    return check_background(background, classes)


def of_classes(labels: npt.NDArray[np.uint8], wanted: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The labels of the ``wanted`` classes, and :data:`IGNORE_INDEX` for all others."""
    foreground = np.full(256, IGNORE_INDEX, np.uint8)
    foreground[wanted] = wanted
    return foreground[labels]


def numbered(labels: npt.NDArray[np.uint8], connectivity: Literal[1, 2]) -> tuple[npt.NDArray[np.int32], int]:
    """Connected regions of equal label: int32 ``[H, W]``, from 1 in the order of their first pixel, 0 where the label
    is :data:`IGNORE_INDEX`; and how many there are."""
    skimage = require("skimage.measure", "results", "measure regions")
    numbers, count = skimage.label(labels, background=IGNORE_INDEX, connectivity=connectivity, return_num=True)
    return numbers.astype(np.int32), int(count)


def at_border(box: npt.NDArray[np.int64], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which regions the border of a picture of ``shape`` (height, width) cuts, from their boxes in
    :class:`~hpddrnet_trt.results.parts.Parts`."""
    height, width = shape
    left, top, right, bottom = box.T
    return np.asarray((left == 0) | (top == 0) | (right == width) | (bottom == height))


def weights(
    box_px: npt.NDArray[np.int64], cut: npt.NDArray[np.bool_], shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """:attr:`RegionTable.weight` in a picture of ``shape`` (height, width)."""
    height, width = shape
    free = (width - box_px[:, 2] - 1) * (height - box_px[:, 3] - 1)
    return np.where(cut, 0, height * width / np.where(cut, 1, free))


def _checked_names(option: str, chosen: Collection[str], classes: Sequence[ClassInfo], called: str) -> list[str]:
    """The names of all classes; :class:`UsageError` for a ``chosen`` one that is none, whom ``called`` names."""
    if isinstance(chosen, str):
        raise UsageError(f"{option} is a list of class names, got the text {chosen!r}; write [{chosen!r}]")
    names = [entry.name for entry in classes]
    for name in chosen:
        if name not in names:
            raise UsageError(f"{called.format(name)} is no class of this model; choose from: {', '.join(names)}")
    return names


def check_background(background: Collection[str], classes: Sequence[ClassInfo]) -> list[int]:
    """Indices of the classes that are not ``background``; :class:`UsageError` for a name that is no class."""
    names = _checked_names("background", background, classes, "background {!r}")
    return [index for index, name in enumerate(names) if name not in background]


def check_separate(separate: Collection[str], background: Collection[str], classes: Sequence[ClassInfo]) -> list[int]:
    """Indices of the classes whose objects are taken apart; :class:`UsageError` for one that is none, or background."""
    names = _checked_names("separate", separate, classes, "{!r}, to be separated,")
    for name in separate:
        if name in background:
            raise UsageError(f"class {name!r} cannot be both background and separated; leave out one of them")
    return [index for index, name in enumerate(names) if name in separate]


def check_pixel_size(pixel_size_m: float) -> float:
    """The pixel size in metres, or :class:`UsageError` when it is none: 0 is not a size, None means unknown."""
    if not (np.isfinite(pixel_size_m) and pixel_size_m > 0):
        raise UsageError(f"a pixel size is a positive number of metres, got {pixel_size_m}; None means unknown")
    return float(pixel_size_m)


def _in_order(numbers: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int32]:
    """Number regions anew in the order of their first pixel, row by row."""
    first = np.zeros(count + 1, np.int64)
    first[numbers.ravel()[::-1]] = np.arange(numbers.size - 1, -1, -1)  # of a region's pixels the last one written
    renamed = np.zeros(count + 1, np.int32)
    renamed[1 + np.argsort(first[1:])] = np.arange(1, count + 1)
    return renamed[numbers]


def _nearest(
    centroids: npt.NDArray[np.float64], class_index: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    """Distance of each centroid to the nearest other one of its class; NaN where there is none."""
    spatial = require("scipy.spatial", "results", "find the neighbors of regions")
    nearest = np.full(len(centroids), np.nan)
    for index in np.unique(class_index):
        of_class = np.flatnonzero(class_index == index)
        if len(of_class) > 1:
            distances, _ = spatial.cKDTree(centroids[of_class]).query(centroids[of_class], k=2)
            nearest[of_class] = distances[:, 1]
    return nearest


def _without_small(numbers: npt.NDArray[Any], count: int, smallest: int) -> tuple[npt.NDArray[np.int32], int]:
    """Drop regions of fewer pixels and number the others anew, in the same order."""
    if smallest == 1:
        return numbers.astype(np.int32), count
    large = np.bincount(numbers.ravel(), minlength=count + 1) >= smallest
    large[0] = False
    renamed = np.where(large, np.cumsum(large), 0).astype(np.int32)
    return renamed[numbers], int(large.sum())
