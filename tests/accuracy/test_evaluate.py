"""Evaluation on a small dataset with known answers."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from hpddrnet_trt.accuracy.evaluate import evaluate
from hpddrnet_trt.core.errors import BadInputFile, ContractError, UsageError
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import Segmenter
from tests.toy import CLASSES, ToyEngine, grey_image, manifest, toy_logits

SHAPES = [(40, 33), (17, 50), (24, 24)]


@pytest.fixture
def dataset(tmp_path: Path) -> FolderDataset:
    """Three images whose masks are the toy model's own labels, but for known mistakes."""
    for kind in ("images", "masks"):
        (tmp_path / kind / "test").mkdir(parents=True)
    for index, shape in enumerate(SHAPES):
        image = grey_image(*shape, index)
        mask = toy_logits(image).argmax(axis=0).astype(np.uint8)
        mask[:4] = (mask[:4] + 1) % 3  # wrong everywhere in four rows
        mask[4:8] = 255  # not labelled in four more
        cv2.imwrite(str(tmp_path / "images" / "test" / f"{index}.png"), image)
        cv2.imwrite(str(tmp_path / "masks" / "test" / f"{index}.png"), mask)
    classes = [{"index": index, "name": entry.name} for index, entry in enumerate(CLASSES)]
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "small", "classes": classes}))
    return FolderDataset.open(tmp_path)


def test_scores_are_those_of_the_known_mistakes(dataset: FolderDataset) -> None:
    scores = evaluate(Segmenter(ToyEngine()), dataset, "test", progress=False)
    wrong = sum(4 * width for _, width in SHAPES)
    labelled = sum((height - 4) * width for height, width in SHAPES)
    assert scores.images == 3
    assert scores.pixel_accuracy == pytest.approx(1 - wrong / labelled)
    assert 0.5 < scores.miou < scores.pixel_accuracy
    accuracies = [1 - 4 / (height - 4) for height, _ in SHAPES]  # of one image: micro-IoU is a / (2 - a)
    assert scores.mean_image_micro_iou == pytest.approx(np.mean([a / (2 - a) for a in accuracies]))


def test_mode_overrides_the_segmenters(dataset: FolderDataset) -> None:
    engine = ToyEngine()
    single = evaluate(Segmenter(engine), dataset, "test", progress=False)
    assert len(engine.shapes) == 3
    averaged = evaluate(Segmenter(engine), dataset, "test", "multiscale", progress=False)
    assert len(engine.shapes) == 3 + 3 * 12
    assert averaged.miou < single.miou  # the masks came from the single view


def test_refusals(dataset: FolderDataset) -> None:
    renamed = manifest("logits", classes=[CLASSES[1], CLASSES[0], CLASSES[2]])
    with pytest.raises(ContractError, match="knows the classes pore, grain, clay, but dataset 'small'"):
        evaluate(Segmenter(ToyEngine(renamed)), dataset, "test", progress=False)
    with pytest.raises(UsageError, match="no split 'val'"):
        evaluate(Segmenter(ToyEngine()), dataset, "val", progress=False)
    with pytest.raises(UsageError, match="second grey window"):
        evaluate(Segmenter(ToyEngine(), window=(0, 9)), dataset, "test", progress=False)
    mask = dataset.split("test")[1].mask
    cv2.imwrite(str(mask), np.full(SHAPES[1], 7, np.uint8))
    with pytest.raises(BadInputFile, match=r"1\.png holds the value 7"):
        evaluate(Segmenter(ToyEngine()), dataset, "test", progress=False)
