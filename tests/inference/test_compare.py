"""Label maps of two models, and of two folders."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.compare import compare_folders, compare_models
from hpddrnet_trt.inference.files import ResultSettings
from hpddrnet_trt.inference.folder import segment_paths
from tests.toy import CLASSES, ToyEngine, grey_image, manifest


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "in" / f"{seed}.png" for seed in range(2)]
    paths[0].parent.mkdir()
    for seed, path in enumerate(paths):
        cv2.imwrite(str(path), grey_image(20 + seed, 30, seed))
    return paths


def test_models_and_their_folders_agree_alike(images: list[Path], tmp_path: Path) -> None:
    plain, dark = Segmenter(ToyEngine()), Segmenter(ToyEngine(), window=(0.0, 300.0))
    for name, segmenter in (("plain", plain), ("dark", dark)):
        settings = ResultSettings(write=["png", "tiff", "confidence"] if segmenter.confidence else ["png", "tiff"])
        segment_paths(segmenter, images, tmp_path / name, settings, progress=False)
    models = compare_models(plain, dark, images, progress=False)
    folders = compare_folders(tmp_path / "plain", tmp_path / "dark")
    a, b = (np.concatenate([one.segment(cv2.imread(str(path), 0)).labels.ravel() for path in images])
            for one in (plain, dark))  # fmt: skip
    assert 0 < models.counts.agreement == np.mean(a == b) < 1
    record = models.record()
    assert {**record, "a": "", "b": ""} == {**folders.record(), "a": "", "b": ""}
    assert record["maps"] == 2
    assert record["iou"]["pore"] == pytest.approx(np.sum((a == 1) & (b == 1)) / np.sum((a == 1) | (b == 1)))
    assert list(record["iou"]) == ["grain", "pore", "clay"]
    lines = models.text().splitlines()
    assert lines[1].startswith(f"labels equal on {100 * record['agreement']:.3f} % of the pixels")
    assert f"area {100 * np.mean(a == 2):.2f} % and {100 * np.mean(b == 2):.2f} %" in lines[-1]
    assert record["mean_agreement"]["remark"].startswith("no interval: 2 maps")
    assert "mean of the maps" not in models.text()
    for _ in range(4):  # six maps
        models.counts.image_agreements.extend(models.counts.image_agreements[:1])
    assert f"mean of the maps {100 * np.mean(models.counts.image_agreements):.3f} % [" in models.text()
    same = compare_models(plain, plain, images, progress=False)
    assert (same.counts.agreement, same.counts.worst_agreement) == (1, 1)


def test_masks_against_labels(tmp_path: Path) -> None:
    """255 does not count, what has no twin is left out, classes go by number where no journal names them."""
    for folder in ("masks", "labels"):
        (tmp_path / folder).mkdir()
    mask = np.array([[0, 1, 255, 3]], np.uint8)
    for name in ("masks/a.png", "masks/alone.tif"):
        cv2.imwrite(str(tmp_path / name), mask)
    cv2.imwrite(str(tmp_path / "labels" / "a.tif"), np.array([[0, 1, 0, 1]], np.uint8))
    (tmp_path / "labels" / "a.regions.csv").write_text("region\n")
    compared = compare_folders(tmp_path / "masks", tmp_path / "labels")
    assert compared.counts.agreement == pytest.approx(2 / 3)
    assert compared.record()["iou"] == {"class 0": 1, "class 1": 0.5, "class 3": 0}
    assert compared.remarks == (f"1 maps of {tmp_path / 'masks'} have no twin and are left out",)
    cv2.imwrite(str(tmp_path / "labels" / "a.tif"), np.zeros((9, 9), np.uint8))
    with pytest.raises(BadInputFile, match=r"a\.tif and .*a\.png are no two label maps of one image"):
        compare_folders(tmp_path / "masks", tmp_path / "labels")


def test_what_cannot_be_compared(images: list[Path], tmp_path: Path) -> None:
    other = manifest(classes=[*CLASSES[:2], CLASSES[2].model_copy(update={"name": "x"})])
    with pytest.raises(UsageError, match="grain, pore, clay and grain, pore, x"):
        compare_models(Segmenter(ToyEngine()), Segmenter(ToyEngine(other)), images, progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no label map of the same name"):
        compare_folders(tmp_path / "in", tmp_path / "empty")
