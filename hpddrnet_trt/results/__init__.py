"""Segmentations as files that other programs read: :data:`FORMATS`, the one list of the kinds of file.

A new format is a writer in one of this room's modules and a line in :data:`FORMATS`: the command line, the folders that
``segment`` fills and :meth:`~hpddrnet_trt.inference.result.Segmentation.save` read it from there. Writers write whole
files or folders or none; ``pixel_size_m`` is in metres, None when unknown: then no file states a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, require

if TYPE_CHECKING:
    from hpddrnet_trt.core.manifest import ClassInfo
    from hpddrnet_trt.results.regions import AreaFraction, Regions
    from hpddrnet_trt.results.stacks import LabelStack


class Result(Protocol):
    """What the formats read of a :class:`~hpddrnet_trt.inference.result.Segmentation`."""

    @property
    def labels(self) -> npt.NDArray[np.uint8]: ...
    @property
    def confidence(self) -> npt.NDArray[np.float32] | None: ...
    @property
    def classes(self) -> Sequence[ClassInfo]: ...
    @property
    def pixel_size_m(self) -> float | None: ...
    def record(self) -> dict[str, Any]: ...
    def area_fractions(self) -> Sequence[AreaFraction]: ...
    def regions(self) -> Regions: ...


@dataclass(frozen=True)
class Contents:
    """What a file is written from: ``result``, and where given its ``regions`` (default: all of them) and the
    micrograph ``image`` ``[H, W]``."""

    result: Result
    regions: Regions | None = None
    image: npt.NDArray[Any] | None = None

    def all_regions(self) -> Regions:
        return self.result.regions() if self.regions is None else self.regions

    def origin(self) -> dict[str, Any]:
        """The options of writers that say scale and origin."""
        return {"pixel_size_m": self.result.pixel_size_m, "provenance": self.result.record()}


def _tiff_stack(path: Path, stack: LabelStack) -> Path:
    from hpddrnet_trt.results.stacks import write_tiff_stack

    return write_tiff_stack(path, stack)


def _ome_tiff_stack(path: Path, stack: LabelStack) -> Path:
    from hpddrnet_trt.results.stacks import write_ome_tiff_stack

    return write_ome_tiff_stack(path, stack)


def _ome_zarr_stack(path: Path, stack: LabelStack) -> Path:
    from hpddrnet_trt.results.stacks import write_ome_zarr_stack

    return write_ome_zarr_stack(path, stack)


def _labels(path: Path, contents: Contents) -> Path:
    from hpddrnet_trt.data.labels import write_labels

    palette = [entry.color for entry in contents.result.classes]
    return write_labels(path, contents.result.labels, palette, **contents.origin())


def _ome_tiff(path: Path, contents: Contents) -> Path:
    from hpddrnet_trt.results.ome import write_ome_tiff

    return write_ome_tiff(path, contents.result.labels, contents.result.classes, **contents.origin())


def _ome_zarr(path: Path, contents: Contents) -> Path:
    from hpddrnet_trt.results.ome import write_ome_zarr

    result = contents.result
    return write_ome_zarr(path, result.labels, result.classes, image=contents.image, **contents.origin())


def _rois(path: Path, contents: Contents) -> Path:
    from hpddrnet_trt.results.imagej import write_rois

    return write_rois(path, contents.all_regions())


def _regions(path: Path, contents: Contents) -> Path:
    from hpddrnet_trt.results.tables import write_regions

    return write_regions(path, contents.all_regions())


def _grains(path: Path, contents: Contents) -> Path:
    from hpddrnet_trt.results.grains import write_grains

    return write_grains(path, contents.all_regions())


def _confidence(path: Path, contents: Contents) -> Path:
    from hpddrnet_trt.results.tables import write_confidence

    if contents.result.confidence is None:
        raise UsageError(f"cannot write {path}: the segmenter gave no confidence; open it with confidence=True")
    return write_confidence(path, contents.result.confidence, **contents.origin())


def _fractions(path: Path, contents: Contents) -> Path:
    from hpddrnet_trt.results.tables import write_fractions

    return write_fractions(path, contents.result.area_fractions())


@dataclass(frozen=True)
class Format:
    """One kind of file.

    ``description``: a word or two for people. ``endings``: of its files, in lower case; the first is what ``segment``
    gives them. ``write``: its writer. ``modules``: what of the extra ``results`` it needs. ``holds``: what the file is
    made of; ``fractions`` are of a single image, where ``segment`` writes one table of all. ``image``: whether the
    micrograph goes in too. ``write_stack``: writer of the labels of a whole stack, None where each slice gets a file.
    """

    description: str
    endings: tuple[str, ...]
    write: Callable[[Path, Contents], Path]
    modules: tuple[str, ...] = ()
    holds: Literal["labels", "regions", "confidence", "fractions"] = "labels"
    image: bool = False
    write_stack: Callable[[Path, LabelStack], Path] | None = None

    @property
    def ending(self) -> str:
        return self.endings[0]


_REGIONS, _ZARR = "skimage.measure", ("zarr", "ome_zarr.writer")
FORMATS: dict[str, Format] = {
    "png": Format("palette", (".png",), _labels),
    "tiff": Format("palette", (".tif", ".tiff"), _labels, write_stack=_tiff_stack),
    "ome-tiff": Format("OME-XML", (".ome.tif", ".ome.tiff"), _ome_tiff, write_stack=_ome_tiff_stack),
    "ome-zarr": Format(
        "with micrograph", (".ome.zarr",), _ome_zarr, _ZARR, image=True, write_stack=_ome_zarr_stack
    ),
    "rois": Format("ImageJ", (".rois.zip", ".zip"), _rois, (_REGIONS, "roifile"), "regions"),
    "regions": Format("CSV", (".regions.csv",), _regions, (_REGIONS,), "regions"),
    "grains": Format("CSV of grain size", (".grains.csv",), _grains, (_REGIONS,), "regions"),
    "confidence": Format("TIFF", (".confidence.tif",), _confidence, holds="confidence"),
    "fractions": Format("CSV", (".csv",), _fractions, holds="fractions"),
}
# What `segment` may write for each image, and what of it needs no class scores.
KINDS = tuple(kind for kind, form in FORMATS.items() if form.holds != "fractions")
ALWAYS_POSSIBLE = tuple(kind for kind in KINDS if FORMATS[kind].holds != "confidence")


def check_kinds(kinds: Collection[str]) -> None:
    """Raise :class:`UsageError` for a name that is no kind of file, :class:`MissingDependency` for one that needs a
    package that is not there."""
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"results are written as {', '.join(KINDS)}, not {kind!r}")
        for module in FORMATS[kind].modules:
            require(module, "results", f"write {kind}")


def format_of(path: Path) -> Format:
    """The format that ``path``'s ending asks for, the longest that fits; :class:`UsageError` for no format's."""
    endings = {ending: form for form in FORMATS.values() for ending in form.endings}
    fitting = [ending for ending in endings if path.name.lower().endswith(ending)]
    if not fitting:
        raise UsageError(f"results are written as {', '.join(endings)}, not as {path.name!r}; change the ending")
    return endings[max(fitting, key=len)]
