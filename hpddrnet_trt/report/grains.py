"""The grains of a folder of results together: a table with intervals over pictures, and how their sizes are spread."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.files import decoded_text, read_file, write_bytes
from hpddrnet_trt.core.intervals import bootstrap
from hpddrnet_trt.core.text import aligned
from hpddrnet_trt.report.style import COLORS, label_axes, logarithmic, panels, png, style
from hpddrnet_trt.results import FORMATS
from hpddrnet_trt.results.grains import FIGURES, SUMS, in_metres
from hpddrnet_trt.results.tables import number, write_rows

Numbers = npt.NDArray[np.float64]
TABLE, FIGURE = "grains.csv", "grains.png"
HEADER = ("class", "pictures", "figure", "unit", "value", "low_95", "high_95", "remark")
_GRAIN = ("equivalent_diameter_um", "weight")
_BINS, _COLUMNS = 24, 3


class ClassGrains(NamedTuple):
    """Of one class: ``sums`` ``[pictures, len(SUMS)]`` in metres, and equivalent diameter (micrometres) and weight of
    each region."""

    sums: Numbers
    diameter_um: Numbers
    weight: Numbers


def read_grains(folder: str | Path) -> dict[str, ClassGrains]:
    """What ``segment --write regions,grains`` left in a folder and below it, by class.

    Raises :class:`UsageError` where there is nothing, :class:`BadInputFile` for damaged tables, for a missing one, and
    where a pixel size is not known.
    """
    summaries, tables = FORMATS["grains"].ending, FORMATS["regions"].ending
    files = sorted(Path(folder).rglob(f"*{summaries}"))
    if not files:
        raise UsageError(f"{folder} holds no *{summaries}; write them with segment --write regions,grains")
    sums: dict[str, list[Numbers]] = {}
    grains: dict[str, list[list[float]]] = {}
    for file in files:
        for name, (nanometres, *pixels) in _rows(file, ("pixel_size_nm", *SUMS)):
            if not nanometres > 0:
                raise BadInputFile(f"{file}: the pixel size is not known; give it to segment with --pixel-size")
            sums.setdefault(name, []).append(in_metres(np.array(pixels), nanometres * 1e-9))
        for name, grain in _rows(file.with_name(file.name.removesuffix(summaries) + tables), _GRAIN):
            grains.setdefault(name, []).append(grain)
    found = {}
    for name, of_class in sums.items():
        values = np.array(grains.get(name, []), np.float64).reshape(-1, 2)
        found[name] = ClassGrains(np.stack(of_class), values[:, 0], values[:, 1])
    return found


def write_grain_report(folder: str | Path, output: str | Path) -> tuple[Path, Path]:
    """Write ``grains.csv``, a row for each figure of each class, and ``grains.png``, the distribution of diameters.

    A figure is that of all pictures' sums; its interval is over pictures. Needs matplotlib (extra ``benchmark``).
    """
    classes, output = read_grains(folder), Path(output)
    drawn = write_bytes(output / FIGURE, png(_figure(classes)))
    return write_rows(output / TABLE, HEADER, _table(classes)), drawn


def grain_text(table: Path) -> str:
    """A written ``grains.csv`` for people: four digits, and the interval in one column."""
    lines = [("class", "figure", "value", "unit", "95 %", "")]
    for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines()):
        value, low, high = (f"{float(row[name]):.4g}" if row[name] else "" for name in ("value", "low_95", "high_95"))
        interval = f"{low} to {high}" if low else ""
        lines.append((row["class"], row["figure"], value, row["unit"], interval, row["remark"]))
    return "\n".join(aligned(lines, left={0, 1, 3, 4, 5}))


def _rows(path: Path, numbers: Sequence[str]) -> list[tuple[str, list[float]]]:
    """The class and these columns of each row; NaN for an empty cell."""
    try:
        rows = csv.DictReader(decoded_text(read_file(path, "table")).splitlines())
        return [(row["class"], [float(row[name] or "nan") for name in numbers]) for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as exc:
        raise BadInputFile(f"{path} is no table of this version; write it again with segment --no-resume") from exc


def _table(classes: dict[str, ClassGrains]) -> Iterator[list[str | int]]:
    for name, grains in classes.items():
        for figure, (unit, factor, of) in FIGURES.items():
            found = bootstrap(grains.sums, of)
            low, high = (number(end, factor) for end in (found.low, found.high))
            yield [name, found.units, figure, unit, number(found.value, factor), low, high, found.remark or ""]


def _figure(classes: dict[str, ClassGrains]) -> Any:
    """Number density by equivalent diameter, in classes of equal ratio; every region counts with its weight."""
    with style():
        figure, axes_of = panels(len(classes), 4.6, 3.6, columns=_COLUMNS)
        for place, (axes, (name, grains)) in enumerate(zip(axes_of, classes.items(), strict=True)):
            whole = grains.weight > 0
            area_mm2 = grains.sums[:, SUMS.index("picture_px")].sum() * 1e6
            diameters, weights = grains.diameter_um[whole], grains.weight[whole] / area_mm2
            if diameters.size:
                low, high = diameters.min() / 1.05, diameters.max() * 1.05
                edges = np.geomspace(low, high, _BINS + 1)
                axes.hist(diameters, edges, weights=weights, color=COLORS[place % len(COLORS)])
                mean = float(np.average(diameters, weights=weights))
                axes.axvline(mean, color="black", linewidth=1.4, linestyle="--")
            logarithmic(axes)
            title = f"{name}: mean {mean:.3g} µm" if diameters.size else name
            title += f"\n{whole.sum()} whole of {len(whole)} grains"
            label_axes(axes, title, "equivalent diameter, µm", "per mm²")
    return figure
