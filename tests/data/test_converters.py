"""Converters on small copies of the authors' layouts, and on real data put back into them."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.data.catalog import ENTRIES
from hpddrnet_trt.data.check import check_dataset
from hpddrnet_trt.data.convert import convert_dataset
from hpddrnet_trt.data.converters import (
    CONVERTERS,
    SUPER_COLORS,
    classes_of_colors,
    classes_of_values,
    find_folder,
    plain_name,
    read_colors,
    read_image,
    split_by_group,
)
from hpddrnet_trt.data.datasets import FolderDataset

RNG = np.random.default_rng(3)


def grey(height: int = 24, width: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (height, width), dtype=np.uint8)


def labels(classes: int, height: int = 24, width: int = 32) -> np.ndarray:
    mask = RNG.integers(0, classes, (height, width)).astype(np.uint8)
    mask.flat[:classes] = np.arange(classes)
    return mask


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    return path


def painted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Super-alloy annotation: the micrograph as RGBA with precipitates painted over."""
    colours = np.repeat(image[..., None], 4, axis=2)
    colours[..., 3] = 255
    for colour, label in SUPER_COLORS.items():
        colours[mask == label, :3] = colour
    return colours


def save_painted(path: Path, image: np.ndarray, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, painted(image, mask), photometric="rgb", extrasamples=["unassalpha"])


Converted = dict[tuple[str, str], tuple[np.ndarray, np.ndarray, str | None]]


def converted(name: str, source: Path, folder: Path) -> Converted:
    """Convert, check, and read with the code that training uses: (split, name) -> image, mask, group."""
    dataset = convert_dataset(ENTRIES[name], source, folder)
    report = check_dataset(folder, progress=False)
    assert report.ok, report.text()
    assert dataset.class_names == [known.name for known in ENTRIES[name].classes]
    assert dataset.license == ENTRIES[name].license
    reopened = FolderDataset.open(folder)
    return {
        (split, sample.name): (*reopened.load(sample), sample.group)
        for split in reopened.splits
        for sample in reopened.split(split)
    }


# NASA


def test_superalloy_with_real_masks(sem_data: Path, tmp_path: Path) -> None:
    """The shared set in the upstream layout, painted as upstream, comes back bit for bit."""
    original = FolderDataset.open(sem_data / "nasa-super1")
    described = json.loads((sem_data / "nasa-super1/dataset.json").read_text())
    expected = {}
    for entry in described["files"]:
        sample = next(one for one in original.split(entry["split"]) if one.name == entry["name"])
        image, mask = original.load(sample)
        # The repository's own test images are not among the shared ones: val images stand in for them.
        image_path = entry["source_image"].replace("/val/", f"/{entry['split']}/")
        mask_path = entry["source_mask"].replace("/val_annot/", f"/{entry['split']}_annot/")
        root = tmp_path / "pretrained-microscopy-models-f50b568"
        save(root / image_path, np.repeat(image[..., None], 3, axis=2))
        save_painted(root / mask_path, image, mask)
        expected[entry["split"], entry["name"]] = (image, mask, entry["group"])
    for name, group in (("SE_15kv precip - untested-2_0", "SE_15kv-precip-untested-2"),):  # as in Super-4
        image, mask = grey(), labels(3)
        save(root / f"benchmark_segmentation_data/Super1/train/{name}.tif", image)
        save_painted(root / f"benchmark_segmentation_data/Super1/train_annot/{name}_mask.tif", image, mask)
        expected["train", f"{group}_0"] = (image, mask, group)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in root.rglob("*.tif"):
            archive.write(path, path.relative_to(tmp_path))
    result = converted("nasa-super1", tmp_path / "all.zip", tmp_path / "out")
    assert result.keys() == expected.keys()
    for key, (image, mask, group) in expected.items():
        np.testing.assert_array_equal(result[key][0], image)
        np.testing.assert_array_equal(result[key][1], mask)
        assert result[key][2] == group


