"""Micrographs for calibration: which ones, which crops, and how they become model inputs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import AxisRange, InputContract, Normalization
from hpddrnet_trt.export import images as micrographs
from hpddrnet_trt.export.images import Crop, plan_crops, read_grey
from tests.tiny_export import pictures


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("micrographs"), 12, 48, 48)


def test_chosen_images_span_the_grey_levels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for index, level in enumerate([100] * 10 + [20, 240]):
        paths.append(tmp_path / f"{index:02d}.png")
        pixels = np.clip(rng.normal(level, 3, (32, 32)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    chosen = micrographs.choose_images(paths, 3)
    assert len(chosen) == 3
    assert {paths[10], paths[11]} <= set(chosen)
    assert micrographs.choose_images(paths[::-1], 3) == chosen
    assert sorted(micrographs.choose_images(paths, 50)) == paths


def test_a_smaller_choice_is_the_beginning_of_a_larger_one(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = tmp_path / "twin.png"
    twin.write_bytes(images[3].read_bytes())
    everything = [*images, twin]
    for surveyed in (512, 5):  # all of them, or every third
        monkeypatch.setattr(micrographs, "SURVEYED", surveyed)
        order = micrographs.choose_images(everything, 20)
        assert sorted(order) == sorted(everything)
        for count in range(14):
            assert micrographs.choose_images(everything, count) == order[:count]
    assert micrographs.choose_images([], 3) == []


def test_the_first_choice_is_typical_and_the_next_is_unlike_it(tmp_path: Path) -> None:
    paths = [tmp_path / f"{level:03d}.png" for level in (20, 90, 100, 110, 230)]
    for path in paths:
        Image.fromarray(np.full((16, 16), int(path.stem), np.uint8)).save(path)
    assert [path.stem for path in micrographs.choose_images(paths, 3)] == ["100", "230", "020"]


@given(length=st.integers(1, 3000), crop=st.integers(8, 1024))
def test_crops_fit_and_do_not_overlap(length: int, crop: int) -> None:
    starts = micrographs._starts(length, crop)
    assert all(0 <= start <= max(length - crop, 0) for start in starts)
    assert all(second - first >= crop for first, second in itertools.pairwise(starts))


def test_few_images_are_cut_into_several_crops(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((300, 200), np.uint8)).save(path)
    crops = micrographs.plan_crops([path], 64, 64, minimum=5)
    assert len(set(crops)) == 5
    assert micrographs.plan_crops([path], 512, 512, minimum=5) == [Crop(path, 0, 0)]
    assert len(micrographs.plan_crops([path] * 5, 64, 64, minimum=5)) == 5


def test_crops_of_an_image_do_not_depend_on_how_many_images_there_are(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((320, 320), np.uint8)).save(path)
    crops = micrographs.plan_crops([path], 64, 64, each=25)
    assert len(set(crops)) == 25
    assert crops[0] == Crop(path, 128, 128)  # the centre, then the corners
    assert {(crop.top, crop.left) for crop in crops[1:5]} == {(0, 0), (0, 256), (256, 0), (256, 256)}
    for each in (1, 4, 25):
        assert micrographs.plan_crops([path], 64, 64, each=each) == crops[:each]
        assert micrographs.plan_crops([path] * 3, 64, 64, each=each) == crops[:each] * 3


def test_every_crop_is_an_input_of_its_own(images: list[Path]) -> None:
    contract = InputContract(batch=AxisRange(minimum=3, maximum=3))
    crops = micrographs.plan_crops(images[:2], 16, 24, each=2)
    found = list(micrographs.inputs(crops, 16, 24, contract, Normalization()))
    assert [crop for crop, _ in found] == crops
    for crop, batch in found:
        grey = np.asarray(Image.open(crop.image))[crop.top : crop.top + 16, crop.left : crop.left + 24]
        assert batch.shape == (3, 1, 16, 24)
        assert batch.dtype == np.uint8
        assert (batch == grey).all()


def test_a_small_image_is_continued_by_reflection() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    got = micrographs.cut(grey, Crop(Path(), 0, 0), 8, 8)
    assert got.shape == (8, 8)
    np.testing.assert_array_equal(got[:5, 0], [0, 4, 8, 4, 0])
    np.testing.assert_array_equal(got[0], [0, 1, 2, 3, 2, 1, 0, 1])


@pytest.mark.parametrize(
    ("axis", "image", "expected"),
    [
        (AxisRange(minimum=8), 700, 696),
        (AxisRange(minimum=8), 3000, 1024),
        (AxisRange(minimum=64, maximum=300), 700, 296),
        (AxisRange(minimum=600, maximum=2048), 100, 600),
        (AxisRange(minimum=1024, maximum=1024), 100, 1024),
    ],
)
def test_crop_size_follows_model_and_images(
    axis: AxisRange, image: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micrographs, "read_grey", lambda path: np.zeros((image, image), np.uint8))
    contract = InputContract(height=axis, width=axis)
    assert micrographs.crop_size(contract, None, [Path("a"), Path("b")]) == (expected, expected)


def test_crop_size_as_asked_opens_no_image() -> None:
    assert micrographs.crop_size(InputContract(), (64, 128), [Path("missing.png")]) == (64, 128)
    with pytest.raises(UsageError, match="height must be a multiple of 8"):
        micrographs.crop_size(InputContract(), (60, 128), [])


def test_checksum_is_of_contents(images: list[Path]) -> None:
    assert micrographs.checksum(images) == micrographs.checksum(images[::-1])
    assert micrographs.checksum(images) != micrographs.checksum(images[1:])


def test_micrographs_are_seen_at_the_pixel_size_of_the_model(tmp_path: Path) -> None:
    place = tmp_path / "images" / "train" / "a.png"
    place.parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)).save(place)
    (tmp_path / "dataset.json").write_text('{"pixel_size_m": 5e-9}')
    assert read_grey(place).shape == (60, 80)
    assert read_grey(place, read_at_m=(10e-9, 20e-9)).shape == (30, 40)
    crops = plan_crops([place], 16, 16, 100, read_at_m=(10e-9, 10e-9))
    assert len(crops) == 2  # of 30 x 40 pixels
    assert len(plan_crops([place], 16, 16, 100)) == 15


def test_crops_are_seen_once_more_at_every_setting_by_turns() -> None:
    crops = [Crop(Path(str(number)), 0, 0) for number in range(40)]
    for count in (1, 4, 9, 40):
        seen = micrographs.also_shifted(crops[:count])
        assert [crop.image for crop in seen] == sorted((crop.image for crop in seen), key=lambda path: int(path.name))
        assert [crop for crop in seen if crop.shift is None] == crops[:count]
        again = [crop for crop in seen if crop.shift is not None]
        assert {crop.shift for crop in again} == set(micrographs.SHIFTED)
        assert len(again) <= max(count, 9 + count)


def test_a_shifted_crop_keeps_its_size_and_its_middle() -> None:
    grey = np.zeros((160, 200), np.uint8)
    grey[78:82, 98:102] = 200  # the middle of the crop
    for shift in micrographs.SHIFTED:
        crop = Crop(Path(), 48, 68, shift=shift)
        seen = micrographs.cut(grey, crop, 64, 64)
        assert (seen.shape, seen.dtype) == ((64, 64), np.uint8)
        np.testing.assert_array_equal(seen, micrographs.cut(grey, crop, 64, 64))
        rows = np.flatnonzero(seen[:, 32] > (int(seen.max()) + int(seen.min())) / 2)
        assert abs(rows.mean() - 31.5) <= 1, shift
    larger, smaller = (
        micrographs.cut(grey, Crop(Path(), 48, 68, shift=("magnification", factor)), 64, 64) for factor in (2, 0.5)
    )
    assert ((larger > 128).sum(), (smaller > 128).sum()) == (pytest.approx(64, abs=8), 4)
    small = micrographs.cut(grey[:30, :40], Crop(Path(), 0, 0, shift=("magnification", 0.5)), 64, 64)
    assert small.shape == (64, 64)
