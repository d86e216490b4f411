"""Pixel sizes that a dataset states: found for each picture, mixed ones told, brought to one where asked."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from hpddrnet_trt.data.check import check_dataset
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.data.preprocess import magnified, nearest
from tests.data.test_datasets import DESCRIPTION, make_cityscapes, make_folders, picture

FILES = [
    {"split": "train", "name": "a", "pixel_size_m": 5e-9},
    {"split": "train", "name": "b", "pixel_size_m": 10e-9},
    {"split": "val", "name": "c"},
]


def described(**changes: Any) -> dict[str, Any]:
    return {**DESCRIPTION, "files": FILES, **changes}


def test_each_picture_has_the_pixel_size_that_its_dataset_states(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "data", described(pixel_size_m=20e-9))
    found = read_micrograph(root / "images" / "train" / "a.png")
    assert (found.pixel_size_m, found.pixel_size_source) == (5e-9, "dataset.json")
    assert read_micrograph(root / "images" / "val" / "c.png").pixel_size_m == 20e-9
    city = make_cityscapes(tmp_path / "city")
    assert read_micrograph(city / "train" / "imgs" / "a_leftImg8bit.png").pixel_size_m is None
    (city / "dataset.json").write_text(json.dumps(described()))
    assert read_micrograph(city / "train" / "imgs" / "b_leftImg8bit.png").pixel_size_m == 10e-9
    assert read_micrograph(city / "val" / "imgs" / "c_leftImg8bit.png").pixel_size_m is None
    (city / "dataset.json").write_text("{")  # told by whoever opens the dataset
    assert read_micrograph(city / "train" / "imgs" / "b_leftImg8bit.png").pixel_size_m is None


@pytest.mark.parametrize("size", [0.0, -1e-9, 1.0, 1e-15])
def test_senseless_pixel_sizes_are_passed_over_with_a_remark(tmp_path: Path, size: float) -> None:
    root = make_folders(tmp_path, described(pixel_size_m=size))
    found = read_micrograph(root / "images" / "val" / "c.png")
    assert found.pixel_size_m is None
    assert "dataset.json" in found.remarks[0]
    assert "no microscope" in found.remarks[0]


def test_pictures_and_masks_are_brought_to_one_pixel_size(tmp_path: Path) -> None:
    dataset = FolderDataset.open(make_folders(tmp_path, described()))
    common = replace(dataset, common_pixel_size_m=10e-9)
    for sample, size in zip(dataset.split("train"), [(12, 16), (24, 32)], strict=True):
        grey, mask = picture(sample.name)
        micrograph, own_mask = common.read(sample)  # as it is
        assert np.array_equal(micrograph.pixels, grey)
        assert np.array_equal(own_mask, mask)
        brought, brought_mask = common.load(sample)
        assert np.array_equal(brought, grey if size == grey.shape else magnified(grey, *size))
        assert np.array_equal(brought_mask, mask if size == mask.shape else nearest(mask, *size))
    # What is not known stays as it is.
    assert common.load(dataset.split("val")[0])[0].shape == (24, 32)
    stated = replace(common, pixel_size_m=20e-9)
    assert stated.load(dataset.split("val")[0])[0].shape == (48, 64)


def test_shrinking_averages_and_enlarging_does_not_invent_labels() -> None:
    stripes = np.tile(np.array([[0, 255]], np.uint8), (64, 32))
    assert set(np.unique(magnified(stripes, 32, 32))) == {128}
    mask = np.array([[0, 255], [2, 1]], np.uint8)
    assert set(np.unique(nearest(mask, 7, 9))) == {0, 1, 2, 255}
    assert np.array_equal(nearest(cv2.resize(mask, (6, 6), interpolation=cv2.INTER_NEAREST), 2, 2), mask)


def test_mixed_pixel_sizes_are_told_by_the_check(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        report = check_dataset(make_folders(tmp_path / "a", described()), progress=False)
    assert any("5 nm, 10 nm, unknown of others" in warning for warning in report.warnings)
    assert report.ok
    for number, files in enumerate(([], [{**entry, "pixel_size_m": 5e-9} for entry in FILES])):
        root = make_folders(tmp_path / f"b{number}", described(files=files), {"train": ["a", "b"], "val": ["c"]})
        assert not any("pixels of different size" in text for text in check_dataset(root, progress=False).warnings)
