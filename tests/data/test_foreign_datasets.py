"""Datasets as other programs and people leave them: the same verdict for the check and for training."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from hpddrnet_trt import read_micrograph
from hpddrnet_trt.core.errors import BadInputFile, UserError
from hpddrnet_trt.data.check import check_dataset
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.description import read_description
from hpddrnet_trt.data.simulate import write_dataset
from hpddrnet_trt.training.config import DataSection
from hpddrnet_trt.training.data import open_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", train=2, val=1, test=1, size=64, seed=0, progress=False).root


def verdicts(folder: Path) -> tuple[list[str], list[str], str]:
    """Problems and warnings of the check, and what training says."""
    report = check_dataset(folder, progress=False)
    sentence = ""
    try:
        open_data(DataSection(path=str(folder)), folder)
    except UserError as exc:
        sentence = str(exc)
    assert report.ok == (not sentence), (report.problems, sentence)
    return report.problems, report.warnings, sentence


def change_masks(folder: Path, split: str, change: Any) -> None:
    for path in sorted((folder / "masks" / split).iterdir()):
        with Image.open(path) as image:
            indices = np.array(image)
        path.unlink()
        change(indices).save(path)


def grey(indices: npt.NDArray[Any]) -> Image.Image:
    return Image.fromarray(indices.astype(np.uint8))


def test_a_sound_dataset_is_sound(folder: Path) -> None:
    assert verdicts(folder)[0] == []


def test_only_a_training_split(folder: Path) -> None:
    for kind in ("images", "masks"):
        (folder / kind / "val").rename(folder / kind / "valid")
    problems, warnings, sentence = verdicts(folder)
    assert problems == ["there is no val split (there are: train, test)"]
    assert "images/valid passed over: splits are called train, val, test" in warnings
    assert "there is no val split" in sentence
    assert "images/valid passed over" in sentence


def test_nothing_labelled_to_validate_on(folder: Path) -> None:
    change_masks(folder, "val", lambda indices: grey(np.full_like(indices, 255)))
    problems, _, sentence = verdicts(folder)
    assert problems == ["val: no pixel is labelled (100% are 255, ignore: if that means a class here, rewrite it as 1)"]
    assert problems[0] in sentence


def test_masks_of_0_and_255_with_a_class_table(folder: Path) -> None:
    for split in ("train", "val", "test"):
        change_masks(folder, split, lambda indices: grey((indices > 0) * 255))
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**description, "classes": ["background", "pore"]}))
    problems, _, sentence = verdicts(folder)
    assert problems[0].startswith("train: only the class 'background' occurs")
    assert "are 255, ignore: if that means a class here, rewrite it as 1" in problems[0]
    assert problems[0] in sentence


COLORS = [(10, 10, 10), (200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 30), (30, 220, 220), (99, 0, 99)]


def in_order_of_appearance(indices: npt.NDArray[np.uint8]) -> Image.Image:
    """As programs do that save each picture with the palette that it needs."""
    order = list(dict.fromkeys(indices.ravel().tolist()))
    places = np.zeros(256, np.uint8)
    places[order] = range(len(order))
    image = grey(places[indices])
    image.putpalette([value for index in order for value in COLORS[index]])
    return image


def test_palettes_of_their_own_are_refused_and_a_common_one_is_not(folder: Path) -> None:
    def common(indices: npt.NDArray[np.uint8]) -> Image.Image:
        image = grey(indices)
        image.putpalette([value for color in COLORS for value in color])
        return image

    for split in ("train", "val", "test"):
        change_masks(folder, split, common)
    assert verdicts(folder)[0] == []
    change_masks(folder, "val", lambda indices: in_order_of_appearance(np.where(indices == 0, indices.max(), indices)))
    problems, _, sentence = verdicts(folder)
    assert "their palettes differ, so the numbers mean nothing" in problems[0]
    assert "their palettes differ" in sentence


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_descriptions_in_any_encoding(folder: Path, encoding: str) -> None:
    path = folder / "dataset.json"
    text = path.read_text(encoding="utf-8").replace("grain", "Körner", 1)
    path.write_bytes((b"\xff\xfe" if encoding == "utf-16-le" else b"") + text.encode(encoding))
    if encoding == "latin-1":
        with pytest.raises(BadInputFile, match="is not text in UTF-8 or UTF-16; save it as UTF-8"):
            read_description(path)
        return
    assert "Körner" in [entry.name for entry in read_description(path).classes or []]
    assert verdicts(folder)[0] == []


def test_linked_folders_are_entered_once(folder: Path) -> None:
    for kind in ("images", "masks"):
        shutil.copytree(folder / kind / "train", folder / "specimen-b" / kind)
        os.symlink(folder / "specimen-b" / kind, folder / kind / "train" / "specimen-b")
        os.symlink(folder / kind / "train", folder / kind / "train" / "round")
    dataset = FolderDataset.open(folder)
    names = [sample.name for sample in dataset.split("train")]
    assert len(names) == 4
    assert sum(name.startswith("specimen-b/") for name in names) == 2


def test_float_pictures_with_a_margin_of_nan(folder: Path) -> None:
    import tifffile

    for path in sorted((folder / "images").rglob("*.png")):
        values = np.asarray(Image.open(path)).astype(np.float32)
        values[:5] = np.nan
        tifffile.imwrite(path.with_suffix(".tif"), values)
        path.unlink()
    problems, warnings, sentence = verdicts(folder)
    assert (problems, sentence) == ([], "")
    assert any("NaN is taken as black" in warning for warning in warnings)


def test_openfibsem_files_have_their_pixel_size(tmp_path: Path) -> None:
    structures = pytest.importorskip("fibsem.structures")
    image = structures.FibsemImage.generate_blank_image(resolution=(768, 512), hfw=150e-6, random=True)
    image.save(str(tmp_path / "a.tif"))
    micrograph = read_micrograph(tmp_path / "a.tif")
    assert micrograph.pixel_size_m == pytest.approx(150e-6 / 768)
    assert micrograph.vendor == "OpenFIBSEM"
