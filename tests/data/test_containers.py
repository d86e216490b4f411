"""Files as other programs write them: the picture that every viewer shows, or a sentence."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image, ImageOps

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.data.labels import read_mask
from hpddrnet_trt.data.micrograph import read_micrograph

GREY = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)
INDICES = np.random.default_rng(1).integers(0, 3, (48, 64), dtype=np.uint8)


# --- orientation


def _save(path: Path, values: npt.NDArray[np.uint8], orientation: int) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    if path.suffix == ".tif":
        tifffile.imwrite(path, values, extratags=[(274, "H", 1, orientation, True)], metadata=None)
    else:
        Image.fromarray(values).save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def _as_shown(path: Path) -> npt.NDArray[Any]:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_pictures_and_masks_are_upright_as_viewers_show_them(tmp_path: Path, ending: str, orientation: int) -> None:
    path = _save(tmp_path / f"a.{ending}", GREY, orientation)
    # A TIFF is shown as a PNG is: Pillow 13 garbles the turned ones.
    expected = _as_shown(path if ending == "jpg" else _save(tmp_path / "shown.png", GREY, orientation))
    micrograph = read_micrograph(path, info_bar="none")
    assert np.array_equal(micrograph.pixels, expected)
    told = [f"orientation {orientation}" in remark for remark in micrograph.remarks]
    assert told == [True] * (orientation > 1)
    if ending != "jpg":
        mask = _save(tmp_path / f"m.{ending}", INDICES, orientation)
        assert np.array_equal(read_mask(mask), _as_shown(_save(tmp_path / "shown.png", INDICES, orientation)))


@pytest.mark.parametrize("orientation", [0, 9, 4711])
def test_senseless_orientations_are_none(tmp_path: Path, orientation: int) -> None:
    for ending in ("png", "tif"):
        assert np.array_equal(read_micrograph(_save(tmp_path / f"a.{ending}", GREY, orientation)).pixels, GREY)


# --- TIFF


def _tiff(path: Path, tags: dict[int, tuple[int, list[int]] | None], data: bytes = GREY.tobytes()) -> Path:
    """A TIFF of GREY whose pixel data come first, with these tags changed or (None) left out."""
    height, width = GREY.shape
    usual: dict[int, Any] = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 273: (4, [8]),
        277: (3, [1]), 278: (4, [height]), 279: (4, [width * height]),
    }  # fmt: skip
    entries = {code: value for code, value in {**usual, **tags}.items() if value is not None}
    start = 8 + len(data)
    directory, extra = struct.pack("<H", len(entries)), b""
    for code, (kind, values) in sorted(entries.items()):
        raw = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        directory += struct.pack("<HHI", code, kind, len(values))
        if len(raw) > 4:
            directory += struct.pack("<I", start + 2 + 12 * len(entries) + 4 + len(extra))
            extra += raw
        else:
            directory += raw.ljust(4, b"\0")
    path.write_bytes(struct.pack("<2sHI", b"II", 42, start) + data + directory + bytes(4) + extra)
    return path


STRIPS = [8 + row * 64 for row in range(0, 48, 16)]
COUNTS: dict[str, Any] = {
    "zero": {279: (4, [0])},
    "absent": {279: None},
    "too large": {279: (4, [2**32 - 1])},
    "too small": {279: (4, [64])},
    "zero for each strip": {273: (4, STRIPS), 278: (4, [16]), 279: (4, [0, 0, 0])},
    "absent for all strips": {273: (4, STRIPS), 278: (4, [16]), 279: None},
    "one for all strips": {273: (4, STRIPS), 278: (4, [16]), 279: (4, [64 * 48])},
    "in bits": {273: (4, STRIPS), 278: (4, [16]), 279: (4, [8192, 8192, 8192])},
    "no rows per strip": {278: None},
    "strips not in order": {273: (4, [STRIPS[0], STRIPS[1], STRIPS[2]]), 278: (4, [16]), 279: (4, [1, 2, 3])},
}


@pytest.mark.parametrize("case", COUNTS)
def test_wrong_byte_counts_of_uncompressed_data_do_no_harm(tmp_path: Path, case: str) -> None:
    path = _tiff(tmp_path / "a.tif", COUNTS[case])
    assert np.array_equal(read_micrograph(path, info_bar="none").pixels, GREY)


def test_the_last_strip_may_be_shorter_and_data_must_be_there(tmp_path: Path) -> None:
    strips = {273: (4, [8, 8 + 20 * 64, 8 + 40 * 64]), 278: (4, [20]), 279: (4, [0, 0, 0])}
    assert np.array_equal(read_micrograph(_tiff(tmp_path / "a.tif", strips), info_bar="none").pixels, GREY)
    with pytest.raises(BadInputFile, match="should reach byte"):
        read_micrograph(_tiff(tmp_path / "b.tif", {257: (4, [480]), 278: (4, [480]), 279: None}))


@pytest.mark.parametrize("missing", [None, (4, [0])])
def test_byte_counts_of_compressed_data_are_found(tmp_path: Path, missing: Any) -> None:
    packed = tifffile.TIFF.COMPRESSORS[8](GREY.tobytes())
    path = _tiff(tmp_path / "a.tif", {259: (3, [8]), 279: missing}, packed)
    assert np.array_equal(read_micrograph(path, info_bar="none").pixels, GREY)


@pytest.mark.parametrize("scale", [1, 256, 257])
def test_palettes_of_8_and_of_16_bits(tmp_path: Path, scale: int) -> None:
    ramp = np.stack([np.arange(255, -1, -1)] * 3).astype(np.uint16) * np.uint16(scale)
    tifffile.imwrite(tmp_path / "a.tif", GREY, photometric="palette", colormap=ramp)
    assert np.array_equal(read_micrograph(tmp_path / "a.tif", info_bar="none").pixels, 255 - GREY)


@pytest.mark.parametrize("marked", [True, False])
def test_thumbnails_before_the_picture_are_passed_over(tmp_path: Path, marked: bool) -> None:
    for kind, values in (("a", GREY), ("m", INDICES)):
        with tifffile.TiffWriter(tmp_path / f"{kind}.tif") as writer:
            writer.write(np.ascontiguousarray(values[::4, ::4]), subfiletype=int(marked))
            writer.write(values, subfiletype=0)
    micrograph = read_micrograph(tmp_path / "a.tif", info_bar="none")
    assert np.array_equal(micrograph.pixels, GREY)
    assert micrograph.remarks == ()
    assert np.array_equal(read_mask(tmp_path / "m.tif"), INDICES)


# --- masks that are stacks


def _pages(path: Path) -> None:
    tifffile.imwrite(path, np.stack([INDICES == 0, INDICES == 1]).astype(np.uint8), photometric="minisblack")


def _imagej(path: Path) -> None:
    tifffile.imwrite(
        path, np.stack([INDICES == 0, INDICES == 1]).astype(np.uint8), imagej=True, metadata={"axes": "ZYX"}
    )


def _ome(path: Path) -> None:
    tifffile.imwrite(path, np.stack([INDICES, INDICES]), ome=True, metadata={"axes": "CYX"}, photometric="minisblack")


def _two_samples(path: Path) -> None:
    tifffile.imwrite(path, np.stack([INDICES == 0, INDICES == 1], axis=-1).astype(np.uint8), planarconfig="contig")


def _volume(path: Path) -> None:
    tifffile.imwrite(path, np.stack([INDICES] * 16), volumetric=True, tile=(16, 16, 16))


def _palette_pages(path: Path) -> None:
    pages = [Image.fromarray(values) for values in (INDICES, 2 - INDICES)]
    for page in pages:
        page.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    pages[0].save(path, save_all=True, append_images=pages[1:])


def _grey_and_alpha(path: Path) -> None:
    Image.fromarray(np.stack([INDICES == 0, INDICES == 1], axis=-1).astype(np.uint8), "LA").save(path, format="PNG")


@pytest.mark.parametrize("write", [_pages, _imagej, _ome, _two_samples, _volume, _palette_pages, _grey_and_alpha])
def test_masks_that_are_stacks_are_refused(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "mask.tif"
    write(path)
    with pytest.raises(BadInputFile, match=r"mask .*mask\.tif (holds|is a colour|is partly)"):
        read_mask(path)


# --- BMP


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_bmp_is_read(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(GREY).convert(mode)
    image.save(tmp_path / "a.bmp")
    expected = np.asarray(Image.fromarray(np.asarray(image.convert("L"))))
    assert np.array_equal(read_micrograph(tmp_path / "a.bmp", info_bar="none").pixels, expected)


def test_bmp_masks_give_their_indices(tmp_path: Path) -> None:
    image = Image.fromarray(INDICES)
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 255, 0])
    image.save(tmp_path / "m.bmp")
    assert np.array_equal(read_mask(tmp_path / "m.bmp"), INDICES)


def test_bmp_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.bmp")
    content = bytearray((tmp_path / "a.bmp").read_bytes())
    struct.pack_into("<ii", content, 18, 30_000, 30_000)
    (tmp_path / "a.bmp").write_bytes(content)
    with pytest.raises(BadInputFile, match=r"a\.bmp cannot be decoded \(30000 x 30000 pixels cannot be in"):
        read_micrograph(tmp_path / "a.bmp")
