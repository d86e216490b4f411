"""Micrographs and label maps as ``data:`` addresses."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image


def palette_png(indices: npt.NDArray[np.uint8], colours: npt.NDArray[np.uint8]) -> str:
    """uint8 ``[H, W]`` drawn in the RGBA colours ``[256, 4]``: small, and transparent where they are."""
    height, width = indices.shape
    image = Image.frombytes("P", (width, height), np.ascontiguousarray(indices).tobytes())
    image.putpalette(colours[:, :3].tobytes())
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True, transparency=colours[:, 3].tobytes())
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def jpeg(grey: npt.NDArray[np.uint8]) -> str:
    """A micrograph uint8 ``[H, W]``, good enough to look at."""
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
