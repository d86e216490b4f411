"""Files that no library here writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest


@pytest.fixture
def grey_png() -> Callable[[np.ndarray, int], bytes]:
    """Encodes an array of small numbers as a grey PNG of 1, 2 or 4 bits."""
    return encode


def encode(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of less than 8 bits, which Pillow reads but does not write."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = values.shape
    planes = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    packed = np.packbits(planes.reshape(height, width * bits).astype(np.uint8), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
