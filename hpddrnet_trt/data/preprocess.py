"""Views of an image: resize, flip, pad, normalise, and the exact way back to the image's own size.

Sizes, order (resize, then flip) and interpolation follow mmcv's ``Resize`` and mmsegmentation's
test-time augmentation, so that scores compare with those of the authors' pipeline: 8-bit grey
levels are resized before normalisation, and class scores return by bilinear interpolation with
pixel centres aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import AxisRange, InputContract, Normalisation

Mode = Literal["single", "flip", "multiscale"]
MODES: tuple[str, ...] = get_args(Mode)
TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class View:
    """An image resized to ``height`` x ``width`` and then, with ``flip``, mirrored left to right."""

    height: int
    width: int
    flip: bool = False


def scaled_size(height: int, width: int, ratio: float) -> tuple[int, int]:
    """Height and width times ``ratio``, rounded half up, at least 1."""
    return max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))


def keep_ratio_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect whose long and short edges stay within ``scale`` (any order)."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return scaled_size(height, width, factor)


def plan_views(mode: str, height: int, width: int, resize: tuple[int, int] | None = None) -> list[View]:
    """The views whose scores are averaged for an image of ``height`` x ``width``.

    ``single``: the image; ``flip``: also its mirror image; ``multiscale``: both at the ratios
    :data:`TTA_RATIOS`. ``resize`` first brings the image to :func:`keep_ratio_size`.
    """
    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}; choose one of: {', '.join(MODES)}")
    if resize is not None:
        height, width = keep_ratio_size(height, width, resize)
    sizes = [scaled_size(height, width, ratio) for ratio in TTA_RATIOS] if mode == "multiscale" else [(height, width)]
    flips = (False,) if mode == "single" else (False, True)
    return [View(*size, flip) for size in sizes for flip in flips]


def render(image: npt.NDArray[np.uint8], view: View) -> npt.NDArray[np.uint8]:
    """The view of a uint8 image ``[H, W]`` or ``[H, W, 3]``; the image itself when nothing changes."""
    if image.shape[:2] != (view.height, view.width):
        image = _resize(image, view.height, view.width)
    return image[:, ::-1] if view.flip else image


def padded_size(size: int, axis: AxisRange, multiple: int, name: str) -> int:
    """The smallest admitted size that is a multiple of ``multiple`` and not below ``size``.

    Raises :class:`ContractError` when the model admits none (the image is too large for it).
    """
    target = -(-max(size, axis.minimum) // multiple) * multiple
    if not axis.admits(target):
        raise ContractError(
            f"an image {name} of {size} pixels does not fit this model, which takes {axis}; "
            "cut the image into tiles, reduce it with resize, or export the model with dynamic sizes"
        )
    return target


def pad(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Extend bottom and right by reflection without repeating the border pixel; any size from 1 x 1."""
    bottom, right = height - image.shape[0], width - image.shape[1]
    if not bottom and not right:
        return image
    source = np.ascontiguousarray(image)
    return np.asarray(cv2.copyMakeBorder(source, 0, bottom, 0, right, cv2.BORDER_REFLECT_101), dtype=np.uint8)


def network_input(
    images: Sequence[npt.NDArray[np.uint8]], contract: InputContract, normalisation: Normalisation
) -> npt.NDArray[Any]:
    """Stack equally shaped uint8 views ``[H, W]`` (or RGB ``[H, W, 3]``) to what ``contract`` asks for.

    Result: ``[N, C, H', W']`` with H' and W' padded to admitted sizes (see :func:`padded_size`).
    Normalisation happens here only for float32 contracts; uint8 models carry it in the graph.
    """
    height = padded_size(images[0].shape[0], contract.height, contract.multiple, "height")
    width = padded_size(images[0].shape[1], contract.width, contract.multiple, "width")
    if contract.dtype == "uint8" and contract.channels == 1 and len(images) == 1:
        return np.ascontiguousarray(pad(images[0], height, width))[None, None]  # no copy for a fitting image
    batch = np.empty((len(images), contract.channels, height, width), dtype=contract.dtype)
    tables = _normalisation_tables(normalisation) if contract.dtype == "float32" else None
    for entry, image in zip(batch, images, strict=True):
        padded = pad(image, height, width)
        for channel, plane in enumerate(entry):
            source = padded[..., channel] if padded.ndim == 3 else padded
            if tables is None:
                plane[...] = source
            else:
                cv2.LUT(source, tables[channel], dst=plane)
    return batch


def restore_scores(
    scores: npt.NDArray[np.float32], view: View, height: int, width: int
) -> npt.NDArray[np.float32]:
    """Scores ``[C, H', W']`` of a view, back to the image: crop the padding, unflip, resize bilinearly."""
    scores = scores[:, : view.height, : view.width]
    if view.flip:
        scores = scores[:, :, ::-1]
    if (view.height, view.width) == (height, width):
        return scores
    return np.stack([_resize(plane, height, width) for plane in scores])


def restore_plane(plane: npt.NDArray[Any], view: View, height: int, width: int) -> npt.NDArray[Any]:
    """Labels or confidences ``[H', W']`` of an unflipped view, back to the image; nearest neighbour."""
    plane = plane[: view.height, : view.width]
    if (view.height, view.width) == (height, width):
        return plane
    return np.asarray(cv2.resize(np.ascontiguousarray(plane), (width, height), interpolation=cv2.INTER_NEAREST_EXACT))


def _resize(image: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
    return np.asarray(cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_LINEAR))


def _normalisation_tables(normalisation: Normalisation) -> npt.NDArray[np.float32]:
    """Normalised value of each of the 256 grey levels, ``[3, 256]``: exact, and a look-up per pixel."""
    levels = np.arange(256, dtype=np.float32)
    mean, std = (np.asarray(values, dtype=np.float32)[:, None] for values in (normalisation.mean, normalisation.std))
    return (levels - mean) / std
