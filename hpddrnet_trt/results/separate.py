"""Touching objects of one class, taken apart by a watershed."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import require

Numbers = npt.NDArray[np.int32]
# Two parts are one object where their neck is wider than this share of the narrower part; chosen on simulated grains.
NECK = 0.85
_PIXEL = 1.0  # added to all half widths: the outline of a label map is rough by so much


def separate(
    mask: npt.NDArray[np.bool_],
    confidence: npt.NDArray[np.float32] | None = None,
    *,
    connectivity: Literal[1, 2] = 2,
    smallest: int = 1,
) -> tuple[Numbers, int]:
    """Number the objects of a mask, also where they touch: int32 ``[H, W]``, 0 outside, and how many there are.

    The relief is the distance to the outline, times the ``confidence`` ``[H, W]`` of the labels where given, which is
    low between objects. Every maximum of it is the seed of a watershed (Beucher and Lantuejoul 1979). Two basins are
    joined where the pass between them is higher than :data:`NECK` of the lower summit: h-maxima with a height in
    proportion to the object's width, so that objects of all sizes are cut alike and rough ones are not cut to pieces.
    Basins of fewer than ``smallest`` pixels join the neighbor with the highest pass. The picture's border is no
    outline.
    """
    skimage = require("skimage.measure", "results", "separate objects")
    segmentation = require("skimage.segmentation", "results", "separate objects")
    inside = mask.astype(np.uint8)
    relief = np.asarray(cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)
    np.minimum(relief, np.float32(max(mask.shape)), out=relief)  # a mask without an outline is infinitely wide
    if confidence is not None:
        relief *= cv2.GaussianBlur(confidence, (3, 3), 0)
    relief = (cv2.GaussianBlur(relief, (5, 5), 0) + np.float32(_PIXEL)) * inside
    cell = cv2.getStructuringElement(cv2.MORPH_CROSS if connectivity == 1 else cv2.MORPH_RECT, (3, 3))
    summits = mask & (relief == cv2.dilate(relief, cell))
    seeds = skimage.label(summits, connectivity=2).astype(np.int32)
    basins: Numbers = segmentation.watershed(-relief, seeds, connectivity=connectivity, mask=mask)
    return _joined(basins, relief, connectivity, smallest)


def touching(
    numbers: Numbers, connectivity: Literal[1, 2], values: npt.NDArray[np.float32] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Pairs ``[P, 2]`` of numbers above 0 that touch, the smaller one first, and of each pair the highest of the lower
    ``values`` of two touching pixels (0 without values)."""
    count = int(numbers.max(initial=0)) + 1
    codes, heights = [], []
    height, width = numbers.shape
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1))[: 2 * connectivity]:
        here = np.s_[: height - down, max(0, -right) : width - max(0, right)]
        there = np.s_[down:, max(0, right) : width + min(0, right)]
        a, b = numbers[here], numbers[there]
        meet = np.nonzero((a != b) & (a > 0) & (b > 0))
        first, second = a[meet].astype(np.int64), b[meet].astype(np.int64)
        codes.append(np.minimum(first, second) * count + np.maximum(first, second))
        if values is not None:
            heights.append(np.minimum(values[here][meet], values[there][meet]))
    code = np.concatenate(codes)
    if values is None:
        code.sort()  # quicker than numpy's unique, which hashes
        pairs = code[np.diff(code, prepend=-1) > 0]
        highest = np.zeros(len(pairs), np.float32)
    else:
        order = np.argsort(code, kind="stable")
        pairs, starts = np.unique(code[order], return_index=True)
        highest = np.maximum.reduceat(np.concatenate(heights)[order], starts) if len(pairs) else np.zeros(0, np.float32)
    return np.stack([pairs // count, pairs % count], axis=1), highest


def _joined(
    basins: Numbers, relief: npt.NDArray[np.float32], connectivity: Literal[1, 2], smallest: int
) -> tuple[Numbers, int]:
    """Basins numbered anew, with those as one that are one object."""
    count = int(basins.max(initial=0)) + 1
    areas = np.bincount(basins.ravel(), minlength=count).tolist()
    summit = np.zeros(count, np.float32)
    np.maximum.at(summit, basins.ravel(), relief.ravel())
    heights = summit.tolist()
    pairs, passes = touching(basins, connectivity, relief)
    parent = list(range(count))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(low: int, high: int) -> None:
        parent[low] = high
        areas[high] += areas[low]
        heights[high] = max(heights[high], heights[low])

    ordered = sorted(zip(passes.tolist(), pairs.tolist(), strict=True), reverse=True)
    for level, (first, second) in ordered:
        a, b = root(first), root(second)
        if a != b and level >= NECK * min(heights[a], heights[b]):
            join(*sorted((a, b), key=heights.__getitem__))
    for _, (first, second) in ordered:
        a, b = sorted((root(first), root(second)), key=areas.__getitem__)
        if a != b and areas[a] < smallest:
            join(a, b)
    roots = np.asarray([root(number) for number in range(count)])
    kept, renamed = np.unique(roots, return_inverse=True)
    return renamed.astype(np.int32)[basins], len(kept) - 1
