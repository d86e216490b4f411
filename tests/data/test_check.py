"""The dataset report: each planted fault is found, named, and keeps the report from being ok."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpddrnet_trt.data.check import check_dataset
from hpddrnet_trt.data.simulate import write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "simulated", train=3, val=2, test=1, size=(48, 64), progress=False).root


def rewrite_mask(root: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = root / "masks" / name
    with Image.open(path) as image:
        labels = np.array(image)
    Image.fromarray(change(labels)).save(path)


def test_sound_dataset(dataset: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    report = check_dataset(dataset, sheet, progress=False)
    assert report.ok
    assert report.problems == []
    assert [split.images for split in report.splits.values()] == [3, 2, 1]
    assert report.splits["train"].sizes == {"64 x 48": 3}
    assert report.splits["train"].pixel_types == {"8-bit": 3}
    assert sum(report.splits["train"].class_fractions) == pytest.approx(1, abs=1e-5)
    text = report.text()
    for word in ("simulated-mudrock", "grain", "pore", "clay", "CC0", "fit for training", str(sheet)):
        assert word in text
    content = json.loads(report.to_json())
    assert content["ok"] is True
    assert content["splits"]["val"]["images"] == 2
    assert content["classes"][1]["name"] == "pore"


def test_pictures_that_occur_twice(dataset: Path) -> None:
    with Image.open(dataset / "images/train/train_0001.png") as image:
        image.save(dataset / "images/train/train_0002.png")
    report = check_dataset(dataset, progress=False)
    assert report.ok
    assert report.duplicates == [["images/train/train_0001.png", "images/train/train_0002.png"]]
    assert any("occurs twice" in warning for warning in report.warnings)
    with Image.open(dataset / "images/train/train_0000.png") as image:
        image.save(dataset / "images/train/train_0002.png")
    with Image.open(dataset / "images/train/train_0001.png") as image:
        image.save(dataset / "images/test/test_0000.png", compress_level=0)  # other bytes, same pixels
    report = check_dataset(dataset, progress=False)
    assert report.leaks == [["images/train/train_0001.png", "images/test/test_0000.png"]]
    assert not report.ok
    assert "leak" in report.text()
    assert report.text().endswith("not fit for training: 1 problem")


def test_groups_over_several_splits(dataset: Path) -> None:
    description = json.loads((dataset / "dataset.json").read_text())
    for entry in description["files"]:
        entry["group"] = "specimen 1" if entry["name"].endswith("0000") else entry["name"]
    (dataset / "dataset.json").write_text(json.dumps(description))
    report = check_dataset(dataset, progress=False)
    assert report.ok
    assert report.shared_groups == {"specimen 1": ["train", "val", "test"]}


def test_faulty_files(dataset: Path) -> None:
    rewrite_mask(dataset, "train/train_0000.png", lambda labels: np.where(labels == 1, 77, labels).astype(np.uint8))
    rewrite_mask(dataset, "train/train_0001.png", lambda labels: labels[:-3])
    (dataset / "masks/val/val_0000.png").unlink()
    (dataset / "images/val/val_0001.png").unlink()
    cut = dataset / "images/test/test_0000.png"
    cut.write_bytes(cut.read_bytes()[:500])
    report = check_dataset(dataset, progress=False)
    assert not report.ok
    train, val, test = (report.splits[name] for name in ("train", "val", "test"))
    assert train.unknown_values == {77: ["masks/train/train_0000.png"]}
    assert train.mismatched_sizes == ["images/train/train_0001.png is 64 x 48, masks/train/train_0001.png is 64 x 45"]
    assert val.images_without_mask == ["images/val/val_0000.png"]
    assert val.masks_without_image == ["masks/val/val_0001.png"]
    assert len(test.unreadable) == 1
    assert "test_0000.png" in test.unreadable[0]
    assert len(report.problems) == 6
    assert report.text().endswith("not fit for training: 6 problems")
    json.loads(report.to_json())


def test_unknown_values_and_ignored_pixels_are_drawn_and_counted(dataset: Path, tmp_path: Path) -> None:
    rewrite_mask(dataset, "train/train_0000.png", lambda labels: np.full_like(labels, 77))
    rewrite_mask(dataset, "train/train_0001.png", lambda labels: np.full_like(labels, 255))
    report = check_dataset(dataset, tmp_path / "sheet.png", progress=False)
    assert report.splits["train"].ignored_fraction == pytest.approx(1 / 3, abs=1e-6)
    with Image.open(tmp_path / "sheet.png") as image:
        drawn = np.asarray(image.convert("RGB")).astype(int)
    colourful = (drawn.max(axis=2) - drawn.min(axis=2)) > 20
    grey_picture = (drawn.max(axis=2) - drawn.min(axis=2) == 0) & (drawn.max(axis=2) < 240)
    # Six pictures of 240 x 180, and five overlays with colour.
    assert colourful.sum() > 5 * 240 * 180 * 0.2
    assert grey_picture.sum() > 6 * 240 * 180 * 0.8
    magenta = (drawn[..., 0] - drawn[..., 1] > 60) & (drawn[..., 2] - drawn[..., 1] > 60)
    assert magenta.sum() > 0.9 * 240 * 180


def test_one_class_only(dataset: Path) -> None:
    for place in range(3):
        rewrite_mask(dataset, f"train/train_{place:04d}.png", np.zeros_like)
    report = check_dataset(dataset, progress=False)
    assert report.problems == ["train: only the class 'grain' occurs; training needs masks with at least two classes"]
    assert "train: no pixel of pore, clay" in report.warnings


def test_without_description(dataset: Path) -> None:
    (dataset / "dataset.json").unlink()
    report = check_dataset(dataset, progress=False)
    assert report.ok
    assert [entry.name for entry in report.classes] == ["class 0", "class 1", "class 2"]
    assert any("lists no classes" in warning for warning in report.warnings)
    rewrite_mask(dataset, "train/train_0000.png", lambda labels: np.where(labels == 1, 9, labels).astype(np.uint8))
    report = check_dataset(dataset, progress=False)
    assert "no class table can be guessed" in report.problems[0]


def test_real_dataset(sem_data: Path, tmp_path: Path) -> None:
    report = check_dataset(sem_data / "shale-duvernay", tmp_path / "sheet.png", progress=False)
    assert report.ok
    assert report.splits["train"].sizes == {"384 x 384": 4, "512 x 512": 2}
    assert report.shared_groups == {"P7 r1-c1": ["train", "val", "test"]}
