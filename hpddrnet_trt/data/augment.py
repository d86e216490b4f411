"""What another session at the same instrument could have shown: at random for training, one knob at a time as a test.

:class:`Augmentation` makes random crops, :data:`SHIFTS` turn one knob to a given value, also beyond the range of
training, so that one sees where a model ends.

Geometry first: rotation by any angle, flips, scale and the crop are one affine map, so picture and
mask are resampled once. Then the preparation (what etching does to the contrast between phases) and
the instrument, in its own order: defocus (the probe), shot noise (the counting), charging and
offsets of scan lines (the scan), contrast, brightness and gamma (the display). No colour tricks:
there is no colour.
Shrinking takes no average over the pixels that fall together, because a microscope at lower
magnification does not either: its probe stays smaller than its pixel.

OpenCV and NumPy do all of it. Of the ready-made libraries, albumentations ended its MIT line and is
no longer maintained (its successor is AGPL), torchvision's and Kornia's transforms need PyTorch and
draw from its global state, and none rotates, scales and crops in one resampling with an ignore label
outside the picture. Here the result is a pure function of the two arrays and the generator, which is
what exact resume rests on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.data.paste import paste
from hpddrnet_trt.data.preprocess import scaled_size

Grey8 = npt.NDArray[np.uint8]
Pair = tuple[Grey8, Grey8]  # image and mask, both [H, W]
Matrix = npt.NDArray[np.float64]
Range = tuple[float, float]


class AugmentConfig(BaseModel):
    """Ranges are (lowest, highest), drawn uniformly (scale, contrast, gamma, dose: in the logarithm).

    Every ``*_probability`` is the share of crops it happens to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop: tuple[int, int] = (512, 512)  # height, width of what comes out, pixels
    # Sizes that batches take by chance instead of it: small ones see more, large ones show large things whole.
    crops: tuple[tuple[int, int], ...] = ()
    rotation_probability: float = Field(default=0.5, ge=0, le=1)  # any angle; else a multiple of 90 degrees
    # Mirrored and, without free rotation, turned by multiples of 90 degrees; "horizontal": left-right
    # only, where up and down mean something (layers on a substrate).
    flip: bool | Literal["horizontal"] = True
    scale_probability: float = Field(default=0.75, ge=0, le=1)
    scale: Range = (0.5, 2.0)  # magnification
    class_balance: float = Field(default=0.25, ge=0, le=1)  # share of crops that aim at a random class
    contrast: Range = (0.7, 1.4)  # factor about the crop's mean grey
    brightness: Range = (-25.0, 25.0)  # grey levels
    gamma: Range = (0.7, 1.4)
    noise_probability: float = Field(default=0.5, ge=0, le=1)
    dose: Range = (40.0, 600.0)  # electrons that make full white; fewer mean more noise
    defocus_probability: float = Field(default=0.25, ge=0, le=1)
    defocus: Range = (0.3, 1.5)  # standard deviation of the probe, pixels
    charging_probability: float = Field(default=0, ge=0, le=1)
    charging: Range = (4.0, 30.0)  # grey levels: standard deviation of slow drifts of brightness, along scan lines
    scan_noise_probability: float = Field(default=0, ge=0, le=1)
    scan_noise: Range = (0.5, 5.0)  # grey levels: standard deviation of the offsets of single scan lines
    paste_probability: float = Field(default=0, ge=0, le=1)  # regions of a rare class, from another picture
    etching_probability: float = Field(default=0, ge=0, le=1)
    etching: Range = (-40.0, 40.0)  # grey levels, of each class another: brighter or darker beside the others

    @model_validator(mode="after")
    def _sensible(self) -> AugmentConfig:
        if wrong := [size for size in (self.crop, *self.crops) if min(size) < 1]:
            raise ValueError(f"crop must be positive, got {wrong[0]}")
        for name in ("scale", "contrast", "gamma", "dose", "defocus", "charging", "scan_noise"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must be a range (lowest, highest) of positive numbers, got ({low}, {high})")
        for name in ("brightness", "etching"):
            low, high = getattr(self, name)
            if not -255 <= low <= high <= 255:
                raise ValueError(f"{name} must be a range within -255..255, got ({low}, {high})")
        return self

    @classmethod
    def none(cls, crop: tuple[int, int]) -> AugmentConfig:
        """Random crops only: nothing is rotated, scaled or repainted."""
        return cls(
            crop=crop, rotation_probability=0, flip=False, scale_probability=0, class_balance=0, contrast=(1, 1),
            brightness=(0, 0), gamma=(1, 1), noise_probability=0, defocus_probability=0,
        )  # fmt: skip


class Augmentation:
    """Callable that turns a picture and its mask into one augmented crop.

    Call it with ``image`` and ``mask`` uint8 ``[H, W]`` and a generator; it returns both as uint8
    of ``config.crop``. Outside the picture the image is mirrored and the mask is 255 (ignore). A
    mask value is never invented: the crop's values are the mask's, and 255. Flips and quarter
    turns copy pixels exactly. Raises :class:`ContractError` for arrays that do not fit together.
    """

    def __init__(self, config: AugmentConfig | None = None) -> None:
        self.config = config or AugmentConfig()

    def __call__(
        self,
        image: Grey8,
        mask: Grey8,
        rng: np.random.Generator,
        *,
        size: tuple[int, int] | None = None,
        donor: tuple[Grey8, Grey8, int] | None = None,
    ) -> tuple[Grey8, Grey8]:
        """``size``: another than ``config.crop``. ``donor``: a picture, its mask and the label whose regions are pasted
        from it (:func:`hpddrnet_trt.data.paste.paste`), which is turned and scaled like any crop."""
        size = size or self.config.crop
        if image.ndim != 2 or image.shape != mask.shape or not image.size:
            raise ContractError(f"image {image.shape} and mask {mask.shape} must be two-dimensional and of equal size")
        if image.dtype != np.uint8 or mask.dtype != np.uint8:
            raise ContractError(f"image and mask must be uint8, got {image.dtype} and {mask.dtype}")
        matrix = self._affine(mask, size, rng)
        crop, labels = _warp_mirrored(image, matrix, size), _warp_labels(mask, matrix, size)
        if donor is not None:
            other, other_mask, label = donor
            matrix = self._affine(np.where(other_mask == label, other_mask, IGNORE_INDEX), size, rng, aimed=1)
            paste(crop, labels, _warp_mirrored(other, matrix, size), _warp_labels(other_mask, matrix, size), label)
        if self.config.etching_probability:
            # A stream of its own: the other draws are the same without it.
            crop = self._etch(crop, labels, rng.spawn(1)[0])
        return self._photograph(crop, rng), labels

    def _etch(self, crop: npt.NDArray[np.float32], labels: Grey8, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Classes brighter or darker beside each other, as another etchant or alloy shows them."""
        etched, offsets = rng.random(), rng.uniform(*self.config.etching, size=256).astype(np.float32)
        if etched >= self.config.etching_probability:
            return crop
        offsets[IGNORE_INDEX] = 0
        # No sharper than the picture's own edges, which would give the mask away.
        return crop + np.asarray(cv2.GaussianBlur(offsets[labels], (0, 0), 1.0), dtype=np.float32)

    def _affine(
        self, mask: Grey8, size: tuple[int, int], rng: np.random.Generator, aimed: float | None = None
    ) -> Matrix:
        """The map from crop pixels to picture pixels, float64 ``[2, 3]``; ``aimed``: instead of ``class_balance``."""
        linear = self._linear_part(rng)
        height, width = size
        middle = np.array([(width - 1) / 2, (height - 1) / 2])
        # Half the size of the box around the crop's outline in the picture.
        reach = np.abs(linear) @ middle
        centre = self._centre(mask, reach, rng, self.config.class_balance if aimed is None else aimed)
        # Whole-pixel offset: quarter turns and flips then hit pixel centres exactly.
        offset = np.rint(centre - linear @ middle)
        return np.column_stack([linear, offset])

    def _linear_part(self, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        config = self.config
        # Every number is drawn whether used or not, so that settings do not shift later draws.
        any_angle, angle, quarter = rng.random(), rng.uniform(0, 2 * math.pi), int(rng.integers(4))
        flipped, scaled, zoom = rng.random() < 0.5, rng.random(), _log_uniform(rng, config.scale)
        if any_angle < config.rotation_probability:
            cosine, sine = math.cos(angle), math.sin(angle)
        elif config.rotation_probability > 0 or config.flip is True:
            cosine, sine = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[quarter]
        else:
            cosine, sine = 1.0, 0.0
        linear = np.array([[cosine, -sine], [sine, cosine]])
        if config.flip and flipped:
            linear = linear @ np.diag([-1.0, 1.0])
        return linear / zoom if scaled < config.scale_probability else linear

    def _centre(
        self, mask: Grey8, reach: npt.NDArray[np.float64], rng: np.random.Generator, aimed: float
    ) -> npt.NDArray[np.float64]:
        """Where in the picture (x, y) the crop's middle goes; within the picture where it fits."""
        size = np.array([mask.shape[1], mask.shape[0]], dtype=np.float64)
        lowest, highest = reach, size - 1 - reach
        tight = lowest > highest  # the crop is larger than the picture: centre it, with some play
        lowest, highest = np.where(tight, highest, lowest), np.where(tight, lowest, highest)
        drawn: npt.NDArray[np.float64] = rng.uniform(lowest, highest)
        aim, which, place, offset = rng.random(), rng.random(), rng.random(), rng.uniform(-0.5, 0.5, 2)
        if aim < aimed:
            present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[:IGNORE_INDEX])
            if present.size:
                pixels = np.flatnonzero(mask.ravel() == present[int(which * present.size)])
                row, column = divmod(int(pixels[int(place * pixels.size)]), mask.shape[1])
                return np.clip(np.array([column, row]) + offset * reach, lowest, highest)
        return drawn

    def _photograph(self, image: npt.NDArray[np.float32], rng: np.random.Generator) -> Grey8:
        """Defocus, shot noise, charging, scan lines, display; float32 grey levels to uint8."""
        config = self.config
        blurred, sigma = rng.random(), rng.uniform(*config.defocus)
        noisy, dose = rng.random(), _log_uniform(rng, config.dose)
        contrast, gamma = _log_uniform(rng, config.contrast), _log_uniform(rng, config.gamma)
        brightness = rng.uniform(*config.brightness)
        if blurred < config.defocus_probability:
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.float32)
        if noisy < config.noise_probability:
            # Poisson's variance (grey / 255 * dose electrons) with a Gaussian's shape, which is
            # close from some ten electrons on and several times as fast to draw.
            spread: npt.NDArray[np.float32] = np.sqrt(np.maximum(image, 0) * np.float32(255 / dose))
            image = image + spread * rng.standard_normal(image.shape, dtype=np.float32)
        charged, drift = rng.random(), rng.uniform(*config.charging)
        lined, offset = rng.random(), rng.uniform(*config.scan_noise)
        if charged < config.charging_probability:
            # Slow along the lines, faster from line to line, as a surface charges and discharges during the scan.
            field = rng.standard_normal((7, 3), dtype=np.float32) * np.float32(drift)
            image = image + cv2.resize(field, image.shape[::-1], interpolation=cv2.INTER_CUBIC)
        if lined < config.scan_noise_probability:
            image = image + rng.standard_normal((len(image), 1), dtype=np.float32) * np.float32(offset)
        if contrast != 1 or brightness != 0:
            mean = float(image.mean())
            image = (image - np.float32(mean)) * np.float32(contrast) + np.float32(mean + brightness)
        pixels = _rounded(image)
        return pixels if gamma == 1 else _gamma_curve(gamma)[pixels]