def test_coatings_with_real_names(sem_data: Path, tmp_path: Path) -> None:
    """Names and groups as in the shared set, from the authors' file names; masks cut small."""
    original = FolderDataset.open(sem_data / "nasa-ebc")
    expected = {}
    for entry in json.loads((sem_data / "nasa-ebc/dataset.json").read_text())["files"]:
        sample = next(one for one in original.split(entry["split"]) if one.name == entry["name"])
        image, mask = (pixels[:64, :64] for pixels in original.load(sample))
        mask = mask.copy()
        mask[0, :3] = (0, 1, 2)
        for kind, source, pixels in (("", "source_image", np.dstack([image] * 3)), ("_annot", "source_mask", mask)):
            save(tmp_path / f"repo/EBC3/{entry['split']}{kind}" / Path(entry[source]).name, pixels)
        expected[entry["split"], entry["name"]] = (image, mask, entry["group"])
    result = converted("nasa-ebc3", tmp_path, tmp_path / "out")
    assert result.keys() == expected.keys()
    for key, (image, mask, group) in expected.items():
        np.testing.assert_array_equal(result[key][0], image)
        np.testing.assert_array_equal(result[key][1], mask)
        assert result[key][2] == group


def test_an_unknown_colour_names_file_and_colour(tmp_path: Path) -> None:
    root = tmp_path / "source/Super1"
    for split in ("train", "val", "test"):
        image, mask = grey(), labels(3)
        save(root / split / "spot1_0.tif", image)
        save_painted(root / f"{split}_annot" / "spot1_0_mask.tif", image, mask)
    broken = painted(grey(), labels(3))
    broken[3, 4, :3] = (1, 2, 250)
    tifffile.imwrite(root / "val_annot/spot1_0_mask.tif", broken, photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(BadInputFile, match=r"val_annot/spot1_0_mask.tif holds the colour \(1, 2, 250\)"):
        convert_dataset(ENTRIES["nasa-super1"], tmp_path / "source", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


# Rocks


def test_the_shale_mosaic_gives_the_shared_blocks(sem_data: Path, tmp_path: Path) -> None:
    """Cut a strip with the shared blocks in it into overlapping tiles; the blocks come back."""
    original = FolderDataset.open(sem_data / "shale-duvernay")
    image, mask = grey(6016, 512), labels(2, 6016, 512)
    blocks = {sample.name: original.load(sample) for split in original.splits for sample in original.split(split)}
    for name, (pixels, block) in blocks.items():
        top, size = int(name[4:8]), pixels.shape[0]
        image[top : top + size, :size] = pixels
        mask[top : top + size, :size] = block
    for order in ("rows", "columns"):
        root = tmp_path / order
        cut_into_tiles(root, image, np.where(mask == 0, 255, 0).astype(np.uint8), order)
        result = converted("shale-duvernay", root, tmp_path / f"out-{order}")
        assert {split: sum(key[0] == split for key in result) for split in ("train", "val", "test")} == {
            "train": 9, "val": 3, "test": 3
        }  # fmt: skip
        by_name = {name: entry for (_, name), entry in result.items()}
        for name, (pixels, block) in blocks.items():
            np.testing.assert_array_equal(by_name[name][0], pixels)
            np.testing.assert_array_equal(by_name[name][1], block)


def cut_into_tiles(root: Path, image: np.ndarray, mask: np.ndarray, order: str) -> None:
    places = [(row, column) for row in range(46) for column in range(3 if row < 9 else 2)]
    if order == "columns":
        places.sort(key=lambda place: (place[1], place[0]))
    for number, (row, column) in enumerate(places):
        window = (slice(row * 128, row * 128 + 256), slice(column * 128, column * 128 + 256))
        save(root / f"TrainData/Images/Tile_run1_{number:04d}.tif", image[window])
        save(root / f"TrainData/Masks/Tile_run1_MASK_{number:04d}.tif", mask[window])


def test_shale_tiles_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    image = grey(6016, 512)
    cut_into_tiles(tmp_path, image, np.zeros_like(image), "rows")
    first, last = (tmp_path / f"TrainData/Images/Tile_run1_{number:04d}.tif" for number in (0, 100))
    content = first.read_bytes()
    first.write_bytes(last.read_bytes())
    with pytest.raises(BadInputFile, match="do not fit together"):
        convert_dataset(ENTRIES["shale-duvernay"], tmp_path, tmp_path / "out")
    first.write_bytes(content)
    last.unlink()
    with pytest.raises(BadInputFile, match="100 tiles"):
        convert_dataset(ENTRIES["shale-duvernay"], tmp_path, tmp_path / "out")


def make_mudrock(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    masks = {}
    for name in names:
        save(root / "dataset/data/JPEGImages" / f"{name}.jpg", grey())
        masks[name] = labels(3)
        save(root / "dataset/data/SegmentationClassRaw" / f"{name}.png", masks[name])
    return masks


def test_mudrock_keeps_the_published_lists(tmp_path: Path) -> None:
    names = ["10_1_a", "10_1_b", "11_2_a", "12_3_c"]
    masks = make_mudrock(tmp_path / "source", names)
    save(tmp_path / "source/dataset/data/JPEGImages/99_1_a.jpg", grey())  # without a mask: left out
    lists = tmp_path / "source/dataset/data/ImageSets"
    lists.mkdir()
    for split, text in {"train": "10_1_a\r\n10_1_b\r\n", "val": "11_2_a\n\n", "test": "12_3_c"}.items():
        (lists / f"{split}.txt").write_text(text)
    result = converted("mudrocknet", tmp_path / "source", tmp_path / "out")
    assert list(result) == [("train", "10_1_a"), ("train", "10_1_b"), ("val", "11_2_a"), ("test", "12_3_c")]
    for (_, name), (_, mask, group) in result.items():
        np.testing.assert_array_equal(mask, masks[name])
        assert group == name.split("_")[0]


def test_mudrock_without_lists_is_split_by_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_mudrock(tmp_path / "source", [f"{group}_1_{tile}" for group in range(8) for tile in "ab"])
    with caplog.at_level(logging.WARNING):
        converted("mudrocknet", tmp_path / "source", tmp_path / "out")
    assert "by group" in caplog.text
    assert check_dataset(tmp_path / "out", progress=False).shared_groups == {}


def test_pointers_of_git_lfs_are_recognised(tmp_path: Path) -> None:
    make_mudrock(tmp_path / "source", ["1_1_a", "2_1_a", "3_1_a"])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13093\n"
    (tmp_path / "source/dataset/data/JPEGImages/1_1_a.jpg").write_text(pointer)
    with pytest.raises(BadInputFile, match="git lfs pull"):
        convert_dataset(ENTRIES["mudrocknet"], tmp_path / "source", tmp_path / "out")


# Axons


def test_axons_are_split_by_animal_and_noise_is_ignored(tmp_path: Path) -> None:
    root = tmp_path / "source/data_axondeepseg_sem-r20211130"
    for number in range(1, 9):
        stem = f"sub-rat{number}_sample-data{number}_SEM"
        image = np.dstack([grey()] * 4) if number == 3 else grey()  # one is RGBA
        mask = np.choose(labels(6), [0, 127, 128, 255, 130, 233]).astype(np.uint8)
        save(root / f"sub-rat{number}/micr/{stem}.png", image if number != 3 else with_opacity(image))
        save(root / f"derivatives/labels/sub-rat{number}/micr/{stem}_seg-axonmyelin-manual.png", mask)
        save(root / f"derivatives/labels/sub-rat{number}/micr/{stem}_seg-axon-manual.png", mask)
    result = converted("axondeepseg-sem", tmp_path / "source", tmp_path / "out")
    assert len(result) == 8
    assert {entry[2] for entry in result.values()} == {f"sub-rat{number}" for number in range(1, 9)}
    for _, mask, _ in result.values():
        assert set(np.unique(mask)) == {0, 1, 2, IGNORE_INDEX}


def with_opacity(image: np.ndarray) -> np.ndarray:
    image = image.copy()
    image[..., 3] = 255
    return image


# What they share


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_colours_are_decoded_exactly(data: st.DataObject) -> None:
    colour = st.tuples(*[st.integers(0, 255)] * 3)
    palette = data.draw(st.lists(colour, min_size=1, max_size=6, unique=True))
    wanted = np.array(data.draw(st.lists(st.integers(0, len(palette) - 1), min_size=6, max_size=6))).reshape(2, 3)
    picture = np.array(palette, dtype=np.uint8)[wanted]
    table = {one: index for index, one in enumerate(palette)}
    np.testing.assert_array_equal(classes_of_colors(picture, table, Path("m")), wanted)
    used = palette[int(wanted[0, 0])]
    rest = {one: index for one, index in table.items() if one != used}
    with pytest.raises(BadInputFile, match="m holds the colour"):
        classes_of_colors(picture, rest, Path("m"))
    greys = len({*used}) == 1
    if greys:  # a grey that is no colour of the table belongs to the class of greys
        assert classes_of_colors(picture, rest, Path("m"), grey=99)[0, 0] == 99


@given(st.dictionaries(st.integers(-1, 300), st.integers(0, 254), min_size=2, max_size=6), st.randoms())
@settings(max_examples=50, deadline=None)
def test_values_are_decoded_exactly(table: dict[int, int], random: object) -> None:
    keys = list(table)
    values = np.array([random.choice(keys) for _ in range(12)], dtype=np.int64).reshape(3, 4)  # type: ignore[attr-defined]
    expected = np.vectorize(table.get)(values)
    np.testing.assert_array_equal(classes_of_values(values, table, Path("m")), expected)
    missing = int(values[0, 0])
    with pytest.raises(BadInputFile, match=f"m holds the value {missing};"):
        classes_of_values(values, {key: value for key, value in table.items() if key != missing}, Path("m"))


@given(st.sets(st.text(min_size=1, max_size=8), max_size=40))
@settings(max_examples=50, deadline=None)
def test_a_split_by_group_is_complete_and_does_not_depend_on_order(groups: set[str]) -> None:
    split = split_by_group(sorted(groups))
    assert split == split_by_group(sorted(groups, reverse=True) * 2)
    assert split.keys() == groups
    if len(groups) >= 3:
        assert set(split.values()) == {"train", "val", "test"}
        assert list(split.values()).count("train") >= len(groups) / 3


def test_masks_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="8-bit colours"):
        read_colors(save(tmp_path / "a.tif", grey().astype(np.uint16)))
    plain = grey()
    np.testing.assert_array_equal(read_colors(save(tmp_path / "b.png", plain)), np.dstack([plain] * 3))


def test_names_folders_and_depths(tmp_path: Path) -> None:
    deep = RNG.integers(0, 60_000, (4, 5), dtype=np.uint16)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.tif", deep)), deep)
    assert read_image(save(tmp_path / "b.tif", deep.astype(np.float32))).dtype == np.uint8
    assert plain_name("040617#2_S127(2)0015") == "040617-2_S127-2-0015"
    (tmp_path / "x/Super1/train").mkdir(parents=True)
    assert find_folder(tmp_path, "Super1/train") == tmp_path / "x/Super1/train"
    assert find_folder(tmp_path / "x/Super1", "Super1") == tmp_path / "x/Super1"
    with pytest.raises(BadInputFile, match="no folder Super2"):
        find_folder(tmp_path, "Super2")


@pytest.mark.parametrize("name", list(CONVERTERS))
def test_every_converter_refuses_an_empty_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(BadInputFile, match="authors publish"):
        convert_dataset(ENTRIES[name], tmp_path / "source", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
