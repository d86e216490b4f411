"""Augmentation of micrographs: what another session at the same instrument could have shown.

Geometry first: rotation by any angle, flips, scale and the crop are one affine map, so picture and
mask are resampled once. Then the instrument, in its own order: defocus (the probe), shot noise (the
counting), contrast, brightness and gamma (the display). No colour tricks: there is no colour.
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
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.manifest import IGNORE_INDEX

Grey = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.float64]
Range = tuple[float, float]


class AugmentConfig(BaseModel):
    """Ranges are (lowest, highest), drawn uniformly (scale, contrast, gamma, dose: in the logarithm).

    Every ``*_probability`` is the share of crops it happens to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop: tuple[int, int] = (512, 512)  # height, width of what comes out, pixels
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

    @model_validator(mode="after")
    def _sensible(self) -> AugmentConfig:
        if min(self.crop) < 1:
            raise ValueError(f"crop must be positive, got {self.crop}")
        for name in ("scale", "contrast", "gamma", "dose", "defocus"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must be a range (lowest, highest) of positive numbers, got ({low}, {high})")
        low, high = self.brightness
        if not -255 <= low <= high <= 255:
            raise ValueError(f"brightness must be a range within -255..255, got ({low}, {high})")
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

    def __call__(self, image: Grey, mask: Grey, rng: np.random.Generator) -> tuple[Grey, Grey]:
        if image.ndim != 2 or image.shape != mask.shape or not image.size:
            raise ContractError(f"image {image.shape} and mask {mask.shape} must be two-dimensional and of equal size")
        if image.dtype != np.uint8 or mask.dtype != np.uint8:
            raise ContractError(f"image and mask must be uint8, got {image.dtype} and {mask.dtype}")
        matrix = self._affine(mask, rng)
        crop = _warp_mirrored(image, matrix, self.config.crop)
        return self._photograph(crop, rng), _warp_labels(mask, matrix, self.config.crop)

    def _affine(self, mask: Grey, rng: np.random.Generator) -> Matrix:
        """The map from crop pixels to picture pixels, float64 ``[2, 3]``."""
        linear = self._linear_part(rng)
        height, width = self.config.crop
        middle = np.array([(width - 1) / 2, (height - 1) / 2])
        # Half the size of the box around the crop's outline in the picture.
        reach = np.abs(linear) @ middle
        centre = self._centre(mask, reach, rng)
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
        self, mask: Grey, reach: npt.NDArray[np.float64], rng: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        """Where in the picture (x, y) the crop's middle goes; within the picture where it fits."""
        size = np.array([mask.shape[1], mask.shape[0]], dtype=np.float64)
        lowest, highest = reach, size - 1 - reach
        tight = lowest > highest  # the crop is larger than the picture: centre it, with some play
        lowest, highest = np.where(tight, highest, lowest), np.where(tight, lowest, highest)
        drawn: npt.NDArray[np.float64] = rng.uniform(lowest, highest)
        aim, which, place, offset = rng.random(), rng.random(), rng.random(), rng.uniform(-0.5, 0.5, 2)
        if aim < self.config.class_balance:
            present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[:IGNORE_INDEX])
            if present.size:
                pixels = np.flatnonzero(mask.ravel() == present[int(which * present.size)])
                row, column = divmod(int(pixels[int(place * pixels.size)]), mask.shape[1])
                return np.clip(np.array([column, row]) + offset * reach, lowest, highest)
        return drawn

    def _photograph(self, image: npt.NDArray[np.float32], rng: np.random.Generator) -> Grey:
        """Defocus, shot noise, display; float32 grey levels to uint8."""
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
        if contrast != 1 or brightness != 0:
            mean = float(image.mean())
            image = (image - np.float32(mean)) * np.float32(contrast) + np.float32(mean + brightness)
        pixels: Grey = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
        if gamma == 1:
            return pixels
        curve = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
        return curve[pixels]


def _warp_mirrored(image: Grey, matrix: Matrix, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Resample with cubic interpolation, mirrored outside the picture; grey levels as float32.

    The mirroring is done here, on the part that the crop can see: large pictures cost no more than
    small ones, and OpenCV 5.0's own never returns when a side is one pixel long.
    """
    (left, top), (right, bottom) = _footprint(matrix, size)
    rows, columns = _mirror(top, bottom, image.shape[0]), _mirror(left, right, image.shape[1])
    part = image[rows][:, columns]
    return _warp(part, matrix, (left, top), size, cv2.INTER_CUBIC, cv2.BORDER_REPLICATE, 0).astype(np.float32)


def _warp_labels(mask: Grey, matrix: Matrix, size: tuple[int, int]) -> Grey:
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
    part: Grey,
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
