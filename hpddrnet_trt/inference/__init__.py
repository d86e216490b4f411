"""Any micrograph in, a label map of the same size out."""

from __future__ import annotations

from hpddrnet_trt.inference.frames import Image
from hpddrnet_trt.inference.runner import Progress, Tile
from hpddrnet_trt.inference.segmenter import Segmenter, load_segmenter

__all__ = ["Image", "Progress", "Segmenter", "Tile", "load_segmenter"]
