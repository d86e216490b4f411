"""The result of segmenting one image."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.domain import NOT_KNOWN, Domain
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.files import printable
from hpddrnet_trt.core.manifest import ClassInfo, Manifest
from hpddrnet_trt.core.uncertainty import STEP, half_widths, uncertain_shares
from hpddrnet_trt.data.labels import overlay, write_rgb_png
from hpddrnet_trt.inference.tiling import TilingReport
from hpddrnet_trt.results import Contents, format_of
from hpddrnet_trt.results.caption import with_caption
from hpddrnet_trt.results.regions import AreaFraction, Regions, area_fractions, regions


@dataclass(frozen=True)
class Provenance:
    """Where a label map comes from: enough to make it again, and to tell two of them apart.

    ``model``: its name. ``model_sha256``: checksum of the model file that ran; ``checkpoint_sha256``: of the
    checkpoint it was made from; None where not known. ``engine``: runtime, device and version in words;
    ``precision``: what the labels were computed in. ``version``: of this package. ``mode``: views averaged.
    ``window``: grey values of the original that became 0 and 255. ``time``: end of the inference, UTC, ISO 8601.
    """

    model: str
    model_sha256: str | None
    checkpoint_sha256: str | None
    engine: str
    precision: str | None
    version: str
    mode: str
    window: tuple[float, float]
    time: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: what every written file carries."""
        return {**asdict(self), "window": list(self.window)}


