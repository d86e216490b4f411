"""Figures as files: area fractions and regions as CSV, the confidence of every pixel as TIFF.

CSV is UTF-8 with commas and one header line; units are in the names, and cells are empty where a value is unknown.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from hpddrnet_trt.core.files import atomic_path, printable
from hpddrnet_trt.data.labels import scale_options
from hpddrnet_trt.results.regions import AreaFraction, RegionTable

FRACTIONS = ("class", "pixels", "fraction", "area_um2")
INTERVAL = ("fraction_low", "fraction_high")
REGIONS = (
    "region", "class", "area_px", "area_um2", "equivalent_diameter_px", "equivalent_diameter_um", "centroid_x_px",
    "centroid_y_px", "major_axis_px", "minor_axis_px", "orientation_deg", "left_px", "top_px", "width_px", "height_px",
    "touches_border", "perimeter_px", "circularity", "solidity", "aspect_ratio", "feret_max_px", "feret_min_px",
    "neighbors", "nearest_px", "weight",
)  # fmt: skip
Row = Sequence[str | int]


def write_fractions(path: str | Path, fractions: Iterable[AreaFraction]) -> Path:
    """Write one row a class: name, pixels, fraction (0 to 1), area in square micrometres or nothing, and the interval
    of the fraction or nothing."""
    rows = ([*fraction_row(entry), number(entry.low), number(entry.high)] for entry in fractions)
    return write_rows(path, (*FRACTIONS, *INTERVAL), rows)


def fraction_row(entry: AreaFraction) -> list[str | int]:
    """The columns :data:`FRACTIONS` of one class."""
    return [entry.name, entry.pixels, number(entry.fraction), number(entry.area_m2, 1e12)]


def write_regions(path: str | Path, regions: RegionTable) -> Path:
    """Write one row a region: columns :data:`REGIONS`, as :class:`~hpddrnet_trt.results.regions.RegionTable` has them.

    ``touches_border``: 1 or 0; ``aspect_ratio``: of the Feret diameters. Lengths are in pixels; multiply by the pixel
    size for those without a column of their own.
    """
    return write_rows(path, REGIONS, region_rows(regions))


def write_rows(path: str | Path, header: Sequence[str], rows: Iterable[Row]) -> Path:
    """Write a table row by row; ``rows`` may be a generator."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([printable(value) if isinstance(value, str) else value for value in row])
    return Path(path)


def number(value: float | None, factor: float = 1.0) -> str:
    """Eight significant digits; nothing for what is unknown or undefined."""
    return "" if value is None or math.isnan(value) else f"{value * factor:.8g}"


def region_columns(regions: RegionTable) -> dict[str, npt.NDArray[Any]]:
    """The columns :data:`REGIONS` but the number, ``[N]`` each; floating-point numbers are NaN where unknown."""
    unknown = np.full(len(regions), np.nan)
    areas, diameters = regions.area_m2, regions.equivalent_diameter_m
    columns = (
        np.array([entry.name for entry in regions.classes], object)[regions.class_index],
        regions.area_px,
        unknown if areas is None else areas * 1e12,
        regions.equivalent_diameter_px,
        unknown if diameters is None else diameters * 1e6,
        *regions.centroid_px.T,
        *regions.axes_px.T,
        regions.orientation_deg,
        *regions.box_px.T,
        regions.touches_border.astype(np.int64),
        regions.perimeter_px,
        regions.circularity,
        regions.solidity,
        regions.feret_px[:, 0] / regions.feret_px[:, 1],
        *regions.feret_px.T,
        regions.neighbors,
        regions.nearest_px,
        regions.weight,
    )
    return dict(zip(REGIONS[1:], columns, strict=True))


def region_rows(regions: RegionTable, first: int = 1) -> Iterator[Row]:
    """One row a region with the columns :data:`REGIONS`, numbered from ``first``."""
    texts = ([number(value) if isinstance(value, float) else value for value in column.tolist()]
             for column in region_columns(regions).values())  # fmt: skip
    return zip(itertools.count(first), *texts, strict=False)


def write_confidence(
    path: str | Path,
    confidence: npt.NDArray[np.float32],
    *,
    pixel_size_m: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the probability of the chosen class, float32 ``[H, W]`` from 0 to 1, as a one-channel TIFF."""
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            np.asarray(confidence, np.float32),
            photometric="minisblack",
            compression="zlib",
            predictor=True,
            description=None if provenance is None else json.dumps(provenance),
            metadata=None,
            **scale_options(pixel_size_m),
        )
    return Path(path)
