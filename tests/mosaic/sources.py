"""A mosaic in memory, for tests of what lies behind a source."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.mosaic.layout import Box, Piece


@dataclass
class ArraySource:
    """``pixels`` ``[Z, H, W]`` or ``[H, W]``; ``damaged`` boxes cannot be read. ``boxes``: what was read so far."""

    pixels: npt.NDArray[Any]
    fill_value: float = 0
    pixel_size_m: float | None = None
    spacing_m: float | None = None
    unit: tuple[int, int] = (64, 64)
    damaged: tuple[Box, ...] = ()
    path: Path = Path("memory.zarr")
    boxes: list[Box] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.pixels.ndim == 2:
            self.pixels = self.pixels[np.newaxis]
        self.shape: tuple[int, int, int] = self.pixels.shape
        self.dtype = self.pixels.dtype

    def read(self, box: Box) -> Piece:
        _, height, width = self.shape
        inside = 0 <= box.top < box.top + box.height <= height and 0 <= box.left < box.left + box.width <= width
        assert inside, f"{box} is not inside {self.shape}"
        self.boxes.append(box)
        pixels = self.pixels[box.z, box.rows, box.columns].copy()
        unreadable = []
        for bad in self.damaged:
            top, left = max(bad.top, box.top), max(bad.left, box.left)
            bottom = min(bad.top + bad.height, box.top + box.height)
            right = min(bad.left + bad.width, box.left + box.width)
            if bad.z == box.z and top < bottom and left < right:
                pixels[top - box.top : bottom - box.top, left - box.left : right - box.left] = self.fill_value
                unreadable.append((Box(box.z, top, left, bottom - top, right - left), f"chunk {bad.name} is damaged"))
        return Piece(pixels, tuple(unreadable))

    def signature(self, box: Box) -> str:
        return f"{self.path}:{box.name}"

    def sample(self, pixels: int) -> npt.NDArray[Any]:
        acquired = self.pixels[self.pixels != self.fill_value]
        return acquired[:: max(1, acquired.size // pixels)]
