"""AxonDeepSeg's SEM set: a BIDS folder of rat spinal cord."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.data.catalog.labelled import Labelled, pair, plain_name, read_image, split_by_group
from hpddrnet_trt.data.catalog.masks import classes_of_values, read_values

_MASK_MARK = "_seg-axonmyelin-manual"
# 127 and 128 are myelin, 255 is axon; 130 and 233 occur at some borders and mean nothing.
AXON_VALUES = {0: 0, 127: 1, 128: 1, 255: 2, 130: IGNORE_INDEX, 233: IGNORE_INDEX}


def axondeepseg(source: Path) -> Iterator[Labelled]:
    """``sub-*/micr/*_SEM.png`` and ``derivatives/labels/sub-*/micr/*_seg-axonmyelin-manual.png``.

    No split is published: it is made by animal.
    """
    images = {path.stem: path for path in source.rglob("sub-*_SEM.*") if path.suffix in {".png", ".tif"}}
    masks = {path.stem.removesuffix(_MASK_MARK): path for path in source.rglob(f"*{_MASK_MARK}.png")}
    pairs = pair(images, masks, source)
    splits = split_by_group(_animal(stem) for stem, _, _ in pairs)
    for stem, image, mask in pairs:
        labels = classes_of_values(read_values(mask), AXON_VALUES, mask)
        animal = _animal(stem)
        yield Labelled(
            read_image(image), labels, splits[animal], plain_name(stem), animal, f"{image.name}, {mask.name}"
        )


def _animal(stem: str) -> str:
    return stem.split("_")[0]
