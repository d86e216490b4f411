"""Magnification: at which pixel size a model reads, and by how much a picture of another one is enlarged or shrunk."""

from __future__ import annotations

from typing import NamedTuple

from hpddrnet_trt.core.text import length

PLAUSIBLE_M = (1e-12, 1e-3)  # metres per pixel, from atomic resolution to a stage camera
TOLERANCE = 1.03  # pictures that differ less are read as they are: see docs/results/domain-2026-11.md
ENLARGED = 2.0  # further enlarged, a picture shows nothing of what is smaller than its own pixels
FURTHEST = 32.0  # neither enlarged nor shrunk by more
MOST_PIXELS = 1 << 30  # of an enlarged picture

PixelSizes = tuple[float, float]  # least and greatest, metres


class Rescaling(NamedTuple):
    """``factor``: the network sees so many pixels for one of the picture, along each side; 1.0 as it is, None where
    that is not known. ``remark``: why the result may be wrong."""

    factor: float | None = None
    remark: str | None = None


def plausible(pixel_size_m: float) -> bool:
    """Whether a microscope may have such pixels, in metres."""
    return PLAUSIBLE_M[0] <= pixel_size_m <= PLAUSIBLE_M[1]


def rescaling(pixel_size_m: float | None, trained: PixelSizes, shape: tuple[int, int]) -> Rescaling:
    """How a picture of ``shape`` (height, width) is brought to the nearest of the ``trained`` pixel sizes."""
    if pixel_size_m is None:
        return Rescaling()
    least, greatest = trained
    about = f"the model was trained at {in_words(trained)}"
    if not plausible(pixel_size_m):
        return Rescaling(None, f"no microscope has pixels of {pixel_size_m:g} m ({about}); it is read as it is")
    factor = pixel_size_m / min(max(pixel_size_m, least), greatest)
    if 1 / TOLERANCE <= factor <= TOLERANCE:
        return Rescaling(1.0)
    about = f"its pixels are {length(pixel_size_m)}, and {about}"
    if not 1 / FURTHEST <= factor <= FURTHEST or shape[0] * shape[1] * factor**2 > MOST_PIXELS:
        return Rescaling(None, f"{about}, which is too far apart to be made good: it is read as it is")
    if factor > ENLARGED:
        return Rescaling(factor, f"{about}: enlarged {factor:.3g} times it shows no more detail, labels may be wrong")
    return Rescaling(factor)


def in_words(sizes: PixelSizes) -> str:
    """``5 nm a pixel``, or ``5 nm to 8 nm a pixel``."""
    least, greatest = map(length, sizes)
    return f"{least} a pixel" if least == greatest else f"{least} to {greatest} a pixel"
