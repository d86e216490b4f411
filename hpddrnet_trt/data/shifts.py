"""What changes between sessions at a microscope, one knob at a time: shifted micrographs with their masks.

Each shift is a pure function ``(image, mask, value, rng) -> (image, mask)`` of uint8 ``[H, W]``
arrays. At its neutral value it returns the two arrays it was given, untouched. What it adds comes
on top of what the micrograph already has: a noisy image at 80 electrons is noisier than a clean one.
Sweeps run from one side of the neutral value to the other, so that a curve can be read as
"how far may this knob be turned". :data:`SHIFTS` lists them.

The knobs are those that training varies too (see :mod:`hpddrnet_trt.data.augment`), here one by one
and beyond the range of training, so that one sees where a model ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.preprocess import scaled_size

Grey8 = npt.NDArray[np.uint8]
Pair = tuple[Grey8, Grey8]
Apply = Callable[[Grey8, Grey8, float, np.random.Generator], Pair]


@dataclass(frozen=True)
class Shift:
    """One knob: ``apply`` turns it to a value of its sweep ``values``, which rise and hold ``neutral``.

    ``axis``: what the value is, with its unit. ``note``: what is done to the picture, in a sentence.
    ``logarithmic``: values are factors, to be drawn on a logarithmic axis (an infinite one, which
    leaves the picture as it is, beside it). ``resizes``: the picture changes its size.
    """

    name: str
    axis: str
    note: str
    neutral: float
    values: tuple[float, ...]
    apply: Apply
    logarithmic: bool = False
    resizes: bool = False

    def __call__(self, image: Grey8, mask: Grey8, value: float, rng: np.random.Generator) -> Pair:
        """Image and mask at ``value``; the same arrays at the neutral value."""
        return (image, mask) if value == self.neutral else self.apply(image, mask, value, rng)


def contrast(image: Grey8, mask: Grey8, factor: float, rng: np.random.Generator) -> Pair:
    """Grey levels spread about the image's mean by ``factor`` (the detector's gain), cut off at 0 and 255."""
    _positive("contrast", factor)
    mean = float(image.mean())
    return _rounded((np.arange(256) - mean) * factor + mean)[image], mask


def brightness(image: Grey8, mask: Grey8, offset: float, rng: np.random.Generator) -> Pair:
    """``offset`` grey levels added (the detector's offset), cut off at 0 and 255."""
    return _rounded(np.arange(256) + offset)[image], mask


def gamma(image: Grey8, mask: Grey8, exponent: float, rng: np.random.Generator) -> Pair:
    """Grey as a share of white to the power ``exponent``: below 1 lightens, above 1 darkens the middle tones."""
    _positive("gamma", exponent)
    return _rounded(255 * (np.arange(256) / 255) ** exponent)[image], mask


def noise(image: Grey8, mask: Grey8, dose: float, rng: np.random.Generator) -> Pair:
    """Shot noise of counting ``dose`` electrons in a white pixel, and proportionally fewer in darker ones.

    Counts are Poisson distributed, independently for each pixel; a count of ``dose`` is shown white.
    """
    _positive("dose", dose)
    counts = rng.poisson(image.astype(np.float32) * np.float32(dose / 255))
    return _rounded(counts * (255 / dose)), mask


def defocus(image: Grey8, mask: Grey8, sigma: float, rng: np.random.Generator) -> Pair:
    """Blurred by a round Gaussian probe of standard deviation ``sigma`` pixels; mirrored at the border."""
    _positive("defocus", sigma)
    reach = math.ceil(4 * sigma)  # what lies beyond holds less than 1e-4 of the probe
    kernel = cv2.getGaussianKernel(2 * reach + 1, sigma, cv2.CV_32F)
    padded = np.pad(image.astype(np.float32), reach, mode="symmetric")
    blurred = np.asarray(cv2.sepFilter2D(padded, cv2.CV_32F, kernel, kernel)).reshape(padded.shape)
    return _rounded(blurred[reach:-reach, reach:-reach]), mask


def magnification(image: Grey8, mask: Grey8, factor: float, rng: np.random.Generator) -> Pair:
    """The whole field with ``factor`` times as many pixels along each edge, as at another magnification.

    The image is shrunk by averaging over the area of each new pixel and enlarged by cubic
    interpolation; each mask pixel takes the nearest label, so no label is invented. Scores are
    counted at the new size. This changes the scale of things alone: averaging also smooths noise,
    as binning does, and enlarging adds no detail; a microscope would change noise and detail, too.
    """
    _positive("magnification", factor)
    height, width = scaled_size(image.shape[0], image.shape[1], factor)
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    shifted = np.asarray(cv2.resize(image, (width, height), interpolation=how), dtype=np.uint8)
    labels = np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT), dtype=np.uint8)
    return shifted.reshape(height, width), labels.reshape(height, width)


SHIFTS = (
    Shift(
        "contrast", "contrast factor", "grey levels spread about the image's mean, cut off at black and white",
        1.0, (0.25, 0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.5, 4.0), contrast, logarithmic=True,
    ),
    Shift(
        "brightness", "brightness, grey levels of 255 added", "grey levels added, cut off at black and white",
        0.0, (-100, -75, -50, -25, 0, 25, 50, 75, 100), brightness,
    ),
    Shift(
        "gamma", "gamma (below 1 lighter, above 1 darker)", "grey as a share of white, to the power gamma",
        1.0, (0.4, 0.5, 0.63, 0.8, 1.0, 1.25, 1.6, 2.0, 2.5), gamma, logarithmic=True,
    ),
    Shift(
        "noise", "dose, electrons per white pixel (fewer: noisier)",
        "shot noise of that many electrons, on top of the noise that the micrograph has",
        math.inf, (5, 10, 20, 40, 80, 160, 320, 640, math.inf), noise, logarithmic=True,
    ),
    Shift(
        "defocus", "defocus, standard deviation of the probe, pixels",
        "a Gaussian blur, on top of that of the micrograph",
        0.0, (0, 0.5, 1, 1.5, 2, 3, 4, 6), defocus,
    ),
    Shift(
        "magnification", "magnification factor",
        "image and mask rescaled: the image by area average (smaller) or cubic interpolation (larger), the mask by "
        "nearest label; scored at the new size",
        1.0, (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0), magnification, logarithmic=True, resizes=True,
    ),
)  # fmt: skip


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{name} must be a positive number, got {value}")


def _rounded(values: npt.NDArray[Any]) -> Grey8:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
