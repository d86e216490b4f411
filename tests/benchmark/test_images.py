"""Images and frames of a benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.benchmark.entries import Reading, reading_of
from hpddrnet_trt.benchmark.images import Image, ImageSet, fit, load_images, own_size, timing_frames
from hpddrnet_trt.cli.options import parse_size
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import DataRecord, IntensityRecord
from tests.tiny_onnx import CLASSES, tiny_model

edges = st.integers(1, 70)


def test_sizes_as_people_write_them() -> None:
    assert parse_size("1024") == (1024, 1024)
    assert parse_size(" 768 x 1024") == (768, 1024)
    for text in ("", "x512", "big", "512x", "1x2x3", "-8"):
        with pytest.raises(UsageError, match="not understood"):
            parse_size(text)
    assert own_size([Image("a", np.zeros((37, 5), np.uint8))]) == (32, 8)  # a multiple of 8


@given(edges, edges, edges, edges)
def test_frames_have_the_asked_size_and_only_the_images_levels(h: int, w: int, height: int, width: int) -> None:
    grey = np.arange(h * w, dtype=np.uint32).astype(np.uint8).reshape(h, w)
    frame, done = fit(grey, height, width)
    assert frame.shape == (height, width)
    assert set(np.unique(frame)) <= set(np.unique(grey))
    assert ("cropped" in done) == (h > height or w > width)
    assert ("tiled" in done) == (h < height or w < width)


def test_a_frame_is_the_centre_or_a_reflection() -> None:
    grey = np.arange(36, dtype=np.uint8).reshape(6, 6)
    np.testing.assert_array_equal(fit(grey, 2, 4)[0], grey[2:4, 1:5])
    tiled = fit(grey, 11, 6)[0]
    np.testing.assert_array_equal(tiled[6:], grey[4::-1])


@given(st.integers(1, 9), st.integers(1, 5))
def test_batches_go_through_all_images(count: int, batch: int) -> None:
    images = [Image(str(index), np.full((8, 8), index, np.uint8)) for index in range(count)]
    frames, text = timing_frames(images, 8, 8, batch)
    assert all(frame.shape == (batch, 8, 8) for frame in frames)
    assert {int(value) for frame in frames for value in frame[:, 0, 0]} == set(range(count))
    assert f"from {count} images: {count} used as they are" in text


def test_faulty_images_are_refused() -> None:
    grey = np.zeros((8, 8), np.uint8)
    with pytest.raises(UsageError, match="8-bit grey"):
        Image("deep", np.zeros((8, 8), np.uint16))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fix the pair"):
        Image("pair", grey, np.zeros((8, 9), np.uint8))
    with pytest.raises(UsageError, match="no images in nothing"):
        ImageSet("nothing", [])
    with pytest.raises(UsageError, match="holds the value 3"):
        ImageSet("set", [Image("a", grey, np.full((8, 8), 3, np.uint8))], CLASSES)
    with pytest.raises(UsageError, match="masks but no classes"):
        ImageSet("set", [Image("a", grey, grey)])


def test_a_folder_of_micrographs_and_a_dataset_are_both_taken(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for folder in ("plain", "data/images/test", "data/masks/test"):
        (tmp_path / folder).mkdir(parents=True)
    for index in range(3):
        cv2.imwrite(str(tmp_path / f"plain/{index}.png"), grey + index)
        cv2.imwrite(str(tmp_path / f"data/images/test/{index}.png"), grey)
        cv2.imwrite(str(tmp_path / f"data/masks/test/{index}.png"), grey % 2)
    (tmp_path / "data/dataset.json").write_text(
        '{"name": "pair", "classes": [{"index": 0, "name": "a", "color": [0, 0, 0]},'
        ' {"index": 1, "name": "b", "color": [255, 0, 0]}]}'
    )
    plain = load_images(tmp_path / "plain", limit=2)
    assert [image.name for image in plain.images] == ["0", "1"]
    assert plain.classes is None
    data = load_images(tmp_path / "data")
    assert data.name == "pair/test"
    assert data.images[0].mask is not None
    with pytest.raises(UserError, match="no split 'val'"):
        load_images(tmp_path / "data", "val")
    with pytest.raises(BadInputFile, match="does not exist"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="at least 1"):
        load_images(tmp_path / "plain", limit=0)


def test_images_are_read_at_the_pixel_size_of_the_models(tmp_path: Path) -> None:
    files = [{"split": "test", "name": name, "pixel_size_m": size} for name, size in (("a", 5e-9), ("b", 10e-9))]
    root = tmp_path / "data"
    for kind in ("images", "masks"):
        (root / kind / "test").mkdir(parents=True)
        for entry in files:
            cv2.imwrite(str(root / kind / "test" / f"{entry['name']}.png"), np.eye(16, 24, dtype=np.uint8))
    (root / "dataset.json").write_text(json.dumps({"name": "d", "classes": ["matrix", "pore"], "files": files}))
    found = load_images(root, read_at_m=(10e-9, 10e-9)).images
    assert [image.grey.shape for image in found] == [(8, 12), (16, 24)]
    assert [image.mask is not None and image.mask.shape for image in found] == [(8, 12), (16, 24)]
    assert [image.grey.shape for image in load_images(root).images] == [(16, 24)] * 2
    alone = load_images(root / "images" / "test" / "a.png", read_at_m=(10e-9, 10e-9)).images[0]
    np.testing.assert_array_equal(alone.grey, found[0].grey)


def test_models_of_several_pixel_sizes_or_intensity_ranges_are_not_compared(tmp_path: Path) -> None:
    def model(name: str, **changes: Any) -> Path:
        return tiny_model(tmp_path / f"{name}.onnx", **changes)

    def sized(metres: float) -> DataRecord:
        return DataRecord(name="d", pixel_size_m=(metres, metres))

    plain, fine, coarse = model("plain"), model("fine", data=sized(5e-9)), model("coarse", data=sized(10e-9))
    assert reading_of([]) == Reading()
    assert reading_of([plain]).read_at_m is None
    assert reading_of([plain, fine]).read_at_m == (5e-9, 5e-9)
    with pytest.raises(UsageError, match="different pixel sizes"):
        reading_of([fine, coarse])
    with pytest.raises(UsageError, match="different intensity ranges"):
        reading_of([plain, model("white", intensity=IntensityRecord(white=0.5))])
