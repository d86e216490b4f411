"""What laboratories publish of label maps, measured in truth and prediction alike, and the errors of it.

A model of higher mIoU can be the one that measures worse: IoU does not see whether the errors of a class cancel out
(area), split one grain in two (objects) or lie far from the true boundary (Hausdorff distance). Pixels whose truth is
255 (ignore) belong to no class on either side. Objects are those of :func:`hpddrnet_trt.results.regions.regions` (a
test holds that), also those that the picture's edge cuts: truth and prediction lose the same to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.intervals import Interval, bootstrap, by_unit, unit_name
from hpddrnet_trt.core.manifest import IGNORE_INDEX

LARGEST = 1 << 24  # pixels: of larger pictures, distances are measured at every second pixel, or third, ...
THINNED = 16  # pixels from the middle to the edge: what is thicker is no line
_PERCENTILE = 95

Labels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]


class Figure(NamedTuple):
    """One of the figures of a class in a picture. ``relative``: its error is shown in % of the mean truth; else the
    figure is a fraction and its error is shown in points."""

    key: str
    title: str
    relative: bool = True

    @property
    def unit(self) -> str:
        return "% of the truth" if self.relative else "points"


FIGURES = (
    Figure("area_fraction", "area fraction", relative=False),
    Figure("objects", "objects"),
    Figure("diameter_px", "equivalent diameter"),
    Figure("boundary_px", "boundary length"),
)


@dataclass(frozen=True)
class Measured:
    """One picture. ``truth`` and ``predicted``: ``[figures, classes]`` in the order of :data:`FIGURES`; area fraction
    of the labelled pixels, number of objects, mean equivalent diameter in pixels (NaN without objects), length of the
    boundary to all other classes in pixels. ``hausdorff_px``, ``boundary_f``, ``centerline_f``: ``[classes]``, see
    :func:`hausdorff`, :func:`boundary_f` and :func:`centerline_f`.
    """

    truth: Numbers
    predicted: Numbers
    hausdorff_px: Numbers
    boundary_f: Numbers
    centerline_f: Numbers
    pixel_size_m: float | None = None


class ClassErrors(NamedTuple):
    """One figure of one class over the pictures. ``error``: mean of predicted minus true; ``size``: mean of its
    absolute value; both as fractions (of the picture for the area, else of the mean truth), over the pictures in which
    truth and prediction have the figure. ``truth``, ``predicted``: means of the figure in these pictures."""

    figure: Figure
    truth: float
    predicted: float
    error: Interval
    size: Interval


def measure(truth: Labels, predicted: Labels, classes: int, pixel_size_m: float | None = None) -> Measured:
    """All figures of one picture; both uint8 ``[H, W]``."""
    labelled = truth < classes
    there = np.where(labelled, truth, IGNORE_INDEX).astype(np.uint8)
    found = np.where(labelled & (predicted < classes), predicted, IGNORE_INDEX).astype(np.uint8)
    pixels = int(labelled.sum())
    distances, boundaries, centerlines = (
        np.array([figure(there, found, index) for index in range(classes)])
        for figure in (hausdorff, boundary_f, centerline_f)
    )
    figures = _figures(there, classes, pixels), _figures(found, classes, pixels)
    return Measured(*figures, distances, boundaries, centerlines, pixel_size_m)


def _figures(labels: Labels, classes: int, labelled: int) -> Numbers:
    """``[figures, classes]``."""
    table = np.full((len(FIGURES), classes), np.nan)
    table[3] = boundary_lengths(labels, classes)
    table[:2] = 0 if labelled else [[math.nan], [0]]
    for index in np.unique(labels[labels < classes]):
        count, _, statistics, _ = cv2.connectedComponentsWithStats((labels == index).astype(np.uint8), connectivity=8)
        areas = statistics[1:, cv2.CC_STAT_AREA].astype(np.float64)
        table[:3, index] = areas.sum() / labelled, count - 1, np.sqrt(4 * areas / np.pi).mean()
    return table


def boundary_lengths(labels: Labels, classes: int) -> Numbers:
    """Length in pixels of each class's boundary to the other classes, ``[classes]``; the picture's edge, and pixels
    of no class, are no boundary.

    Crofton's formula in four directions: how often lines cross the boundary, weighed by their distance (Legland, Kiêu
    and Devaux, Image Anal. Stereol. 26, 83, 2007). Right on average over directions; a straight boundary in one of
    them is measured 5 % short, one between them 5 % long at most.
    """
    crossings = np.zeros(classes)
    for first, second, weight in (
        (labels[:, :-1], labels[:, 1:], 1.0),
        (labels[:-1], labels[1:], 1.0),
        (labels[:-1, :-1], labels[1:, 1:], math.sqrt(0.5)),
        (labels[:-1, 1:], labels[1:, :-1], math.sqrt(0.5)),
    ):
        crossed = (first != second) & (first < classes) & (second < classes)
        for side in (first, second):
            crossings += weight * np.bincount(side[crossed], minlength=classes)
    return crossings * (np.pi / 8)


def hausdorff(truth: Labels, predicted: Labels, index: int) -> float:
    """Distance in pixels that 95 % of a class's boundary pixels keep to the other side's boundary: the larger of both
    directions (Huttenlocher, Klanderman and Rucklidge, IEEE TPAMI 15, 850, 1993, with a quantile for the maximum).

    Boundary pixels are the class's pixels with a neighbour (of four) of another class. NaN for a class that is not in
    truth or not in prediction, or that has a boundary in one only; 0 where it fills both. Of pictures over
    :data:`LARGEST` pixels, boundaries are taken in blocks of 2 x 2 (3 x 3, ...) pixels: exact to one block.
    """
    if not ((truth == index).any() and (predicted == index).any()):
        return math.nan
    edges = [_boundary(labels, index) for labels in (truth, predicted)]
    if not (edges[0].any() and edges[1].any()):
        return math.nan if edges[0].any() or edges[1].any() else 0.0
    step = math.isqrt(max(0, truth.size - 1) // LARGEST) + 1
    if step > 1:
        edges = [_blocks(edge, step) for edge in edges]
    left, top, width, height = cv2.boundingRect(edges[0] | edges[1])
    edges = [np.ascontiguousarray(edge[top : top + height, left : left + width]) for edge in edges]
    away = [cv2.distanceTransform(1 - edge, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for edge in edges]
    return step * max(
        float(np.percentile(away[1][edges[0] > 0], _PERCENTILE)),
        float(np.percentile(away[0][edges[1] > 0], _PERCENTILE)),
    )


def boundary_f(truth: Labels, predicted: Labels, index: int) -> float:
    """Harmonic mean of the shares of a class's boundary pixels, in truth and in prediction, that lie at most one pixel
    (of eight neighbours) from a boundary pixel of the other side (Csurka, Larlus and Perronnin, BMVC 2013).

    Boundary pixels are those of :func:`hausdorff`. NaN where neither side has any, 0 where one side has none.
    """
    edges = [_boundary(labels, index) for labels in (truth, predicted)]
    if not any(edge.any() for edge in edges):
        return math.nan
    return _shared(edges, [_widened(edge) for edge in edges])


def centerline_f(truth: Labels, predicted: Labels, index: int) -> float:
    """clDice (Shit et al., CVPR 2021, eq. 1 and 2; arXiv:2003.07311): harmonic mean of the shares of a class's
    centerline, in truth and in prediction, that lie within the other side. A crack that is found whole has 1 also where
    it is a pixel too wide; a gap costs its length.

    Centerlines are Lantuéjoul's skeletons: what opening takes away, at every depth of erosion up to :data:`THINNED`; of
    things thicker than twice that only what juts out. NaN where neither side has any, 0 where one side has none.
    """
    sides = [(labels == index).astype(np.uint8) for labels in (truth, predicted)]
    lines = [_centerline(side) for side in sides]
    if not any(line.any() for line in lines):
        return math.nan
    return _shared(lines, sides)


def _shared(things: Sequence[Labels], within: Sequence[Labels]) -> float:
    """Harmonic mean of the shares of both sides' pixels (0 or 1) that lie within the other side's."""
    shares = [
        float(thing[other > 0].sum() / max(1, thing.sum())) for thing, other in zip(things, within[::-1], strict=True)
    ]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def _centerline(inside: Labels) -> Labels:
    """Skeleton of uint8 0 or 1 ``[H, W]``, the same; pixels beyond the picture's edge count as inside."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    line = np.zeros_like(inside)
    for _ in range(THINNED + 1):
        if not inside.any():
            break
        thinner = np.asarray(cv2.erode(inside, cross), np.uint8)
        line |= inside & (1 - _widened(thinner))
        inside = thinner
    return line


