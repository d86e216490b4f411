"""Micrographs for calibration: which ones, and which crops of them.

Files are opened one at a time, so memory does not grow with their number, and every choice is a
function of the files alone, so a calibration can be repeated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.magnification import PixelSizes
from hpddrnet_trt.core.manifest import AxisRange, InputContract, Normalization
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.augment import SHIFTS
from hpddrnet_trt.data.intensity import IntensityRange, to_grey8
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.data.preprocess import at_pixel_size, network_input, pad

LARGEST_SIZE = 1024  # crop edge in pixels, where neither the model nor the caller says one
_LOOKED_AT = 9  # images that the usual size is taken from
MINIMUM_CROPS = 32  # few images are cut into several crops each, up to this many in total
FLAT = 2.0  # grey levels: crops that spread less hold no content
# Other settings of the microscope, as training and robustness know them (data/augment.py): ranges measured on pictures
# as they are alone fit no others.
SHIFTED = (
    ("contrast", 0.5), ("gamma", 2.0), ("magnification", 0.5), ("brightness", 50.0), ("noise", 20.0), ("contrast", 2.0),
    ("gamma", 0.5), ("magnification", 2.0), ("brightness", -50.0),
)  # fmt: skip
SURVEYED = 512  # at most this many images are read to choose from

Grey = npt.NDArray[np.uint8]
_SHIFTS = {shift.name: shift for shift in SHIFTS}


@dataclass(frozen=True)
class Crop:
    """A window of a micrograph, top-left corner in pixels; ``shift``: name and value of a setting to see it at."""

    image: Path
    top: int
    left: int
    intensity_range: IntensityRange = None  # of the model
    read_at_m: PixelSizes | None = None  # likewise
    shift: tuple[str, float] | None = None


def crop_size(
    contract: InputContract, size: tuple[int, int] | None, images: Sequence[Path]
) -> tuple[int, int]:
    """Height and width of the crops: what the model fixes, what was asked for, or the images' usual size.

    Pyramid pooling and position attention see the whole input, and their ranges depend on its size: so
    whole images, as they will be segmented, up to 1024 pixels. Raises :class:`UsageError` for a size
    that the model does not admit.
    """
    asked: tuple[int | None, int | None] = size or (None, None)
    usual = (LARGEST_SIZE, LARGEST_SIZE)
    if None in (asked[0] or contract.height.fixed, asked[1] or contract.width.fixed):
        usual = _usual_size(images)
    height, width = (
        _axis_size(axis, wanted, common, contract.multiple)
        for axis, wanted, common in zip((contract.height, contract.width), asked, usual, strict=True)
    )
    for name, value, axis in (("height", height, contract.height), ("width", width, contract.width)):
        if value % contract.multiple or not axis.admits(value):
            raise UsageError(
                f"calibration crops of {height}x{width} do not fit this model: {name} must be a multiple of "
                f"{contract.multiple} within {axis}; leave the size out or choose another"
            )
    return height, width


def _usual_size(images: Sequence[Path]) -> tuple[int, int]:
    """Median height and width of a few of the images."""
    step = max(len(images) // _LOOKED_AT, 1)
    shapes = [read_grey(path).shape for path in images[::step][:_LOOKED_AT]]
    heights, widths = zip(*shapes, strict=True)
    return int(np.median(heights)), int(np.median(widths))


def _axis_size(axis: AxisRange, asked: int | None, usual: int, multiple: int) -> int:
    if asked is not None:
        return asked
    if axis.fixed is not None:
        return axis.fixed
    # Both bounds are rounded into the range, so that the result is admitted and a multiple.
    largest = min(axis.maximum or LARGEST_SIZE, LARGEST_SIZE) // multiple * multiple
    smallest = -(-axis.minimum // multiple) * multiple
    return max(min(usual // multiple * multiple, largest), smallest)


def read_grey(path: Path, intensity_range: IntensityRange = None, read_at_m: PixelSizes | None = None) -> Grey:
    """A micrograph as 8-bit grey levels ``[H, W]``, as a model of that range sees it that reads at these pixel sizes,
    in metres."""
    micrograph = read_micrograph(path)
    grey = to_grey8(micrograph.pixels, intensity_range).pixels
    return grey if read_at_m is None else at_pixel_size(grey, micrograph.pixel_size_m, read_at_m)


def choose_images(images: Sequence[Path], count: int) -> list[Path]:
    """At most ``count`` images that together span the grey levels of all, the most telling first.

    Each image is described by grey-level percentiles (1, 25, 50, 75, 99) and its standard
    deviation; starting from the most typical one, the image farthest from those taken is added
    (greedy k-centre, Gonzalez 1985). So the choice for a smaller ``count`` is the beginning of the
    choice for a larger one. Of very long lists an even part is looked at, the rest comes last.
    """
    ordered = sorted(set(images))
    step = max(len(ordered) / SURVEYED, 1.0)
    candidates = [ordered[int(index * step)] for index in range(int(len(ordered) / step))]
    if len(ordered) <= 1:
        return ordered[:count]
    described = progress_bar(candidates, desc="surveying grey levels", unit="image")
    points = np.stack([_describe(read_grey(path)) for path in described])
    points /= np.maximum(points.std(axis=0), 1.0)
    first = int(np.argmin(np.linalg.norm(points - np.median(points, axis=0), axis=1)))
    chosen = [candidates[index] for index in _farthest_first(points, first, count)]
    taken = set(candidates)
    return (chosen + [path for path in ordered if path not in taken])[:count]


def _farthest_first(points: npt.NDArray[np.float64], first: int, count: int) -> list[int]:
    """Indices of at most ``count`` rows: ``first``, then always the one farthest from those before."""
    chosen = [first]
    distance = np.linalg.norm(points - points[first], axis=1)
    while len(chosen) < min(count, len(points)):
        distance[chosen[-1]] = -1.0  # equal points are taken once each
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return chosen


def _describe(grey: Grey) -> npt.NDArray[np.float64]:
    sample = grey[::4, ::4]
    return np.array([*np.percentile(sample, (1, 25, 50, 75, 99)), sample.std()])


def split_held_out(images: Sequence[Path], most: int = 8) -> tuple[list[Path], list[Path]]:
    """(for calibration, held out): every fourth image, at most ``most``, is held out; none of fewer than 4."""
    ordered = sorted(set(images))
    held = ordered[3::4]
    if len(held) > most:
        held = [held[int(index * len(held) / most)] for index in range(most)]
    taken = set(held)
    return [path for path in ordered if path not in taken], held


def plan_crops(
    images: Sequence[Path],
    height: int,
    width: int,
    minimum: int = MINIMUM_CROPS,
    *,
    each: int | None = None,
    intensity_range: IntensityRange = None,
    read_at_m: PixelSizes | None = None,
) -> list[Crop]:
    """Non-overlapping crops spread over each image, at most ``each`` of every image, for a model of that range and of
    these pixel sizes.

    Without ``each`` so many that there are ``minimum`` in total. The first crop of an image is in its
    centre, every further one far from those before, so fewer crops are the beginning of more. An
    image no larger than the crop gives one. Only image sizes are looked at; files are opened one at a time.
    """
    each = -(-minimum // len(images)) if each is None else each
    seen = ((path, read_grey(path, read_at_m=read_at_m)) for path in images)
    places = ((path, _places(grey.shape, height, width, each)) for path, grey in seen)
    return [Crop(path, top, left, intensity_range, read_at_m) for path, corners in places for top, left in corners]


def _places(shape: tuple[int, ...], height: int, width: int, count: int) -> list[tuple[int, int]]:
    """Top-left corners of at most ``count`` crops."""
    grid = [(top, left) for top in _starts(shape[0], height) for left in _starts(shape[1], width)]
    points = np.array(grid, dtype=np.float64)
    center = (points[0] + points[-1]) / 2
    first = int(np.argmin(np.linalg.norm(points - center, axis=1)))
    return [grid[index] for index in _farthest_first(points, first, count)]


def _starts(length: int, crop: int) -> list[int]:
    """First pixels of as many disjoint crops as fit along one axis, spread to both ends."""
    count = max(length // crop, 1)
    spare = max(length - crop, 0)
    return [spare // 2] if count == 1 else [round(index * spare / (count - 1)) for index in range(count)]


def also_shifted(crops: Sequence[Crop]) -> list[Crop]:
    """Every crop as it is and once more at one of the settings :data:`SHIFTED`, by turns; few crops more often, until
    all occur. Those of an image stay together."""
    turns = -(-len(SHIFTED) // max(1, len(crops)))
    settings = cycle(SHIFTED)
    return [
        seen for crop in crops for seen in (crop, *(replace(crop, shift=next(settings)) for _ in range(turns)))
    ]


def cut(grey: Grey, crop: Crop, height: int, width: int) -> Grey:
    """The pixels of a crop, uint8 ``[height, width]``, at its setting; a smaller image is continued by reflection."""
    return np.ascontiguousarray(pad(at_setting(grey, grey, crop, height, width)[0], height, width))


def at_setting(grey: Grey, mask: Grey, crop: Crop, height: int, width: int) -> tuple[Grey, Grey]:
    """The part of a picture and of its mask, uint8 ``[H, W]`` both, that a crop of that size shows at its setting.

    At another magnification it shows more or less around the same middle; no more than there is, so it may be smaller.
    """
    shift, value = (None, 1.0) if crop.shift is None else (_SHIFTS[crop.shift[0]], crop.shift[1])
    tall, wide = (round(edge / value) if shift is not None and shift.resizes else edge for edge in (height, width))
    top, left = (
        max(0, min(first + (edge - seen) // 2, whole - seen))
        for first, edge, seen, whole in zip(
            (crop.top, crop.left), (height, width), (tall, wide), grey.shape, strict=True
        )
    )
    place = slice(top, top + tall), slice(left, left + wide)
    part, labels = np.ascontiguousarray(grey[place]), np.ascontiguousarray(mask[place])
    if shift is not None:
        part, labels = shift(part, labels, value, np.random.default_rng((crop.top, crop.left)))
    return part[:height, :width], labels[:height, :width]


def with_content(crops: Sequence[Crop], height: int, width: int) -> tuple[list[Crop], float]:
    """The crops that show something, and the largest spread among all.

    The spread is the standard deviation of grey levels after a mean over 9 x 9 pixels, which leaves a tenth of noise: a
    blanked beam has 0, noise of 12 grey levels alone 1.3, the flattest real crop of four datasets 2.2.
    """
    spreads = [float(cv2.blur(grey, (9, 9)).std()) for _, grey in windows(crops, height, width)]
    return [crop for crop, spread in zip(crops, spreads, strict=True) if spread >= FLAT], max(spreads, default=0.0)


def batches(
    crops: Sequence[Crop], height: int, width: int, contract: InputContract, normalization: Normalization
) -> Iterator[npt.NDArray[Any]]:
    """Model inputs of the smallest admitted batch size; the last batch is filled up from the first crops."""
    size = contract.batch.minimum
    filled = [*crops, *(crops[index % len(crops)] for index in range(-len(crops) % size))]
    window: list[Grey] = []
    for _, grey in windows(filled, height, width):
        window.append(grey)
        if len(window) == size:
            yield network_input(window, contract, normalization)
            window = []


def inputs(
    crops: Sequence[Crop], height: int, width: int, contract: InputContract, normalization: Normalization
) -> Iterator[tuple[Crop, npt.NDArray[Any]]]:
    """Every crop by itself as a model input; a larger fixed batch is filled up with copies of it."""
    for crop, grey in windows(crops, height, width):
        yield crop, network_input([grey] * contract.batch.minimum, contract, normalization)


def windows(crops: Sequence[Crop], height: int, width: int) -> Iterator[tuple[Crop, Grey]]:
    """The crops with their pixels, uint8 ``[height, width]``."""
    path, grey = None, None  # crops of one image follow each other: read it once
    for crop in crops:
        if grey is None or path != crop.image:
            path, grey = crop.image, read_grey(crop.image, crop.intensity_range, crop.read_at_m)
        yield crop, cut(grey, crop, height, width)


def checksum(images: Sequence[Path]) -> str:
    """One SHA-256 over the content of all images, whatever their names or order."""
    digest = hashlib.sha256()
    for line in sorted(sha256_of(path) for path in images):
        digest.update(line.encode())
    return digest.hexdigest()
