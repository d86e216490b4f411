"""Grain size as standards define it, from regions: number density, mean intercept, ASTM number, mean diameters.

Everything follows from a few sums over a picture (:data:`SUMS`), and over several pictures from the sums of these, so
that a mean over a folder weighs every grain alike, and has an interval over pictures by
:mod:`hpddrnet_trt.core.intervals`.

Borders: a region that the picture's edge cuts counts one half, one in a corner of the picture one quarter (the
planimetric method of Jeffries and Saltykov in ASTM E112); chords count by their ends inside the picture, so that one
that is cut counts one half (E112, intercept method); means of whole regions leave the cut ones out and weigh the others
(:attr:`~hpddrnet_trt.results.regions.Regions.weight`), because large ones are cut more often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.results.regions import Regions
from hpddrnet_trt.results.tables import number, write_rows

Numbers = npt.NDArray[np.float64]
# Of one class in one picture, in pixels: area of the picture and of the class; regions by the rule above, and those
# that are whole; length of all test lines in the class and chords, of rows, columns and both diagonals; weights of
# whole regions, and with area, equivalent diameter, area times diameter.
SUMS = (
    "picture_px", "area_px", "count", "whole", "length_rows_px", "chords_rows", "length_columns_px", "chords_columns",
    "length_diagonals_px", "chords_diagonals", "weight", "weight_area", "weight_diameter", "weight_area_diameter",
)  # fmt: skip
_POWERS = np.array([2, 2, 0, 0, 1, 0, 1, 0, 1, 0, 0, 2, 1, 3])  # of the pixel size, to bring each to metres


def astm_from_intercept(intercept_m: npt.ArrayLike) -> Numbers:
    """ASTM grain size number G of a mean lineal intercept in metres: -6.643856 log10(l / mm) - 3.288 (ASTM E112)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(-6.643856 * np.log10(np.asarray(intercept_m, np.float64) * 1e3) - 3.288)


def astm_from_density(grains_per_m2: npt.ArrayLike) -> Numbers:
    """ASTM grain size number G of grains per square metre: 3.321928 log10(N_A mm^2) - 2.954 (ASTM E112)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(3.321928 * np.log10(np.asarray(grains_per_m2, np.float64) * 1e-6) - 2.954)


def _ratio(above: Sequence[str], below: Sequence[str]) -> Callable[[Numbers], Numbers]:
    top, bottom = ([SUMS.index(name) for name in names] for names in (above, below))

    def ratio(sums: Numbers) -> Numbers:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = sums[:, top].sum(axis=1) / sums[:, bottom].sum(axis=1)
        return np.where(np.isfinite(value), value, np.nan)

    return ratio


_LENGTHS, _CHORDS = SUMS[4:9:2], SUMS[5:10:2]
_INTERCEPT, _DENSITY = _ratio(_LENGTHS, _CHORDS), _ratio(["count"], ["area_px"])
# Figures of sums ``[n, len(SUMS)]`` in metres: unit, factor from metres to it, and how. A density is that of the
# picture; the planimetric G takes the grains per area of their class, as E112 does for one phase of several.
FIGURES: dict[str, tuple[str, float, Callable[[Numbers], Numbers]]] = {
    "number_density": ("per_mm2", 1e-6, _ratio(["count"], ["picture_px"])),
    "mean_area": ("um2", 1e12, _ratio(["weight_area"], ["weight"])),
    "mean_diameter": ("um", 1e6, _ratio(["weight_diameter"], ["weight"])),
    "area_weighted_diameter": ("um", 1e6, _ratio(["weight_area_diameter"], ["weight_area"])),
    "mean_intercept": ("um", 1e6, _INTERCEPT),
    "mean_intercept_rows": ("um", 1e6, _ratio(_LENGTHS[:1], _CHORDS[:1])),
    "mean_intercept_columns": ("um", 1e6, _ratio(_LENGTHS[1:2], _CHORDS[1:2])),
    "astm_g_intercept": ("", 1.0, lambda sums: astm_from_intercept(_INTERCEPT(sums))),
    "astm_g_planimetric": ("", 1.0, lambda sums: astm_from_density(_DENSITY(sums))),
}
COLUMNS = tuple(f"{name}_{unit}".rstrip("_") for name, (unit, _, _) in FIGURES.items())
GRAINS = ("class", "pixel_size_nm", *COLUMNS, *SUMS)


def grain_sums(regions: Regions, class_index: int) -> Numbers:
    """:data:`SUMS` of the regions of a class, in pixels."""
    numbers, of_class = regions.numbers, regions.class_index == class_index
    chosen = np.concatenate([[False], of_class])
    corners = {int(number) for number in numbers[[0, 0, -1, -1], [0, -1, 0, -1]]}
    share = np.where(regions.touches_border, 0.5, 1.0)
    share[[number - 1 for number in corners if number > 0]] = 0.25
    inside = chosen[numbers]
    area = float(np.count_nonzero(inside))
    lines: list[float] = []
    diagonal = 0.0
    for here, there, step in (
        (np.s_[:, :-1], np.s_[:, 1:], 1.0), (np.s_[:-1], np.s_[1:], 1.0),
        (np.s_[:-1, :-1], np.s_[1:, 1:], math.sqrt(2)), (np.s_[:-1, 1:], np.s_[1:, :-1], math.sqrt(2)),
    ):  # fmt: skip
        between = numbers[here] != numbers[there]
        ends = np.count_nonzero(between & inside[here]) + np.count_nonzero(between & inside[there])
        if step == 1:
            lines += [area, ends / 2]
        else:
            diagonal += ends / 2
    lines += [2 * math.sqrt(2) * area, diagonal]
    areas, weight = regions.area_px[of_class].astype(np.float64), regions.weight[of_class]
    diameters = regions.equivalent_diameter_px[of_class]
    whole = np.count_nonzero(~regions.touches_border[of_class])
    means = [weight.sum(), (weight * areas).sum(), (weight * diameters).sum(), (weight * areas * diameters).sum()]
    return np.array([numbers.size, area, share[of_class].sum(), whole, *lines, *means])


def in_metres(sums: Numbers, pixel_size_m: npt.ArrayLike) -> Numbers:
    """Sums ``[..., len(SUMS)]`` of pixels of ``pixel_size_m`` ``[...]``, with lengths and areas in metres."""
    return np.asarray(sums * np.asarray(pixel_size_m, np.float64)[..., np.newaxis] ** _POWERS)


def write_grains(path: str | Path, regions: Regions) -> Path:
    """Write one row for each class that has regions: :data:`FIGURES` if the pixel size is known, and :data:`SUMS`."""
    return write_rows(path, GRAINS, _rows(regions))


def _rows(regions: Regions) -> Iterator[list[str | int]]:
    size = regions.pixel_size_m
    for index in np.unique(regions.class_index):
        sums = grain_sums(regions, int(index))
        figures: Iterable[str] = [""] * len(FIGURES)
        if size is not None:
            metres = in_metres(sums, size)[np.newaxis]
            figures = [number(float(figure(metres)[0]), factor) for _, factor, figure in FIGURES.values()]
        yield [regions.classes[index].name, number(size, 1e9), *figures, *map(number, sums.tolist())]
