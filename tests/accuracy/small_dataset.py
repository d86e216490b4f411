"""A small dataset with known mistakes, and a model in numpy."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import Segmenter
from tests.toy import CLASSES, ToyEngine, grey_image, toy_logits

# Rows of each image whose mask differs from what the toy model says: "d" is the worst, "c" has no mistake.
WRONG_ROWS = {"a": 6, "b": 3, "c": 0, "d": 12, "e": 1}
IGNORED_ROWS = 5
SHAPE = (40, 33)


def write_dataset(folder: Path, wrong_rows: dict[str, int] = WRONG_ROWS) -> FolderDataset:
    """Images whose masks are the toy model's own labels, but for wrong rows above and ignored ones below."""
    for kind in ("images", "masks"):
        (folder / kind / "test").mkdir(parents=True)
    for index, (name, wrong) in enumerate(wrong_rows.items()):
        image = grey_image(*SHAPE, index)
        mask = toy_logits(image).argmax(axis=0).astype(np.uint8)
        mask[:wrong] = (mask[:wrong] + 1) % 3
        mask[-IGNORED_ROWS:] = 255
        cv2.imwrite(str(folder / "images" / "test" / f"{name}.png"), image)
        cv2.imwrite(str(folder / "masks" / "test" / f"{name}.png"), mask)
    classes = [{"index": index, "name": entry.name, "color": entry.color} for index, entry in enumerate(CLASSES)]
    (folder / "dataset.json").write_text(json.dumps({"name": "small", "licence": "MIT", "classes": classes}))
    return FolderDataset.open(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> FolderDataset:
    return write_dataset(tmp_path / "small")


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(ToyEngine())