@dataclass(frozen=True)
class Segmentation:
    """Labels of one image and what is needed to read them.

    ``labels`` uint8 ``[H, W]``: index into ``classes``. ``confidence`` float32 ``[H, W]``:
    probability of that class, or None. ``window``: grey values of the original that were mapped to
    0 and 255, ``remarks``: what of that is a guess. ``pixel_size_m``: metres per pixel, None where unknown.
    ``source``: the file, where known. ``rescale``: the network saw so many pixels for one of the image, along each
    side, to read it at the pixel size it was trained at; None where that is not known, or was not wanted.
    ``provenance``: model, engine and settings; ``tiling``: how a large image was cut and put together, None for one
    that ran whole. ``domain``: whether the picture is like those that the model was trained on.
    ``sampled_scores``: where intervals were asked for, the class probabilities float32 ``[C, h, w]`` of every fourth
    pixel in each direction, as the network sees them and not calibrated.
    """

    labels: npt.NDArray[np.uint8]
    manifest: Manifest
    confidence: npt.NDArray[np.float32] | None = None
    window: tuple[float, float] = (0.0, 255.0)
    remarks: tuple[str, ...] = ()
    pixel_size_m: float | None = None
    source: Path | None = None
    provenance: Provenance | None = None
    tiling: TilingReport | None = None
    rescale: float | None = None
    domain: Domain = NOT_KNOWN
    sampled_scores: npt.NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def classes(self) -> list[ClassInfo]:
        return self.manifest.classes

    def area_fractions(self) -> list[AreaFraction]:
        """Pixels, fraction, area (where the pixel size is known) and interval (where there is one) of each class."""
        entries = area_fractions(self.labels, self.classes, self.pixel_size_m)
        if (widths := self.half_widths()) is None:
            return entries
        return [
            replace(entry, low=max(0.0, entry.fraction - width), high=min(1.0, entry.fraction + width))
            for entry, width in zip(entries, widths, strict=True)
        ]

    def half_widths(self) -> list[float] | None:
        """Half the 95 % interval of each class's area fraction; None where :attr:`no_interval` says why."""
        if self.no_interval is not None:
            return None
        assert self.sampled_scores is not None  # else there would be a reason
        assert self.manifest.fraction_errors is not None
        pixels = self.sampled_scores[0].size * STEP**2
        return half_widths(self._uncertain_shares, pixels, self.manifest.fraction_errors).tolist()

    @cached_property
    def _uncertain_shares(self) -> npt.NDArray[np.float64]:
        assert self.sampled_scores is not None
        return uncertain_shares(self.sampled_scores, self.manifest.temperature)

    @property
    def no_interval(self) -> str | None:
        """Why fractions have no interval, for people; None where they have one."""
        if self.sampled_scores is None:
            return "intervals were not asked for, or the engine gives no class scores"
        if self.manifest.fraction_errors is None:
            return f"the description of {self.manifest.name} does not say how far its area fractions were off"
        if self.domain.state in ("unusual", "foreign"):
            return f"the picture is {self.domain.state} to the model, whose errors are known on pictures like its own"
        return None

    def fractions(self) -> dict[str, float]:
        """Area fraction of each class by name; their sum is 1."""
        return {entry.name: entry.fraction for entry in self.area_fractions()}

    def areas_m2(self) -> dict[str, float] | None:
        """Area of each class by name, in square metres; None when the pixel size is unknown."""
        areas = {entry.name: entry.area_m2 for entry in self.area_fractions()}
        return {name: area for name, area in areas.items() if area is not None} if self.pixel_size_m else None

    def regions(
        self, *, background: Collection[str] = (), connectivity: Literal[1, 2] = 2, smallest: int = 1,
        separate: Collection[str] = (),
    ) -> Regions:  # fmt: skip
        """Connected regions with area, diameter, shape: :func:`hpddrnet_trt.results.regions.regions`."""
        return regions(
            self.labels, self.classes, self.pixel_size_m, background=background, connectivity=connectivity,
            smallest=smallest, separate=separate, confidence=self.confidence,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """JSON-able: what written files carry beside the labels (file name of the source, classes, provenance)."""
        return {
            "source": None if self.source is None else printable(self.source.name),
            "classes": [entry.name for entry in self.classes],
            "pixel_size_m": self.pixel_size_m,
            "rescale": self.rescale,
            "window": list(self.window),
            **(self.provenance.as_dict() if self.provenance is not None else {"model": self.manifest.name}),
            "tiling": None if self.tiling is None else self.tiling.as_dict(),
            "domain": self.domain.as_dict(),
        }

    def save(self, path: str | Path, *, image: npt.NDArray[Any] | None = None) -> Path:
        """Write the result as the kind of file that ``path``'s ending says, whole or not at all.

        The kinds are those of :data:`hpddrnet_trt.results.FORMATS`: ``.png`` and ``.tif`` hold class indices with the
        classes' colours as palette, ``.ome.tif`` and ``.ome.zarr`` (with the micrograph ``image`` ``[H, W]`` where
        given) the same for bio-imaging, ``.zip`` outlines of all regions as ImageJ ROIs, ``.regions.csv`` a row for
        each region, ``.grains.csv`` the grain size of each class, any other ``.csv`` a row for each class,
        ``.confidence.tif`` the probability of the class.
        OME-Zarr, ROIs and regions need the extra ``results``.

        Call :func:`hpddrnet_trt.results.regions.regions` and the writers in :mod:`hpddrnet_trt.results` for ROIs and
        tables without the background. Raises :class:`UsageError` for another ending.
        """
        path = Path(path)
        form = format_of(path)
        if image is not None and not form.image:
            raise UsageError(f"only .ome.zarr holds the micrograph beside its labels, not {path.name}; leave image out")
        return form.write(path, Contents(self, image=image))

    def save_labels(self, path: str | Path) -> Path:
        """Deprecated: :meth:`save` goes by ``path``'s ending as well."""
        warnings.warn("Segmentation.save_labels is Segmentation.save now; call that", DeprecationWarning, stacklevel=2)
        return self.save(path)

    def save_overlay(
        self, path: str | Path, grey8: npt.NDArray[np.uint8], alpha: float = 0.4, *, caption: bool = True
    ) -> Path:
        """Write a PNG of the 8-bit image ``[H, W]`` with the classes drawn over it.

        ``caption``: add a bar below with the classes, their fractions, where the pixel size is known a scale bar, and
        that the picture is unlike those of the training. Pictures less than 128 pixels wide get none.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise UsageError(f"overlays are written as .png, not {path.name!r}; change the ending")
        drawing = overlay(grey8, self.labels, self.manifest.palette, alpha)
        if caption:
            fractions = self.area_fractions()
            drawing = with_caption(drawing, self.classes, fractions, self.pixel_size_m, self.domain.notice)
        return write_rgb_png(path, drawing)

    def __str__(self) -> str:
        """Size, scale and area fractions, for people; and whether the picture is unlike those of the training."""
        height, width = self.labels.shape
        title = "" if self.source is None else f"{self.source.name}: "
        if self.pixel_size_m is None:
            scale = "pixel size unknown"
        else:
            wide, high = (f"{side * self.pixel_size_m * 1e6:.4g}" for side in (width, height))
            scale = f"{self.pixel_size_m * 1e9:.4g} nm each, {wide} x {high} µm"
        lines = [f"{title}{width} x {height} pixels, {scale}, by {self.manifest.name}"]
        widest = max(len(entry.name) for entry in self.classes)
        for entry in self.area_fractions():
            area = "" if entry.area_m2 is None else f"{entry.area_m2 * 1e12:12.5g} µm²"
            bounds = [f"{100 * bound:.2f}" for bound in (entry.low, entry.high) if bound is not None]
            span = f" [{', '.join(bounds)}]" if bounds else ""
            lines.append(f"  {entry.name:<{widest}} {100 * entry.fraction:6.2f} %{span}{area}")
        if self.domain.notice is not None:
            lines.append(f"  {self.domain.notice}")
        return "\n".join(lines)
