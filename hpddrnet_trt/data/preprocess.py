"""Grey image to network input: resize, flip, pad, normalise, and the exact way back to the image's own size.

Sizes, order (resize, then flip) and interpolation follow mmcv's ``Resize`` and mmsegmentation's
test-time augmentation, so that scores compare with those of the authors' pipeline: 8-bit grey
levels are resized before normalisation, and class scores return by bilinear interpolation with
pixel centres aligned. Training, calibration, benchmark and inference all pad here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.magnification import PixelSizes, rescaling
from hpddrnet_trt.core.manifest import AxisRange, InputContract, Normalization

Mode = Literal["single", "flip", "multiscale"]
MODES: tuple[str, ...] = get_args(Mode)
TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# What an image is brought to: the largest size within (long, short) edges, or so many times its own; None: as it is.
Resize = tuple[int, int] | float | None


def scaled_size(height: int, width: int, ratio: float) -> tuple[int, int]:
    """Height and width times ``ratio``, rounded half up, at least 1."""
    return max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))


def keep_ratio_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect whose long and short edges stay within ``scale`` (any order)."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return scaled_size(height, width, factor)


@dataclass(frozen=True)
class TtaTransform:
    """One transform of test-time augmentation: resized to ``height`` x ``width``, then with ``flip`` mirrored
    left to right. ``magnified``: the size is that of another magnification (:func:`magnified`)."""

    height: int
    width: int
    flip: bool = False
    magnified: bool = False

    def apply(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A uint8 image ``[H, W]`` or ``[H, W, 3]`` transformed; the image itself when nothing changes."""
        if image.shape[:2] != (self.height, self.width):
            image = (magnified if self.magnified else _resize)(image, self.height, self.width)
        return image[:, ::-1] if self.flip else image

    def restore_scores(self, scores: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
        """Scores ``[C, H', W']``, back to an image of ``height`` x ``width``: crop the padding, unflip, resize
        bilinearly."""
        scores = scores[:, : self.height, : self.width]
        if self.flip:
            scores = scores[:, :, ::-1]
        if (self.height, self.width) == (height, width):
            return scores
        return np.stack([_resize(plane, height, width) for plane in scores])

    def restore_plane(self, plane: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
        """Labels or confidences ``[H', W']`` without flip, back to the image; nearest neighbour."""
        plane = plane[: self.height, : self.width]
        if (self.height, self.width) == (height, width):
            return plane
        return nearest(plane, height, width)


def plan_tta(mode: str, height: int, width: int, resize: Resize = None) -> list[TtaTransform]:
    """The transforms whose scores are averaged for an image of ``height`` x ``width``.

    ``single``: the image; ``flip``: also its mirror image; ``multiscale``: both at the ratios
    :data:`TTA_RATIOS`. ``resize`` first brings the image to :func:`keep_ratio_size`, or enlarges it so many times.
    """
    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}; choose one of: {', '.join(MODES)}")
    by_factor = isinstance(resize, float)
    if isinstance(resize, float):
        height, width = scaled_size(height, width, resize)
    elif resize is not None:
        height, width = keep_ratio_size(height, width, resize)
    sizes = [scaled_size(height, width, ratio) for ratio in TTA_RATIOS] if mode == "multiscale" else [(height, width)]
    flips = (False,) if mode == "single" else (False, True)
    return [TtaTransform(*size, flip, by_factor) for size in sizes for flip in flips]


def admitted_size(size: int, axis: AxisRange, multiple: int) -> int | None:
    """The smallest admitted size that is a multiple of ``multiple`` and not below ``size``; None for none."""
    target = -(-max(size, axis.minimum) // multiple) * multiple
    return target if axis.admits(target) else None


def padded_size(size: int, axis: AxisRange, multiple: int, name: str) -> int:
    """The same; :class:`ContractError` when the model admits none (the image is too large for it)."""
    target = admitted_size(size, axis, multiple)
    if target is None:
        raise ContractError(
            f"an image {name} of {size} pixels does not fit this model, which takes {axis}; "
            "cut the image into tiles, reduce it with resize, or export the model with dynamic sizes"
        )
    return target


def pad(image: npt.NDArray[np.uint8], height: int, width: int, fill: int | None = None) -> npt.NDArray[np.uint8]:
    """Extend ``[H, W]`` or ``[H, W, 3]`` at the bottom and right; the array itself when nothing is missing.

    By reflection without repeating the border pixel, any size from 1 x 1; with ``fill`` by that value: what lies
    beyond a mask has no label.
    """
    bottom, right = height - image.shape[0], width - image.shape[1]
    if not bottom and not right:
        return image
    mode = cv2.BORDER_REFLECT_101 if fill is None else cv2.BORDER_CONSTANT
    source = np.ascontiguousarray(image)
    return np.asarray(cv2.copyMakeBorder(source, 0, bottom, 0, right, mode, value=fill or 0), dtype=np.uint8)


def network_input(
    images: Sequence[npt.NDArray[np.uint8]], contract: InputContract, normalization: Normalization
) -> npt.NDArray[Any]:
    """Stack equally shaped uint8 images ``[H, W]`` (or RGB ``[H, W, 3]``) to what ``contract`` asks for.

    Result: ``[N, C, H', W']`` with H' and W' padded to admitted sizes (see :func:`padded_size`).
    Normalisation happens here only for float32 contracts; uint8 models carry it in the graph.
    """
    height = padded_size(images[0].shape[0], contract.height, contract.multiple, "height")
    width = padded_size(images[0].shape[1], contract.width, contract.multiple, "width")
    if contract.dtype == "uint8" and contract.channels == 1 and len(images) == 1:
        return np.ascontiguousarray(pad(images[0], height, width))[None, None]  # no copy for a fitting image
    batch = np.empty((len(images), contract.channels, height, width), dtype=contract.dtype)
    tables = _normalization_tables(normalization) if contract.dtype == "float32" else None
    for entry, image in zip(batch, images, strict=True):
        padded = pad(image, height, width)
        for channel, plane in enumerate(entry):
            source = padded[..., channel] if padded.ndim == 3 else padded
            if tables is None:
                plane[...] = source
            else:
                cv2.LUT(source, tables[channel], dst=plane)
    return batch


def magnified(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """An image ``[H, W]`` or ``[H, W, 3]`` as it would be with other pixels: means where it shrinks, else cubic."""
    shrinks = height * width < image.shape[0] * image.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=how), dtype=np.uint8)


def at_pixel_size(
    image: npt.NDArray[np.uint8], pixel_size_m: float | None, wanted: PixelSizes
) -> npt.NDArray[np.uint8]:
    """An image ``[H, W]`` brought to the nearest of the ``wanted`` pixel sizes, as far as it can be; see
    :func:`~hpddrnet_trt.core.magnification.rescaling`."""
    height, width = image.shape[:2]
    factor = rescaling(pixel_size_m, wanted, (height, width)).factor
    size = scaled_size(height, width, 1.0 if factor is None else factor)
    return image if size == (height, width) else magnified(image, *size)


def nearest(plane: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
    """Labels or confidences ``[H', W']`` at another size, none of them a mixture of two."""
    source = np.ascontiguousarray(plane)
    return np.asarray(cv2.resize(source, (width, height), interpolation=cv2.INTER_NEAREST_EXACT))


def _resize(image: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
    return np.asarray(cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_LINEAR))


def _normalization_tables(normalization: Normalization) -> npt.NDArray[np.float32]:
    """Normalised value of each of the 256 grey levels, ``[3, 256]``: exact, and a look-up per pixel."""
    levels = np.arange(256, dtype=np.float32)
    mean, std = (np.asarray(values, dtype=np.float32)[:, None] for values in (normalization.mean, normalization.std))
    return (levels - mean) / std
