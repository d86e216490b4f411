"""Parts of test images with everybody's labels, kept in the result for the report's gallery."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from PIL import Image as PillowImage

from hpddrnet_trt.benchmark.images import Grey8, Image
from hpddrnet_trt.benchmark.result import Picture

GALLERY_EDGE = 512  # pixels of an image shown in the report


def picture(image: Image, found: Mapping[str, Grey8]) -> Picture:
    """The centre of an image, at most :data:`GALLERY_EDGE` pixels wide and high, with all labels."""
    height, width = image.grey.shape
    top, left = max(0, (height - GALLERY_EDGE) // 2), max(0, (width - GALLERY_EDGE) // 2)
    part = (slice(top, top + GALLERY_EDGE), slice(left, left + GALLERY_EDGE))
    shown = image.grey[part].shape
    whole = shown == (height, width)
    return Picture(
        name=image.name,
        part=f"whole image, {height}x{width}" if whole else f"centre {shown[0]}x{shown[1]} of {height}x{width}",
        image=_png(image.grey[part]),
        mask=None if image.mask is None else _png(image.mask[part]),
        labels={label: _png(labels[part]) for label, labels in found.items()},
    )


def _png(plane: Grey8) -> str:
    stream = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(plane)).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
