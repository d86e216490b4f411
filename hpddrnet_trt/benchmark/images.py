"""The images of a benchmark: whole ones for accuracy, frames of a given size for timing, parts for the gallery."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

from hpddrnet_trt.benchmark.result import Picture
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.magnification import PixelSizes
from hpddrnet_trt.core.manifest import IGNORE_INDEX, SIZE_MULTIPLE, ClassInfo
from hpddrnet_trt.data.intensity import IntensityRange
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.data.preprocess import at_pixel_size, pad

Grey8 = npt.NDArray[np.uint8]
MAX_FRAMES = 16  # distinct timed frames kept in memory
GALLERY_EDGE = 512  # pixels of an image shown in the report


@dataclass(frozen=True)
class Image:
    """One test image: ``grey`` uint8 ``[H, W]`` and, where labelled, its ``mask`` uint8 of the same shape; ``group``:
    its specimen, where known."""

    name: str
    grey: Grey8
    mask: Grey8 | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if self.grey.ndim != 2 or self.grey.dtype != np.uint8 or not self.grey.size:
            raise UsageError(
                f"benchmark image {self.name} must be 8-bit grey [height, width], "
                f"got {self.grey.dtype} {self.grey.shape}"
            )
        if self.mask is not None and self.mask.shape != self.grey.shape:
            raise UsageError(f"the mask of {self.name} is {self.mask.shape}, its image {self.grey.shape}; fix the pair")


@dataclass(frozen=True)
class ImageSet:
    """Images and where they come from; ``classes`` of the masks, None without masks."""

    name: str
    images: Sequence[Image]
    classes: Sequence[ClassInfo] | None = None

    def __post_init__(self) -> None:
        if not self.images:
            raise UsageError(f"there are no images in {self.name}; choose another folder or split")
        for image in self.images:
            self._check_mask(image)

    def _check_mask(self, image: Image) -> None:
        if image.mask is None:
            return
        if self.classes is None:
            raise UsageError(f"{self.name} has masks but no classes; give the classes that the masks' values mean")
        labelled = image.mask[image.mask != IGNORE_INDEX]
        if labelled.size and labelled.max() >= len(self.classes):
            raise UsageError(
                f"the mask of {image.name} holds the value {labelled.max()}, but there are {len(self.classes)} classes "
                f"(0 to {len(self.classes) - 1}) and {IGNORE_INDEX} for ignore; correct the mask"
            )


def load_images(
    path: str | Path,
    split: str = "test",
    limit: int | None = None,
    *,
    intensity_range: IntensityRange = None,
    read_at_m: PixelSizes | None = None,
) -> ImageSet:
    """The images of a dataset's ``split`` with their masks, or a file, folder or glob of micrographs.

    All are brought to 8 bits, in the ``intensity_range`` of the models that will see them, and to the nearest of their
    pixel sizes ``read_at_m`` (metres), masks too, where a picture's own is known.
    Raises :class:`UsageError` for an empty choice and :class:`BadInputFile` for an unreadable image.
    """
    from hpddrnet_trt.data.datasets import FolderDataset, dataset_layout, image_files, with_mask_at
    from hpddrnet_trt.data.intensity import to_grey8

    if limit is not None and limit < 1:
        raise UsageError(f"the number of images must be at least 1, got {limit}")
    if dataset_layout(path) is not None:
        dataset = replace(FolderDataset.open(path), intensity_range=intensity_range)
        samples = dataset.split(split)[:limit]
        images = [
            Image(sample.name, *with_mask_at(*dataset.read(sample), read_at_m), sample.group) for sample in samples
        ]
        return ImageSet(f"{dataset.name}/{split}", images, dataset.classes)
    files = image_files(path)[:limit]
    images = []
    for file in files:
        micrograph = read_micrograph(file)
        grey = to_grey8(micrograph.pixels, intensity_range).pixels
        grey = grey if read_at_m is None else at_pixel_size(grey, micrograph.pixel_size_m, read_at_m)
        images.append(Image(file.stem, grey))
    return ImageSet(str(path), images)


def own_size(images: Sequence[Image]) -> tuple[int, int]:
    """Height and width of the first image, reduced to multiples of 8 (at least 8)."""
    height, width = (max(SIZE_MULTIPLE, edge - edge % SIZE_MULTIPLE) for edge in images[0].grey.shape)
    return height, width


def fit(grey: Grey8, height: int, width: int) -> tuple[Grey8, str]:
    """A frame of ``height`` x ``width``: the centre where the image is larger, tiled by reflection where
    it is smaller; and a word on what was done (empty when nothing was)."""
    done = []
    if grey.shape[0] > height or grey.shape[1] > width:
        top, left = max(0, (grey.shape[0] - height) // 2), max(0, (grey.shape[1] - width) // 2)
        grey = grey[top : top + height, left : left + width]
        done.append("cropped to its centre")
    if grey.shape != (height, width):
        grey = pad(grey, height, width)
        done.append("tiled by reflection")
    return np.ascontiguousarray(grey), " and ".join(done)


def timing_frames(images: Sequence[Image], height: int, width: int, batch: int) -> tuple[list[Grey8], str]:
    """Batches ``[batch, height, width]`` that go through all images, and a sentence on how they were made."""
    count = min(MAX_FRAMES, max(1, -(-len(images) // batch)))
    used = range(min(len(images), count * batch))
    fitted = [fit(images[index].grey, height, width) for index in used]
    frames = [
        np.stack([fitted[(start * batch + offset) % len(fitted)][0] for offset in range(batch)])
        for start in range(count)
    ]
    done = {how: sum(entry[1] == how for entry in fitted) for how in sorted({entry[1] for entry in fitted})}
    text = "; ".join(f"{number} {how or 'used as they are'}" for how, number in done.items())
    return frames, f"frames of {height}x{width} for timing, from {len(fitted)} images: {text}"


def picture(image: Image, labels: Mapping[str, Grey8]) -> Picture:
    """The centre of an image, at most :data:`GALLERY_EDGE` pixels wide and high, with all labels."""
    height, width = image.grey.shape
    top, left = max(0, (height - GALLERY_EDGE) // 2), max(0, (width - GALLERY_EDGE) // 2)
    part = (slice(top, top + GALLERY_EDGE), slice(left, left + GALLERY_EDGE))
    shown = image.grey[part].shape
    whole = shown == (height, width)
    return Picture(
        name=image.name,
        part=f"whole image, {height}x{width}" if whole else f"centre {shown[0]}x{shown[1]} of {height}x{width}",
        image=_png(image.grey[part]),
        mask=None if image.mask is None else _png(image.mask[part]),
        labels={label: _png(plane[part]) for label, plane in labels.items()},
    )


def _png(plane: Grey8) -> str:
    stream = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(plane)).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