def _widened(thing: Labels) -> Labels:
    """By one pixel, of eight neighbours."""
    return np.asarray(cv2.dilate(thing, np.ones((3, 3), np.uint8)), np.uint8)


def _boundary(labels: Labels, index: int) -> Labels:
    """1 for pixels of the class beside another class, 0 for all others."""
    inside, other = labels == index, (labels != index) & (labels != IGNORE_INDEX)
    beside = np.zeros_like(inside)
    beside[1:] |= other[:-1]
    beside[:-1] |= other[1:]
    beside[:, 1:] |= other[:, :-1]
    beside[:, :-1] |= other[:, 1:]
    return (inside & beside).astype(np.uint8)


def _blocks(edge: Labels, step: int) -> Labels:
    """1 for blocks in which there is a 1."""
    rows = np.maximum.reduceat(edge, np.arange(0, edge.shape[0], step), axis=0)
    return np.asarray(np.maximum.reduceat(rows, np.arange(0, edge.shape[1], step), axis=1), dtype=np.uint8)


def class_errors(pictures: Sequence[Measured], groups: Sequence[str | None], index: int) -> list[ClassErrors]:
    """The errors of all figures of the ``index``-th class, with intervals over pictures or specimens (``groups``)."""
    return [_errors(pictures, groups, index, place, figure) for place, figure in enumerate(FIGURES)]


