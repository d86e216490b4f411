"""The information bar: found where one is drawn, to the row; never where there is none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.info_bar import find_info_bar
from hpddrnet_trt.data.micrograph import Micrograph, read_micrograph
from tests.data import vendor_files as files

HEIGHT, WIDTH = 384, 512
PICTURE = files.grains(HEIGHT, WIDTH)
BAR = 28
WITH_BAR = files.draw_bar(PICTURE, BAR)


@pytest.fixture(scope="session")
def real(sem_data: Path) -> dict[str, np.ndarray]:
    """Every real micrograph at hand, uncropped; none has a bar (looked at)."""
    paths = [*sem_data.glob("*/images/*/*.png"), *sem_data.glob("vendor-tiff/*/*.tif")]
    pictures = {path.name: read_micrograph(path, info_bar="none").pixels for path in sorted(paths)}
    assert len(pictures) >= 40
    return pictures


# finding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["text", "table", "ticks", "logo"])
@pytest.mark.parametrize(("level", "ink"), [(0, 255), (255, 0), (40, 250)])
@pytest.mark.parametrize("line", [None, 255, 128])
def test_bars_of_every_style_are_found_to_the_row(style: str, level: int, ink: int, line: int | None) -> None:
    for rows in (20, 28, 50):
        assert find_info_bar(files.draw_bar(PICTURE, rows, level=level, ink=ink, style=style, line=line)) == HEIGHT


def test_bars_below_real_micrographs_are_found_to_the_row(real: dict[str, np.ndarray]) -> None:
    for name, picture in real.items():
        for style, level in (("text", 0), ("table", 0), ("ticks", 0), ("logo", 255)):
            barred = files.draw_bar(picture, picture.shape[0] // 14, level=level, ink=255 - level, style=style)
            assert find_info_bar(barred) == picture.shape[0], (name, style)


@pytest.mark.parametrize("quality", [60, 75, 90])
@pytest.mark.parametrize("level", [0, 255])
def test_bars_survive_jpeg(quality: int, level: int) -> None:
    stream = io.BytesIO()
    Image.fromarray(files.draw_bar(PICTURE, 40, level=level, ink=255 - level)).save(stream, "JPEG", quality=quality)
    assert find_info_bar(np.asarray(Image.open(stream))) == HEIGHT


@pytest.mark.parametrize("full", [257, 16])
def test_bars_in_deep_pictures(full: int) -> None:
    """TESCAN draws its bar from 0 to 65535 below a picture that may use few of these levels."""
    deep = np.vstack([PICTURE.astype(np.uint16) * full, WITH_BAR[HEIGHT:].astype(np.uint16) * 257])
    assert find_info_bar(deep) == HEIGHT
    assert find_info_bar(deep.astype(np.float32)) == HEIGHT


@given(st.integers(0, 2**31), st.sampled_from([20, 33, 60]), st.integers(0, 255), st.booleans())
@settings(max_examples=25)
def test_any_drawn_bar_is_found_and_the_picture_alone_is_left(seed: int, rows: int, level: int, dark_ink: bool) -> None:
    picture = files.grains(300, 400, seed, noise=8)
    ink = max(level - 150, 0) if dark_ink and level > 120 else min(level + 150, 255)
    assert find_info_bar(picture) is None
    if abs(ink - level) >= 100:
        assert find_info_bar(files.draw_bar(picture, rows, level=level, ink=ink)) == 300


# not finding ----------------------------------------------------------------------------------


def test_no_real_micrograph_has_one(real: dict[str, np.ndarray]) -> None:
    random = np.random.default_rng(0)
    for name, picture in real.items():
        for turn in range(4):
            assert find_info_bar(np.rot90(picture, turn)) is None, name
        for _ in range(5):
            height, width = (int(random.integers(96, side)) for side in picture.shape)
            top = int(random.integers(0, picture.shape[0] - height))
            left = int(random.integers(0, picture.shape[1] - width))
            part = picture[top : top + height, left : left + width]
            assert find_info_bar(part) is None, (name, top, left, height, width)
            harsh = np.clip((part.astype(float) - part.mean()) * 4 + 30, 0, 255).astype(np.uint8)  # mostly clipped
            assert find_info_bar(harsh) is None, (name, top, left, height, width)


def below(edge: int, *, blur: float = 0.0, noise: float = 0.0, tilt: float = 0.0, particles: int = 40) -> np.ndarray:
    """Specimen above, black below from row ``edge`` on, with bright particles on the black."""
    random = np.random.default_rng(edge)
    picture = PICTURE.astype(float)
    picture[np.add.outer(np.arange(HEIGHT), -tilt * np.arange(WIDTH)) > edge] = 0
    for _ in range(particles):
        place = (int(random.integers(WIDTH)), int(random.integers(edge + 12, HEIGHT)))
        cv2.circle(picture, place, int(random.integers(2, 6)), 220, -1)
    if blur:
        picture = cv2.GaussianBlur(picture, (0, 0), blur)
    return np.clip(picture + random.normal(-noise, noise, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("edge", [300, 330, 350])
@pytest.mark.parametrize("kind", [{"blur": 0.8}, {"blur": 0.8, "noise": 6.0}, {"tilt": 0.004}, {"particles": 0}])
def test_specimen_edges_are_no_bars(edge: int, kind: dict[str, Any]) -> None:
    """A straight lower edge with particles on the black beyond it, through real optics; and an unfinished scan."""
    assert find_info_bar(below(edge, **kind)) is None


def test_other_flat_things_are_no_bars() -> None:
    random = np.random.default_rng(1)
    salt = PICTURE.copy()
    salt[340:] = 0
    salt[340:][random.random((HEIGHT - 340, WIDTH)) < 0.02] = 200
    labels = ((cv2.GaussianBlur(random.normal(size=(HEIGHT, WIDTH)), (0, 0), 12) > 0) * 255).astype(np.uint8)
    burnt = cv2.putText(PICTURE.copy(), "15kV X5,000 5um", (20, 370), cv2.FONT_HERSHEY_SIMPLEX, 1, 255, 2)
    stripes = np.repeat(np.arange(HEIGHT) // 8 % 2 * 255, WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    blank, small = np.zeros_like(PICTURE), np.full((40, 40), 7, np.uint8)
    for picture in (salt, labels, burnt, stripes, stripes.T.copy(), blank, small):
        assert find_info_bar(picture) is None
    assert find_info_bar(np.full((HEIGHT, WIDTH), np.nan, np.float32)) is None
    assert find_info_bar(files.draw_bar(PICTURE, BAR, style="empty")) is None


# reading --------------------------------------------------------------------------------------


def save(path: Path, picture: np.ndarray) -> Path:
    assert cv2.imwrite(str(path), picture)
    return path


def assert_cut(micrograph: Micrograph, rows: int, total: int, *remarks: str) -> None:
    assert micrograph.pixels.shape[0] == rows
    assert micrograph.info_bar_rows == ((rows, total) if rows < total else None)
    expected = [*remarks, *([f"the information bar (rows {rows} to {total - 1}) is cut off"] if rows < total else [])]
    assert len(micrograph.remarks) == len(expected), micrograph.remarks
    for remark, part in zip(micrograph.remarks, expected, strict=True):
        assert part in remark


def test_a_bar_is_cut_off_and_reported(tmp_path: Path) -> None:
    micrograph = read_micrograph(save(tmp_path / "a.png", WITH_BAR))
    np.testing.assert_array_equal(micrograph.pixels, PICTURE)
    assert_cut(micrograph, HEIGHT, HEIGHT + BAR)


def test_what_is_cut_off_can_be_chosen(tmp_path: Path) -> None:
    total = HEIGHT + BAR
    path = files.fei(tmp_path / "a.tif", WITH_BAR, files.fei_text(WIDTH, HEIGHT - 40))
    assert_cut(read_micrograph(path, info_bar="none"), total, total)
    assert_cut(read_micrograph(path, info_bar="metadata"), HEIGHT - 40, total)
    assert_cut(read_micrograph(path, info_bar=100), 100, total)
    assert_cut(read_micrograph(path, info_bar=total), total, total)
    with pytest.raises(UsageError, match="cannot be kept"):
        read_micrograph(path, info_bar=total + 1)
    for wrong in (0, -1, True, "all", 1.5):
        with pytest.raises(UsageError, match="info_bar is"):
            read_micrograph(path, info_bar=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [HEIGHT - 40, HEIGHT + 9, HEIGHT + BAR])
def test_the_picture_is_believed_where_metadata_lie_about_the_bar(tmp_path: Path, rows: int) -> None:
    path = files.fei(tmp_path / "a.tif", WITH_BAR, files.fei_text(WIDTH, rows))
    total = HEIGHT + BAR
    lie = [] if rows == total else [f"say that the information bar begins at row {rows}, the picture says {HEIGHT}"]
    micrograph = read_micrograph(path)
    assert_cut(micrograph, HEIGHT, total, *lie)
    assert micrograph.pixel_size_m == 5e-9  # the width agrees


def test_metadata_count_where_the_bar_is_not_recognised(tmp_path: Path) -> None:
    strange = np.vstack([PICTURE, files.grains(BAR, WIDTH, 3)])
    path = files.fei(tmp_path / "a.tif", strange, files.fei_text(WIDTH, HEIGHT))
    assert_cut(read_micrograph(path), HEIGHT, HEIGHT + BAR)
    path = files.tescan(tmp_path / "t.tif", files.draw_bar(PICTURE, BAR, style="empty"), files.tescan_text(BAR))
    assert_cut(read_micrograph(path), HEIGHT, HEIGHT + BAR)


@pytest.mark.parametrize("vendor", ["tescan", "phenom"])
def test_a_stated_bar_that_is_not_there_is_not_cut_off(tmp_path: Path, vendor: str) -> None:
    """Cropped in an editor that kept the metadata: the rows above would be lost."""
    if vendor == "tescan":
        path = files.tescan(tmp_path / "a.tif", PICTURE, files.tescan_text(60))
    else:
        path = files.fei(tmp_path / "a.tif", PICTURE, xml=files.phenom_xml(60))
    micrograph = read_micrograph(path)
    assert_cut(micrograph, HEIGHT, HEIGHT, "state an information bar of 60 rows but there is none: nothing is cut off")
    assert micrograph.pixel_size_m == pytest.approx(5e-9)


def test_a_stated_bar_of_another_height_tells_of_resizing(tmp_path: Path) -> None:
    whole = files.draw_bar(files.grains(2 * HEIGHT, 2 * WIDTH), 80)
    half = cv2.resize(whole, (WIDTH, HEIGHT + 40), interpolation=cv2.INTER_AREA)
    micrograph = read_micrograph(files.tescan(tmp_path / "a.tif", half, files.tescan_text(80)))
    assert_cut(micrograph, HEIGHT, HEIGHT + 40, "resized after acquisition, its pixel size is unknown")
    assert micrograph.pixel_size_m is None
    assert micrograph.pixel_size_source is None
    assert micrograph.vendor == "TESCAN"


def test_hitachi_and_zeiss_bars_inside_the_picture(tmp_path: Path) -> None:
    """Both draw over the lower rows of the stated size: only the picture tells."""
    total = HEIGHT + BAR
    path = files.zeiss(tmp_path / "z.tif", WITH_BAR, files.zeiss_text(WIDTH, total))
    assert_cut(read_micrograph(path), HEIGHT, total)
    tifffile.imwrite(tmp_path / "h.tif", files.draw_bar(PICTURE, BAR, style="ticks"))
    (tmp_path / "h.txt").write_text(files.hitachi_text(WIDTH, total))
    micrograph = read_micrograph(tmp_path / "h.tif")
    assert_cut(micrograph, HEIGHT, total)
    assert micrograph.pixel_size_m == 5e-9