def _warp_mirrored(image: Grey8, matrix: Matrix, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Resample with cubic interpolation, mirrored outside the picture; grey levels as float32.

    The mirroring is done here, on the part that the crop can see: large pictures cost no more than
    small ones, and OpenCV 5.0's own never returns when a side is one pixel long.
    """
    (left, top), (right, bottom) = _footprint(matrix, size)
    rows, columns = _mirror(top, bottom, image.shape[0]), _mirror(left, right, image.shape[1])
    part = image[rows][:, columns]
    return _warp(part, matrix, (left, top), size, cv2.INTER_CUBIC, cv2.BORDER_REPLICATE, 0).astype(np.float32)


def _warp_labels(mask: Grey8, matrix: Matrix, size: tuple[int, int]) -> Grey8:
    """Resample with the nearest label; 255 outside the picture."""
    (left, top), (right, bottom) = _footprint(matrix, size)
    left, right = (int(value) for value in np.clip([left, right], 0, mask.shape[1]))
    top, bottom = (int(value) for value in np.clip([top, bottom], 0, mask.shape[0]))
    if left == right or top == bottom:  # a turned crop, much larger than the picture, can miss it
        return np.full(size, IGNORE_INDEX, dtype=np.uint8)
    part = mask[top:bottom, left:right]
    warped = _warp(part, matrix, (left, top), size, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT, IGNORE_INDEX)
    return warped.astype(np.uint8, copy=False)


def _warp(
    part: Grey8,
    matrix: Matrix,
    origin: tuple[int, int],
    size: tuple[int, int],
    interpolation: int,
    border: int,
    fill: int,
) -> npt.NDArray[Any]:
    shifted = matrix.copy()
    shifted[:, 2] -= origin
    return cv2.warpAffine(
        np.ascontiguousarray(part),
        shifted,
        (size[1], size[0]),
        flags=interpolation | cv2.WARP_INVERSE_MAP,
        borderMode=border,
        borderValue=fill,
    )


def _footprint(matrix: Matrix, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners (x, y) of the box in the picture that the crop reads, with a margin for the kernel."""
    height, width = size
    corners = matrix @ np.array([[0, width - 1, 0, width - 1], [0, 0, height - 1, height - 1], [1, 1, 1, 1]])
    low, high = np.floor(corners.min(axis=1)) - 2, np.ceil(corners.max(axis=1)) + 4
    return (int(low[0]), int(low[1])), (int(high[0]), int(high[1]))


def _mirror(start: int, stop: int, size: int) -> slice | npt.NDArray[np.int64]:
    """Indices start .. stop - 1, mirrored at the first and last pixel where they leave 0 .. size - 1."""
    if start >= 0 and stop <= size:
        return slice(start, stop)
    period = max(1, 2 * (size - 1))
    folded = np.arange(start, stop) % period
    return np.where(folded < size, folded, period - folded)


def _log_uniform(rng: np.random.Generator, limits: Range) -> float:
    low, high = limits
    value = math.exp(rng.uniform(math.log(low), math.log(high)))
    return low if low == high else value


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
    mean = float(image.mean())
    return _rounded((np.arange(256) - mean) * factor + mean)[image], mask


def brightness(image: Grey8, mask: Grey8, offset: float, rng: np.random.Generator) -> Pair:
    """``offset`` grey levels added (the detector's offset), cut off at 0 and 255."""
    return _rounded(np.arange(256) + offset)[image], mask


def gamma(image: Grey8, mask: Grey8, exponent: float, rng: np.random.Generator) -> Pair:
    """Grey as a share of white to the power ``exponent``: below 1 lightens, above 1 darkens the middle tones."""
    return _gamma_curve(exponent)[image], mask


def noise(image: Grey8, mask: Grey8, dose: float, rng: np.random.Generator) -> Pair:
    """Shot noise of counting ``dose`` electrons in a white pixel, and proportionally fewer in darker ones.

    Counts are Poisson distributed, independently for each pixel; a count of ``dose`` is shown white.
    """
    counts = rng.poisson(image.astype(np.float32) * np.float32(dose / 255))
    return _rounded(counts * (255 / dose)), mask


def defocus(image: Grey8, mask: Grey8, sigma: float, rng: np.random.Generator) -> Pair:
    """Blurred by a round Gaussian probe of standard deviation ``sigma`` pixels; mirrored at the border."""
    reach = math.ceil(4 * sigma)  # what lies beyond holds less than 1e-4 of the probe
    kernel = cv2.getGaussianKernel(2 * reach + 1, sigma, cv2.CV_32F)
    blurred = cv2.sepFilter2D(image.astype(np.float32), cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REFLECT)
    return _rounded(np.asarray(blurred).reshape(image.shape)), mask


def magnification(image: Grey8, mask: Grey8, factor: float, rng: np.random.Generator) -> Pair:
    """The whole field with ``factor`` times as many pixels along each edge, as at another magnification.

    The image is shrunk by averaging over the area of each new pixel and enlarged by cubic
    interpolation; each mask pixel takes the nearest label, so no label is invented. Scores are
    counted at the new size. This changes the scale of things alone: averaging also smooths noise,
    as binning does, and enlarging adds no detail; a microscope would change noise and detail, too.
    """
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


def _gamma_curve(exponent: float) -> Grey8:
    """The 256 grey levels as a share of white to the power ``exponent``."""
    return _rounded(255 * (np.arange(256) / 255) ** exponent)


def _rounded(values: npt.NDArray[Any]) -> Grey8:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
