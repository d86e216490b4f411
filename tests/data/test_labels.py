"""Masks and label maps: stored numbers survive, colours are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, ContractError, UsageError
from hpddrnet_trt.data import labels
from hpddrnet_trt.data.labels import (
    IGNORE_COLOR,
    UNKNOWN_COLOR,
    overlay,
    read_mask,
    write_label_png,
    write_label_tiff,
    write_labels,
    write_rgb_png,
)

PALETTE = [(10, 20, 30), (200, 100, 0), (0, 0, 250)]
LABELS = np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), (31, 47))


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)), st.sampled_from([".png", ".tif"]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray, suffix: str) -> None:
    path = tmp_path_factory.mktemp("labels") / f"m{suffix}"
    assert write_labels(path, labels, PALETTE) == path
    np.testing.assert_array_equal(read_mask(path), labels)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_written_colours_are_the_palette(tmp_path: Path) -> None:
    write_label_png(tmp_path / "m.png", LABELS, PALETTE)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P"
        colours = np.asarray(image.convert("RGB"))
    for value, colour in [*enumerate(PALETTE), (255, IGNORE_COLOR)]:
        assert (colours[value == LABELS] == colour).all()


def test_tiff_carries_the_scale(tmp_path: Path) -> None:
    write_label_tiff(tmp_path / "m.tif", LABELS, PALETTE, pixel_size_m=25e-9)
    with tifffile.TiffFile(tmp_path / "m.tif") as tif:
        page = tif.pages.first
        numerator, denominator = page.tags["XResolution"].value
        assert page.tags["ResolutionUnit"].value == tifffile.RESUNIT.CENTIMETER
        assert 1e-2 / (numerator / denominator) == pytest.approx(25e-9, rel=1e-4)
        assert tuple(page.colormap[:, 1] >> 8) == PALETTE[1]


def test_plain_masks(tmp_path: Path) -> None:
    Image.fromarray(LABELS).save(tmp_path / "l.png")
    Image.fromarray(LABELS == 1).save(tmp_path / "one_bit.png")
    Image.fromarray(np.repeat(LABELS[..., None], 3, axis=2)).save(tmp_path / "rgb.png")
    tifffile.imwrite(tmp_path / "wide.tif", LABELS.astype(np.int32))
    tifffile.imwrite(tmp_path / "float.tif", LABELS.astype(np.float32))
    tifffile.imwrite(tmp_path / "white.tif", LABELS, photometric="miniswhite")
    for name in ("l.png", "rgb.png", "wide.tif", "float.tif", "white.tif"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), LABELS, err_msg=name)
    np.testing.assert_array_equal(read_mask(tmp_path / "one_bit.png"), LABELS == 1)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_narrow_palette_and_grey_masks_keep_their_numbers(
    tmp_path: Path, bits: int, grey_png: Callable[[np.ndarray, int], bytes]
) -> None:
    labels = np.random.default_rng(bits).integers(0, 1 << bits, (9, 13), dtype=np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette([7, 8, 9] * (1 << bits))
    palette.save(tmp_path / "p.png", bits=bits)
    np.testing.assert_array_equal(read_mask(tmp_path / "p.png"), labels)
    (tmp_path / "g.png").write_bytes(grey_png(labels, bits))
    np.testing.assert_array_equal(read_mask(tmp_path / "g.png"), labels)


def test_unsuitable_masks_are_refused(tmp_path: Path) -> None:
    Image.fromarray(LABELS).save(tmp_path / "m.jpg")
    Image.fromarray(np.stack([LABELS, LABELS, 255 - LABELS], axis=2)).save(tmp_path / "c.png")
    tifffile.imwrite(tmp_path / "big.tif", np.full((8, 8), 256, np.uint16))
    tifffile.imwrite(tmp_path / "half.tif", np.full((8, 8), 0.5, np.float32))
    tifffile.imwrite(tmp_path / "minus.tif", np.full((8, 8), -1, np.int16))
    for name, reason in (
        ("m.jpg", "JPEG"), ("c.png", "colour picture"), ("big.tif", "256"), ("half.tif", "0.5"), ("minus.tif", "-1"),
    ):  # fmt: skip
        with pytest.raises(BadInputFile, match=reason):
            read_mask(tmp_path / name)


def test_unsuitable_labels_and_targets(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="two-dimensional"):
        write_label_png(tmp_path / "m.png", LABELS.astype(np.int64), PALETTE)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"\.jpg"):
        write_labels(tmp_path / "m.jpg", LABELS, PALETTE)
    with pytest.raises(UsageError, match="at most 255"):
        write_labels(tmp_path / "m.png", LABELS, [(0, 0, 0)] * 256)
    assert list(tmp_path.iterdir()) == []


def test_overlay_mixes_exactly() -> None:
    grey = np.random.default_rng(1).integers(0, 256, LABELS.shape, dtype=np.uint8)
    labels = LABELS.copy()
    labels[0, 0] = 9  # outside the palette
    drawn = overlay(grey, labels, PALETTE, alpha=0.25)
    colour = np.zeros((*labels.shape, 3))
    for value, entry in [*enumerate(PALETTE), (9, UNKNOWN_COLOR)]:
        colour[labels == value] = entry
    expected = 0.75 * grey[..., None] + 0.25 * colour
    expected[labels == 255] = np.repeat(grey[labels == 255][:, None], 3, axis=1)
    assert np.abs(drawn - expected).max() <= 0.5 + 1e-4
    assert drawn.dtype == np.uint8
    with pytest.raises(ContractError, match="do not fit"):
        overlay(grey[1:], labels, PALETTE)
    with pytest.raises(UsageError, match="alpha"):
        overlay(grey, labels, PALETTE, alpha=40)


@pytest.mark.parametrize("large", [False, True])
def test_colour_pictures_are_written_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    if large:
        monkeypatch.setattr(labels, "_MOST_IN_MEMORY", 0)
    for shape in ((1, 1, 3), (7, 13, 3), (64, 1, 3)):
        picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        write_rgb_png(tmp_path / "a.png", picture)
        with Image.open(tmp_path / "a.png") as found:
            found.verify()  # the checksums
        with Image.open(tmp_path / "a.png") as found:
            assert found.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(found), picture)