def _errors(
    pictures: Sequence[Measured], groups: Sequence[str | None], index: int, place: int, figure: Figure
) -> ClassErrors:
    truth, predicted = (
        np.array([getattr(picture, side)[place, index] for picture in pictures], dtype=np.float64)
        for side in ("truth", "predicted")
    )
    # A class that is in neither truth nor prediction of a picture has no error there, rather than none of size 0.
    there = ~np.isnan(truth) & ~np.isnan(predicted) & ((truth > 0) | (predicted > 0))
    truth, predicted = truth[there], predicted[there]
    if not there.any():
        return ClassErrors(figure, math.nan, math.nan, *[bootstrap(np.zeros((0, 2)), _quotient)] * 2)
    of = [group for group, kept in zip(groups, there, strict=True) if kept]
    whole = truth if figure.relative else np.ones_like(truth)
    error, size = (
        bootstrap(by_unit(np.stack([values, whole], axis=1), of), _quotient, of=unit_name(groups))
        for values in (predicted - truth, np.abs(predicted - truth))
    )
    return ClassErrors(figure, float(truth.mean()), float(predicted.mean()), error, size)


def mean_distance(pictures: Sequence[Measured], groups: Sequence[str | None], index: int) -> Interval:
    """Mean Hausdorff distance of a class in pixels, over the pictures that have one."""
    return _mean(np.array([picture.hausdorff_px[index] for picture in pictures]), groups)


def mean_boundary_f(pictures: Sequence[Measured], groups: Sequence[str | None], index: int) -> Interval:
    """Mean boundary F-score of a class, over the pictures that have one."""
    return _mean(np.array([picture.boundary_f[index] for picture in pictures]), groups, fraction=True)


def mean_centerline_f(pictures: Sequence[Measured], groups: Sequence[str | None], index: int) -> Interval:
    """Mean clDice of a class, over the pictures in which it has a centerline."""
    return _mean(np.array([picture.centerline_f[index] for picture in pictures]), groups, fraction=True)


def _mean(values: Numbers, groups: Sequence[str | None], *, fraction: bool = False) -> Interval:
    there = ~np.isnan(values)
    totals = np.stack([values[there], np.ones(int(there.sum()))], axis=1)
    of = [group for group, kept in zip(groups, there, strict=True) if kept]
    return bootstrap(by_unit(totals, of), _quotient, fraction=fraction, of=unit_name(groups))


def _quotient(sums: Numbers) -> Numbers:
    """First sum by second; NaN by 0."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)
