"""One micrograph in any depth gives one label map, whichever door it comes through."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpddrnet_trt import load_segmenter, read_micrograph
from hpddrnet_trt.core.manifest import IntensityRecord
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.intensity import range_of
from hpddrnet_trt.inference import Segmenter
from tests.data.test_intensity import COPIES
from tests.toy import ToyEngine, grey_image, manifest


@pytest.fixture(scope="module")
def picture(sem_data: Path) -> np.ndarray:
    file = sorted((sem_data / "nasa-super1" / "images" / "test").iterdir())[0]
    return np.ascontiguousarray(read_micrograph(file).pixels[:256, :320])


def test_the_shipped_model_labels_every_copy_alike(picture: np.ndarray, tmp_path: Path) -> None:
    with load_segmenter("nasa-super1", threads=1) as segmenter:
        expected = segmenter.segment(picture)
        assert expected.remarks == ()
        for name, copy in COPIES.items():
            path = tmp_path / f"{name}.tif"
            tifffile.imwrite(path, copy(picture))
            assert np.array_equal(segmenter.segment(copy(picture)).labels, expected.labels), name
            assert np.array_equal(segmenter.segment(read_micrograph(path)).labels, expected.labels), name


@pytest.mark.parametrize("copy", COPIES)
def test_datasets_give_the_same_pictures_in_every_depth(copy: str, picture: np.ndarray, tmp_path: Path) -> None:
    for kind, pixels in (("images", COPIES[copy](picture)), ("masks", (picture > 128).astype(np.uint8))):
        (tmp_path / kind / "val").mkdir(parents=True)
        tifffile.imwrite(tmp_path / kind / "val" / "a.tif", pixels)
    dataset = FolderDataset.open(tmp_path)
    assert np.array_equal(dataset.load(dataset.split("val")[0])[0], picture)
    shutil.rmtree(tmp_path)


def test_the_model_says_which_part_of_the_range_is_black_and_white() -> None:
    record = IntensityRecord(black=0.2, white=0.8, bits=16)
    grey = grey_image(24, 32)
    stretched = np.rint((grey.astype(float) - 51).clip(0, 153) / 0.6).astype(np.uint8)
    engine = ToyEngine(manifest().replace(intensity=record))
    expected = Segmenter(ToyEngine()).segment(stretched).labels
    for image in (grey, grey.astype(np.uint16) * 257, (grey / 255).astype(np.float32)):
        assert np.array_equal(Segmenter(engine).segment(image).labels, expected)
    # Given by the caller, and where pictures are brought into the range before: once only.
    assert np.array_equal(
        Segmenter(engine, window=(0, 255)).segment(grey).labels, Segmenter(ToyEngine()).segment(grey).labels
    )
    assert np.array_equal(Segmenter(engine).taking_8_bits().segment(stretched).labels, expected)
    assert range_of(record) == Segmenter(engine).intensity_range
