"""Folder datasets: layouts, class tables, figures, and every way to be malformed."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.manifest import ClassInfo, default_palette
from hpddrnet_trt.data.datasets import FolderDataset, find_images, image_files
from hpddrnet_trt.data.description import DatasetDescription
from hpddrnet_trt.data.labels import write_label_png

PALETTE = [(1, 2, 3), (40, 50, 60), (200, 0, 0)]
DESCRIPTION: dict[str, Any] = {
    "name": "tiny",
    "classes": [{"index": place, "name": name, "color": PALETTE[place]} for place, name in enumerate("abc")],
    "license": {"spdx": "CC0-1.0", "note": "made up"},
    "files": [{"split": "train", "name": "a", "group": "g1"}, {"split": "val", "name": "c", "group": "g2"}],
    "unknown key": 1,
}
NAMES = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}


def picture(name: str, size: tuple[int, int] = (24, 32)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(ord(name[0]))
    mask = rng.integers(0, 3, size, dtype=np.uint8)
    mask[:2] = 255
    return rng.integers(0, 256, size, dtype=np.uint8), mask


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_folders(
    root: Path, description: dict[str, Any] | None = DESCRIPTION, splits: dict[str, list[str]] = NAMES
) -> Path:
    for split, names in splits.items():
        for name in names:
            image, mask = picture(name)
            save(image, root / "images" / split / f"{name}.png")
            save(mask, root / "masks" / split / f"{name}.png")
    if description is not None:
        (root / "dataset.json").write_text(json.dumps(description))
    return root


def make_cityscapes(root: Path) -> Path:
    for split, names in NAMES.items():
        for name in names:
            image, mask = picture(name)
            save(image, root / split / "imgs" / f"{name}_leftImg8bit.png")
            save(mask, root / split / "labels" / f"{name}_gtFine_labelTrainIds.png")
            save(mask, root / split / "labels" / f"{name}_gtFine_color.png")  # left alone
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return make_folders(tmp_path / "data")


@pytest.mark.parametrize("key", ["license", "licence"])
@pytest.mark.parametrize("value", ["MIT", {"spdx": "MIT", "note": "made up"}, {"name": "MIT"}])
def test_a_license_is_read_from_either_key(key: str, value: Any) -> None:
    assert DatasetDescription.model_validate({key: value}).license == "MIT"


def test_folders_layout(folders: Path) -> None:
    dataset = FolderDataset.open(folders)
    assert (dataset.layout, dataset.name, dataset.license) == ("folders", "tiny", "CC0-1.0")
    assert dataset.splits == ["train", "val", "test"]
    assert dataset.classes == [ClassInfo(name=name, color=PALETTE[place]) for place, name in enumerate("abc")]
    assert dataset.palette == PALETTE
    assert [(sample.name, sample.group) for sample in dataset.split("train")] == [("a", "g1"), ("b", None)]
    assert dataset.remarks == ()
    for split, names in NAMES.items():
        for sample, name in zip(dataset.split(split), names, strict=True):
            for loaded, made in zip(dataset.load(sample), picture(name), strict=True):
                assert loaded.dtype == np.uint8
                np.testing.assert_array_equal(loaded, made)


def test_folds_part_the_pictures_by_specimens(tmp_path: Path) -> None:
    splits = {"train": ["a", "b", "c", "d"], "val": ["a", "e"], "test": ["f"]}
    groups = {("train", "a"): "g", ("val", "e"): "g", ("train", "b"): "h", ("train", "c"): "h"}  # the others: none
    files = [{"split": split, "name": name, "group": group} for (split, name), group in groups.items()]
    dataset = FolderDataset.open(make_folders(tmp_path, {**DESCRIPTION, "files": files}, splits))
    pooled = {sample.name: sample.group for sample in dataset.pooled(["train", "val"])}
    assert pooled == {
        "train/a": "g", "train/b": "h", "train/c": "h", "train/d": "d", "val/a": "a", "val/e": "g",
    }  # fmt: skip
    for count in (2, 3, 4):
        folds = [
            dataset.fold(number, count, ["train", "val"], train="train", held_out="val")
            for number in range(1, count + 1)
        ]
        assert sorted(sample.name for fold in folds for sample in fold.split("val")) == sorted(pooled)
        for fold in folds:
            assert fold.splits == ["train", "val"]
            assert not fold.shared_groups("val")
            assert sorted(sample.name for split in fold.splits for sample in fold.split(split)) == sorted(pooled)
    assert {len(fold.split("val")) for fold in folds} == {1, 2}
    with pytest.raises(UsageError, match="train, val hold 4"):
        dataset.fold(1, 5, ["train", "val"], train="train", held_out="val")


def test_cityscapes_layout(tmp_path: Path) -> None:
    dataset = FolderDataset.open(make_cityscapes(tmp_path / "city"))
    assert (dataset.layout, dataset.name) == ("cityscapes", "city")
    assert [sample.name for sample in dataset.split("train")] == ["a", "b"]
    np.testing.assert_array_equal(dataset.load(dataset.split("val")[0])[1], picture("c")[1])
    assert dataset.class_names == ["class 0", "class 1", "class 2"]
    assert dataset.palette == default_palette(3)
    assert "3 unnamed classes" in dataset.remarks[0]


def test_classes_can_be_given(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path)
    named = FolderDataset.open(root, "cityscapes", classes=["x", ClassInfo(name="y", color=(9, 9, 9)), "z"])
    assert named.class_names == ["x", "y", "z"]
    assert named.palette[1] == (9, 9, 9)
    assert named.remarks == ()
    (root / "dataset.json").write_text(json.dumps({"classes": ["p", "q", "r"]}))
    assert FolderDataset.open(root).class_names == ["p", "q", "r"]
    with pytest.raises(UsageError, match="2 to 255"):
        FolderDataset.open(root, classes=["alone"])


def test_both_layouts_have_the_same_checksum_and_figures(tmp_path: Path) -> None:
    one = FolderDataset.open(make_folders(tmp_path / "one"))
    two = FolderDataset.open(make_cityscapes(tmp_path / "two"))
    assert one.checksum() == two.checksum()
    assert one.statistics("train") == two.statistics("train")


def test_checksum_notices_every_change(folders: Path) -> None:
    original = FolderDataset.open(folders).checksum()
    assert FolderDataset.open(folders).checksum() == original
    mask = folders / "masks" / "train" / "a.png"
    kept = mask.read_bytes()
    changed = picture("a")[1]
    changed[5, 5] ^= 1
    save(changed, mask)
    after_mask = FolderDataset.open(folders).checksum()
    mask.write_bytes(kept)
    assert FolderDataset.open(folders).checksum() == original
    for kind in ("images", "masks"):
        (folders / kind / "test" / "d.png").rename(folders / kind / "test" / "e.png")
    after_name = FolderDataset.open(folders).checksum()
    assert len({original, after_mask, after_name}) == 3


def test_statistics(folders: Path) -> None:
    statistics = FolderDataset.open(folders).statistics("train")
    images, masks = (np.stack(arrays) for arrays in zip(picture("a"), picture("b"), strict=True))
    assert (statistics.images, statistics.pixels) == (2, images.size)
    assert statistics.grey_mean == pytest.approx(images.mean())
    assert statistics.grey_std == pytest.approx(images.std())
    labelled = masks[masks != 255]
    assert statistics.class_fractions == pytest.approx([(labelled == value).mean() for value in range(3)])
    assert statistics.ignored_fraction == pytest.approx((masks == 255).mean())


def test_real_dataset_matches_its_own_description(sem_data: Path) -> None:
    for name in ("nasa-super1", "shale-duvernay"):
        stated = json.loads((sem_data / name / "dataset.json").read_text())
        dataset = FolderDataset.open(sem_data / name)
        assert dataset.license == "MIT"
        assert {split: len(dataset.split(split)) for split in dataset.splits} == stated["splits"]
        statistics = dataset.statistics("train")
        expected = stated["class_pixel_fraction_per_split"]["train"]
        for index, share in enumerate(statistics.class_fractions):
            assert share == pytest.approx(expected[str(index)], abs=1e-6)
        assert (statistics.grey_mean, statistics.grey_std) == pytest.approx(stated["grey_mean_std_0_255"], abs=2e-3)


def test_other_formats_and_depths(tmp_path: Path) -> None:
    root = make_folders(tmp_path)
    image, mask = picture("a")
    (root / "images" / "train" / "a.png").unlink()
    (root / "masks" / "train" / "a.png").unlink()
    tifffile.imwrite(root / "images" / "train" / "a.tif", image.astype(np.uint16) * 100)
    write_label_png(root / "masks" / "train" / "a.png", mask, PALETTE)
    dataset = FolderDataset.open(root)
    grey, labels = dataset.load(dataset.split("train")[0])
    np.testing.assert_array_equal(labels, mask)
    assert grey.dtype == np.uint8
    assert np.corrcoef(grey.ravel(), image.ravel())[0, 1] > 0.999


def test_mask_over_the_information_bar(tmp_path: Path) -> None:
    root = make_folders(tmp_path)
    image, mask = picture("a")
    (root / "images" / "train" / "a.png").unlink()
    text = "[Image]\r\nResolutionX=32\r\nResolutionY=20\r\n"
    tifffile.imwrite(root / "images" / "train" / "a.tif", image, extratags=[(34682, 2, 0, text, True)], metadata=None)
    dataset = FolderDataset.open(root)
    for saved in (mask, mask[:20]):
        save(saved, root / "masks" / "train" / "a.png")
        grey, labels = dataset.load(dataset.split("train")[0])
        np.testing.assert_array_equal(grey, image[:20])
        np.testing.assert_array_equal(labels, mask[:20])


@settings(max_examples=20)
@given(st.dictionaries(st.sampled_from(["train", "val", "test"]), st.integers(1, 3), min_size=1))
def test_splits_are_what_is_on_disk(tmp_path_factory: pytest.TempPathFactory, counts: dict[str, int]) -> None:
    root = tmp_path_factory.mktemp("some")
    for split, count in counts.items():
        for place in range(count):
            image, mask = picture("a", (8, 8))
            save(image, root / "images" / split / "deep" / f"i{place}.png")
            save(mask, root / "masks" / split / "deep" / f"i{place}.png")
    dataset = FolderDataset.open(root)
    assert {split: len(dataset.split(split)) for split in dataset.splits} == counts
    for split in {"train", "val", "test"} - set(counts):
        with pytest.raises(UsageError, match=f"no split '{split}'"):
            dataset.split(split)


# malformed datasets --------------------------------------------------------------------------


def test_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="does not exist"):
        FolderDataset.open(tmp_path / "none")
    with pytest.raises(BadInputFile, match="holds no dataset"):
        FolderDataset.open(tmp_path)
    with pytest.raises(UsageError, match="unknown dataset layout"):
        FolderDataset.open(tmp_path, "pascal")  # type: ignore[arg-type]
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "masks" / "train").mkdir(parents=True)
    with pytest.raises(BadInputFile, match="is empty"):
        FolderDataset.open(tmp_path)


@pytest.mark.parametrize(("kind", "missing"), [("masks", "mask"), ("images", "image")])
def test_files_that_make_no_pairs(folders: Path, kind: str, missing: str) -> None:
    shutil.copy(folders / kind / "test" / "d.png", folders / kind / "test" / "d.tif")
    with pytest.raises(BadInputFile, match="same name"):
        FolderDataset.open(folders)
    (folders / kind / "test" / "d.tif").unlink()
    (folders / kind / "val" / "c.png").unlink()
    with pytest.raises(BadInputFile, match=rf"c\.png has no {missing}"):
        FolderDataset.open(folders)


def test_masks_that_do_not_fit(folders: Path) -> None:
    mask = picture("a")[1]
    mask[3, 3] = 7
    save(mask, folders / "masks" / "train" / "a.png")
    dataset = FolderDataset.open(folders)
    with pytest.raises(BadInputFile, match=r"a\.png holds the value 7, which is not one of the 3 classes"):
        dataset.load(dataset.split("train")[0])
    save(picture("a")[1][:, :-1], folders / "masks" / "train" / "a.png")
    with pytest.raises(BadInputFile, match=r"32 x 24 pixels but its mask .* is 31 x 24"):
        dataset.statistics("train")


def test_masks_that_give_no_class_table(tmp_path: Path) -> None:
    root = make_folders(tmp_path, description=None)
    for values, reason in (([0, 255], "if it means a class here"), ([0, 3], "0, 3"), ([255, 255], "nothing but 255")):
        for path in (root / "masks").rglob("*.png"):
            save(np.array([values] * 24, np.uint8).repeat(16, axis=1), path)
        with pytest.raises(BadInputFile, match=reason):
            FolderDataset.open(root)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ({"classes": ["only"]}, "2 to 255 classes"),
        ({"classes": ["x", "x"]}, "names must differ"),
        ({"classes": [{"name": "x", "index": 0}, {"name": "y", "index": 2}]}, "class indices"),
        ({"classes": [{"name": "x", "color": [1, 2]}, "y"]}, "classes.0.color"),
        ({"classes": ["x", "y"], "ignore_index": 0}, "only 255 can be ignored"),
    ],
)
def test_broken_description(folders: Path, content: Any, reason: str) -> None:
    (folders / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BadInputFile, match=reason) as caught:
        FolderDataset.open(folders)
    assert "dataset.json" in str(caught.value)


def test_classes_follow_their_mask_values(folders: Path) -> None:
    listed = [{"name": "second", "index": 1}, {"name": "first", "index": 0}, {"name": "third", "index": 2}]
    (folders / "dataset.json").write_text(json.dumps({"classes": listed}))
    assert FolderDataset.open(folders).class_names == ["first", "second", "third"]


def test_image_files(folders: Path) -> None:
    train = folders / "images" / "train"
    (train / ".hidden.png").touch()
    (train / "notes.txt").touch()
    expected = [train / "a.png", train / "b.png"]
    assert image_files(train) == expected
    assert image_files(train / "*.png") == expected
    assert image_files(train / "b.png") == [train / "b.png"]
    for wrong in (train / "none.png", folders, train / "*.jpg"):
        with pytest.raises(BadInputFile, match=r"none\.png|no micrograph found"):
            image_files(wrong)


def test_groups_in_two_splits_can_be_left_out_of_training(tmp_path: Path) -> None:
    groups = (("train", "a", "steel"), ("train", "b", "iron"), ("val", "d", "steel"))
    files = [{"split": split, "name": name, "group": group} for split, name, group in groups]
    splits = {"train": ["a", "b", "c"], "val": ["d"], "test": ["e"]}
    dataset = FolderDataset.open(make_folders(tmp_path, {"classes": list("pqr"), "files": files}, splits))
    assert dataset.shared_groups("train") == ["steel"]
    separate = dataset.without_shared_groups("train")
    assert [sample.name for sample in separate.split("train")] == ["b", "c"]
    assert separate.split("val") == dataset.split("val")
    assert separate.checksum() != dataset.checksum()
    with pytest.raises(UsageError, match="every image in split 'val'"):
        dataset.without_shared_groups("val")


def test_images_are_found_in_datasets_folders_and_lists(tmp_path: Path) -> None:
    for kind, split, name in itertools.product(("images", "masks"), ("train", "val"), ("b.png", "a.png")):
        (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / kind / split / name)
    training = [tmp_path / "images" / "train" / name for name in ("a.png", "b.png")]
    assert find_images(tmp_path) == training
    assert {path.parent.name for path in find_images(tmp_path, "val")} == {"val"}
    with pytest.raises(UsageError, match="no micrograph in split 'test'"):
        find_images(tmp_path, "test")
    assert find_images(training[0].parent) == training
    assert find_images(training[:1]) == training[:1]
    with pytest.raises(BadInputFile, match="does not exist"):
        find_images(tmp_path / "nowhere")
