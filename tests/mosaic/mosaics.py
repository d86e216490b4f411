"""Small mosaics whose blocks are made up, for tests of what is written of them."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.mosaic.layout import CELL, NO_DATA, BlockRecord, BlockResult, Box, Layout, MosaicSettings
from tests.mosaic.sources import ArraySource
from tests.toy import CLASSES

SIZE = 50e-9  # metres per pixel
BLOCK = 256
SETTINGS = MosaicSettings("toy.onnx", "a" * 64, "onnxruntime", "fp32", 1, None, (0.0, 255.0), 1.0, (256, 256), BLOCK)


def grey(shape: tuple[int, int, int], **about: Any) -> ArraySource:
    """A source whose pixels are all 7."""
    return ArraySource(np.full(shape, 7, np.uint8), pixel_size_m=about.pop("pixel_size_m", SIZE), **about)


def block(box: Box, labels: npt.NDArray[np.uint8], **about: Any) -> BlockResult:
    """The result of ``box`` in a mosaic with ``labels`` ``[Z, H, W]``."""
    own = np.ascontiguousarray(labels[box.z, box.rows, box.columns])
    cells = np.indices((-(-box.height // CELL), -(-box.width // CELL))).astype(np.float32)
    counts = np.bincount(own.ravel(), minlength=256)
    record = BlockRecord(
        block=box, pixels=tuple(counts[: len(CLASSES)].tolist()), foreign_pixels=(0,) * len(CLASSES),
        empty=int(counts[NO_DATA]), unreadable=0, problems=(), tiles=1, own_tiles={"familiar": 1}, seam_pixels=(100, 1),
        signature=box.name, checksum=sha256(own.tobytes()).hexdigest(), seconds={"read": 1.0, "compute": 3.0},
        bytes_read=own.size, peak_bytes=1000 + box.left,
    )  # fmt: skip
    values = {**{key: getattr(record, key) for key in record.__dataclass_fields__}, **about}
    return BlockResult(own, cells[1] + box.left // CELL, cells[0] + box.top // CELL, BlockRecord(**values))


def labels_of(shape: tuple[int, int, int], seed: int = 0) -> npt.NDArray[np.uint8]:
    """Patches of classes, and a corner of :data:`NO_DATA` in each slice."""
    slices, height, width = shape
    small = np.random.default_rng(seed).integers(0, len(CLASSES), (slices, -(-height // 16), -(-width // 16)))
    labels = small.astype(np.uint8).repeat(16, 1).repeat(16, 2)[:, :height, :width].copy()
    labels[:, -30:, -40:] = NO_DATA
    return labels


def layout_of(shape: tuple[int, int, int]) -> Layout:
    return Layout(shape, BLOCK)
