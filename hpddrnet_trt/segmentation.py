"""The result of segmenting one image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpddrnet_trt.data.micrograph import overlay, write_labels
from hpddrnet_trt.errors import UsageError
from hpddrnet_trt.files import atomic_path
from hpddrnet_trt.manifest import ClassInfo, Manifest


@dataclass(frozen=True)
class Segmentation:
    """Labels of one image and what is needed to read them.

    ``labels`` uint8 ``[H, W]``: index into ``classes``. ``confidence`` float32 ``[H, W]``:
    probability of that class, or None. ``window``: grey values of the original that were mapped to
    0 and 255. ``pixel_size_m``: metres per pixel where known. ``source``: the file, where known.
    """

    labels: npt.NDArray[np.uint8]
    manifest: Manifest
    confidence: npt.NDArray[np.float32] | None = None
    window: tuple[float, float] = (0.0, 255.0)
    pixel_size_m: float | None = None
    source: Path | None = None

    @property
    def classes(self) -> list[ClassInfo]:
        return self.manifest.classes

    def fractions(self) -> dict[str, float]:
        """Area fraction of each class by name; their sum is 1."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        return {entry.name: float(counts[index]) / self.labels.size for index, entry in enumerate(self.classes)}

    def save_labels(self, path: str | Path) -> Path:
        """Write the labels as a PNG with the classes' colours as palette, or as an 8-bit TIFF, by ``path``'s ending."""
        return write_labels(path, self.labels, self.manifest.palette, pixel_size_m=self.pixel_size_m)

    def save_overlay(self, path: str | Path, grey8: npt.NDArray[np.uint8], alpha: float = 0.4) -> Path:
        """Write a PNG of the 8-bit image ``[H, W]`` with the classes drawn over it."""
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise UsageError(f"overlays are written as .png, not {path.name!r}; change the ending")
        drawing = overlay(grey8, self.labels, self.manifest.palette, alpha)
        with atomic_path(path) as temporary:
            Image.fromarray(drawing).save(temporary, format="PNG")
        return path
