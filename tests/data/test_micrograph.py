"""Reading micrographs of every supported depth and refusing damaged ones."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.data.micrograph import read_micrograph

GREY = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
GREY16 = np.random.default_rng(1).integers(0, 65536, (37, 53), dtype=np.uint16)
FLOAT = np.random.default_rng(2).normal(0, 1e3, (37, 53)).astype(np.float32)


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, **options)
    else:
        Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "array", "options"),
    [
        ("grey.png", GREY, {}),
        ("grey16.png", GREY16, {}),
        ("grey.tif", GREY, {}),
        ("lzw.tif", GREY, {"compression": "lzw"}),
        ("grey16.tif", GREY16, {}),
        ("big_endian.tif", GREY16, {"byteorder": ">"}),
        ("big_tiff.tif", GREY16, {"bigtiff": True}),
        ("tiled.tif", GREY16, {"tile": (16, 16)}),
        ("float.tif", FLOAT, {}),
        ("float_big_endian.tif", FLOAT, {"byteorder": ">"}),
    ],
)
def test_grey_values_are_kept_exactly(tmp_path: Path, name: str, array: np.ndarray, options: dict[str, Any]) -> None:
    micrograph = read_micrograph(save(tmp_path / name, array, **options))
    assert micrograph.pixels.dtype == array.dtype
    assert micrograph.pixels.dtype.isnative
    np.testing.assert_array_equal(micrograph.pixels, array)
    assert micrograph.pixel_size_m is None
    assert micrograph.info_bar_rows is None
    assert micrograph.remarks == ()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_equal_channels_are_grey_and_opaque_alpha_is_dropped(tmp_path: Path, suffix: str) -> None:
    rgb = np.repeat(GREY[..., None], 3, axis=2)
    rgba = np.concatenate([rgb, np.full_like(GREY, 255)[..., None]], axis=2)
    for name, array in (("rgb", rgb), ("rgba", rgba)):
        options = {"photometric": "rgb", **({"extrasamples": ["unassalpha"]} if name == "rgba" else {})}
        path = save(tmp_path / f"{name}{suffix}", array, **(options if suffix == ".tif" else {}))
        micrograph = read_micrograph(path)
        np.testing.assert_array_equal(micrograph.pixels, GREY)
        assert micrograph.remarks == ()


def test_planar_tiff_and_16_bit_rgb_png_keep_all_bits(tmp_path: Path) -> None:
    rgb = np.repeat(GREY16[..., None], 3, axis=2)
    planar = save(tmp_path / "p.tif", np.moveaxis(rgb, -1, 0), photometric="rgb", planarconfig="separate")
    assert cv2.imwrite(str(tmp_path / "deep.png"), rgb)
    np.testing.assert_array_equal(read_micrograph(planar).pixels, GREY16)
    np.testing.assert_array_equal(read_micrograph(tmp_path / "deep.png").pixels, GREY16)


def test_real_colour_becomes_luminance_with_a_remark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rgb = np.stack([GREY, np.roll(GREY, 1), np.roll(GREY, 2)], axis=2)
    with caplog.at_level(logging.WARNING):
        micrograph = read_micrograph(save(tmp_path / "c.png", rgb))
    expected = rgb.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(micrograph.pixels - expected).max() <= 0.51
    assert "colour" in micrograph.remarks[0]
    assert "colour" in caplog.text


def test_jpeg_grey_and_grey_rgb(tmp_path: Path) -> None:
    smooth = cv2.GaussianBlur(GREY, (0, 0), 6)
    for name, array in (("g.jpg", smooth), ("rgb.jpeg", np.repeat(smooth[..., None], 3, axis=2))):
        micrograph = read_micrograph(save(tmp_path / name, array, quality=95))
        assert np.abs(micrograph.pixels.astype(int) - smooth).max() <= 6
        assert micrograph.remarks == ()


def test_one_bit_pictures_are_black_and_white(tmp_path: Path) -> None:
    black_white = GREY > 128
    Image.fromarray(black_white).save(tmp_path / "b.png")
    tifffile.imwrite(tmp_path / "b.tif", black_white, photometric="minisblack")
    tifffile.imwrite(tmp_path / "w.tif", black_white, photometric="miniswhite")
    np.testing.assert_array_equal(read_micrograph(tmp_path / "b.png").pixels, black_white * 255)
    np.testing.assert_array_equal(read_micrograph(tmp_path / "b.tif").pixels, black_white * 255)
    np.testing.assert_array_equal(read_micrograph(tmp_path / "w.tif").pixels, ~black_white * np.uint8(255))
    deep = save(tmp_path / "deep.tif", GREY16, photometric="miniswhite")
    np.testing.assert_array_equal(read_micrograph(deep).pixels, 65535 - GREY16)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_palettes_are_applied(tmp_path: Path, suffix: str) -> None:
    ramp = np.arange(255, -1, -1, dtype=np.uint8)  # inverted, so that indices would be wrong
    path = tmp_path / f"p{suffix}"
    if suffix == ".png":
        image = Image.fromarray(GREY)
        image.putpalette(np.repeat(ramp[:, None], 3, axis=1).tobytes())
        image.save(path)
    else:
        colormap = np.repeat(ramp[None].astype(np.uint16) * 257, 3, axis=0)
        tifffile.imwrite(path, GREY, photometric="palette", colormap=colormap)
    micrograph = read_micrograph(path)
    np.testing.assert_array_equal(micrograph.pixels, 255 - GREY)
    assert micrograph.remarks == ()


def test_signed_and_wide_integers(tmp_path: Path) -> None:
    counts = GREY16.astype(np.int32) - 30000
    np.testing.assert_array_equal(read_micrograph(save(tmp_path / "a.tif", counts)).pixels, counts.astype(np.float32))
    positive = (GREY16 // 2).astype(np.int16)
    micrograph = read_micrograph(save(tmp_path / "b.tif", positive))
    assert micrograph.pixels.dtype == np.uint16
    np.testing.assert_array_equal(micrograph.pixels, positive)


@pytest.mark.parametrize("options", [{}, {"imagej": True}])
def test_several_pages_use_the_first_and_say_so(tmp_path: Path, options: dict[str, Any]) -> None:
    path = save(tmp_path / "stack.tif", np.stack([GREY, 255 - GREY, GREY]), photometric="minisblack", **options)
    micrograph = read_micrograph(path)
    np.testing.assert_array_equal(micrograph.pixels, GREY)
    assert micrograph.remarks == ("the first of 3 pages is used",)


def test_format_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "named.tif"
    Image.fromarray(GREY).save(path, format="PNG")
    np.testing.assert_array_equal(read_micrograph(path).pixels, GREY)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    whole = save(tmp_path / f"whole{suffix}", GREY).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BadInputFile, match=r"cut\.") as caught:
        read_micrograph(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", ["lzw", "zlib"])
def test_truncated_compressed_tiff(tmp_path: Path, compression: str) -> None:
    # Metadata first, then the strips: the cut goes through the pixel data only.
    whole = save(tmp_path / "whole.tif", GREY16, compression=compression, rowsperstrip=8).read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[:-200])
    with pytest.raises(BadInputFile, match="truncated"):
        read_micrograph(tmp_path / "cut.tif")


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*"]))
def test_any_garbage_gives_one_sentence(tmp_path_factory: pytest.TempPathFactory, body: bytes, head: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "x.tif"
    path.write_bytes(head + body)
    with pytest.raises(BadInputFile, match=r"x\.tif"):
        read_micrograph(path)


def test_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(BadInputFile, match="neither PNG, JPEG, BMP, TIFF"):
        read_micrograph(tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    with pytest.raises(BadInputFile, match="empty file"):
        read_micrograph(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_size_limit_is_checked_before_decoding(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"big{suffix}", np.zeros((200, 300), np.uint8))
    with pytest.raises(BadInputFile, match="300 x 200 pixels, more than the limit of 59999"):
        read_micrograph(path, max_pixels=59_999)
    assert read_micrograph(path, max_pixels=60_000).pixels.shape == (200, 300)


def test_a_header_that_lies_about_its_size_allocates_nothing(tmp_path: Path) -> None:
    content = bytearray(save(tmp_path / "small.png", GREY).read_bytes())
    content[16:24] = (1 << 20).to_bytes(4, "big") * 2  # width and height: 2^40 pixels
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(BadInputFile, match="more than the limit"):
        read_micrograph(tmp_path / "bomb.png")


@pytest.mark.parametrize("channels", [2, 5])
def test_several_detectors_in_one_file_are_refused(tmp_path: Path, channels: int) -> None:
    values = np.zeros((16, 16, channels), np.uint8)
    path = save(tmp_path / "m.tif", values, photometric="minisblack", planarconfig="contig", extrasamples=None)
    with pytest.raises(BadInputFile, match=f"{channels} channels"):
        read_micrograph(path)
    with pytest.raises(BadInputFile, match="complex64"):
        read_micrograph(save(tmp_path / "complex.tif", GREY.astype(np.complex64)))


def test_a_picture_with_varying_opacity_says_that_it_is_ignored(tmp_path: Path) -> None:
    micrograph = read_micrograph(save(tmp_path / "a.png", np.stack([GREY, 255 - GREY], axis=2)))
    np.testing.assert_array_equal(micrograph.pixels, GREY)
    assert micrograph.remarks == ("its opacity channel is ignored",)


def test_four_bit_grey_fills_the_range(tmp_path: Path, grey_png: Callable[[np.ndarray, int], bytes]) -> None:
    path = tmp_path / "four.png"
    path.write_bytes(grey_png(GREY >> 4, 4))
    np.testing.assert_array_equal(read_micrograph(path).pixels, (GREY >> 4) * 17)


def test_volume_uses_the_first_plane(tmp_path: Path) -> None:
    path = save(tmp_path / "v.tif", np.stack([GREY, 255 - GREY]), photometric="minisblack", volumetric=True)
    micrograph = read_micrograph(path)
    np.testing.assert_array_equal(micrograph.pixels, GREY)
    assert micrograph.remarks == ("the first of 2 planes is used",)


# vendor metadata -----------------------------------------------------------------------------


FOUND = {
    "Zeiss": ("Zeiss", "Zeiss tag 34118 AP_IMAGE_PIXEL_SIZE"),
    "Thermo/FEI": ("Thermo Fisher / FEI", "FEI tag 34682 [IScan] PixelWidth"),  # an ion beam picture: not [EScan]
}


def test_vendor_files(sem_data: Path) -> None:
    listing = json.loads((sem_data / "vendor-tiff" / "expected.json").read_text())
    assert listing["files"]
    for entry in listing["files"]:
        micrograph = read_micrograph(sem_data / "vendor-tiff" / entry["file"])
        assert micrograph.pixels.shape == (entry["image_rows"][1] - entry["image_rows"][0], entry["width"])
        assert micrograph.pixels.dtype == np.dtype(entry["dtype"])
        assert micrograph.pixel_size_m == pytest.approx(entry["pixel_size_nm"] * 1e-9, rel=1e-6)
        assert micrograph.info_bar_rows == entry["info_bar_rows"]
        assert micrograph.remarks == ()
        assert (micrograph.vendor, micrograph.pixel_size_source) == FOUND[entry["vendor"].split()[0]]
