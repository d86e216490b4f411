"""Pixel size and vendor from every kind of metadata, and doubt where they cannot be right.

The files are constructed (``vendor_files``); the two real ones are read in ``test_micrograph.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from hpddrnet_trt.data.micrograph import Micrograph, read_micrograph
from tests.data import vendor_files as files

HEIGHT, WIDTH = 120, 160
PICTURE = files.grains(HEIGHT, WIDTH)


def plain(path: Path, picture: np.ndarray = PICTURE, **options: Any) -> Path:
    tifffile.imwrite(path, picture, software=False, **{"metadata": None, **options})
    return path


def beside(path: Path, name: str, text: str, *, encoding: str = "utf-8", picture: np.ndarray = PICTURE) -> Path:
    """A PNG at ``path`` and a text file called ``name`` beside it."""
    assert cv2.imwrite(str(path), picture)
    (path.parent / name).write_bytes(text.encode(encoding))
    return path


def check(micrograph: Micrograph, size: float | None, vendor: str | None, source: str = "", *remarks: str) -> None:
    """Size and source both or neither, vendor as given, and exactly these remarks (beginnings or parts)."""
    assert micrograph.pixel_size_m == (None if size is None else pytest.approx(size, rel=1e-6))
    assert micrograph.vendor == vendor
    assert (micrograph.pixel_size_source is None) == (size is None)
    assert source in (micrograph.pixel_size_source or "")
    assert len(micrograph.remarks) == len(remarks), micrograph.remarks
    for remark, part in zip(micrograph.remarks, remarks, strict=True):
        assert part in remark


# Thermo Fisher / FEI --------------------------------------------------------------------------

FEI = "Thermo Fisher / FEI"


def test_fei_text_and_xml(tmp_path: Path) -> None:
    text, xml = files.fei_text(WIDTH, HEIGHT), files.fei_xml(WIDTH, HEIGHT)
    check(read_micrograph(files.fei(tmp_path / "a.tif", PICTURE, text)), 5e-9, FEI, "tag 34682 [EScan] PixelWidth")
    check(read_micrograph(files.fei(tmp_path / "b.tif", PICTURE, None, xml)), 5e-9, FEI, "tag 34683")
    check(read_micrograph(files.fei(tmp_path / "c.tif", PICTURE, text, xml)), 5e-9, FEI, "tag 34682")


def test_fei_beam_that_took_the_picture_counts(tmp_path: Path) -> None:
    text = files.fei_text(WIDTH, HEIGHT).replace("[Scan]\r\nPixelWidth=5e-09\r\nPixelHeight=5e-09\r\n", "")
    assert "[Scan]" not in text
    check(read_micrograph(files.fei(tmp_path / "e.tif", PICTURE, text)), 5e-9, FEI, "[EScan]")
    ion = text.replace("Scan=EScan", "Scan=IScan")
    check(read_micrograph(files.fei(tmp_path / "i.tif", PICTURE, ion)), 9e-9, FEI, "[IScan]")


def test_fei_beams_have_to_agree_where_none_is_named(tmp_path: Path) -> None:
    text = files.fei_text(WIDTH, HEIGHT).replace("Scan=EScan", "").replace("[Scan]", "[Other]")
    path = files.fei(tmp_path / "a.tif", PICTURE, text)
    check(read_micrograph(path), None, FEI, "", "[IScan] PixelWidth says 9e-09 m")
    one = text.replace("9e-09", "")
    check(read_micrograph(files.fei(tmp_path / "b.tif", PICTURE, one)), 5e-9, FEI, "[EScan]")


def test_fei_sections_and_tags_have_to_agree(tmp_path: Path) -> None:
    scan = "[EScan]\r\nPixelWidth="
    text = files.fei_text(WIDTH, HEIGHT).replace(f"{scan}5e-09\r\nPixelHeight=5e-09", f"{scan}6e-09")
    path = files.fei(tmp_path / "a.tif", PICTURE, text)
    check(read_micrograph(path), None, FEI, "", "[EScan] PixelWidth says 6e-09 m but FEI tag 34682 [Scan]")
    path = files.fei(tmp_path / "b.tif", PICTURE, files.fei_text(WIDTH, HEIGHT), files.fei_xml(WIDTH, HEIGHT, 7e-9))
    check(read_micrograph(path), None, FEI, "", "tag 34683 BinaryResult/PixelSize says 7e-09 m")


def test_fei_bar_by_the_acquired_size(tmp_path: Path) -> None:
    taller = np.vstack([PICTURE, np.full((10, WIDTH), 40, np.uint8)])
    micrograph = read_micrograph(files.fei(tmp_path / "a.tif", taller, files.fei_text(WIDTH, HEIGHT)))
    np.testing.assert_array_equal(micrograph.pixels, PICTURE)
    assert micrograph.info_bar_rows == (HEIGHT, HEIGHT + 10)
    check(micrograph, 5e-9, FEI, "34682", "the information bar (rows 120 to 129) is cut off")


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_resized_fei_picture_has_no_pixel_size(tmp_path: Path, factor: float) -> None:
    text = files.fei_text(int(WIDTH * factor), int(HEIGHT * factor))
    micrograph = read_micrograph(files.fei(tmp_path / "a.tif", PICTURE, text))
    check(micrograph, None, FEI, "", "resized or cropped after acquisition")
    np.testing.assert_array_equal(micrograph.pixels, PICTURE)


@pytest.mark.parametrize("value", ["0", "", "nan", "inf", "none"])
def test_an_empty_pixel_size_is_unknown_without_a_word(tmp_path: Path, value: str) -> None:
    check(read_micrograph(files.fei(tmp_path / "a.tif", PICTURE, files.fei_text(WIDTH, HEIGHT, value))), None, FEI)


@pytest.mark.parametrize("value", ["-1e-9", "1", "1e-20", "1e400"])
def test_a_senseless_pixel_size_is_unknown(tmp_path: Path, value: str) -> None:
    path = files.fei(tmp_path / "a.tif", PICTURE, files.fei_text(WIDTH, HEIGHT, value))
    micrograph = read_micrograph(path)
    assert micrograph.pixel_size_m is None
    assert value == "1e400" or "senseless" in micrograph.remarks[0]


def test_pixels_that_are_not_square_have_no_size(tmp_path: Path) -> None:
    path = files.fei(tmp_path / "a.tif", PICTURE, files.fei_text(WIDTH, HEIGHT, height_m=6e-9))
    check(read_micrograph(path), None, FEI, "", "not square (5e-09 x 6e-09 m, FEI tag 34682")


# Zeiss ----------------------------------------------------------------------------------------


def test_zeiss_text_in_either_tag(tmp_path: Path) -> None:
    text = files.zeiss_text(WIDTH, HEIGHT)
    check(read_micrograph(files.zeiss(tmp_path / "a.tif", PICTURE, text)), 5e-9, "Zeiss", "tag 34118")
    check(read_micrograph(files.zeiss(tmp_path / "b.tif", PICTURE, None, text)), 5e-9, "Zeiss", "tag 34119")
    check(read_micrograph(files.zeiss(tmp_path / "c.tif", PICTURE, text, text)), 5e-9, "Zeiss", "tag 34118")


@pytest.mark.parametrize(
    ("size", "precise", "expected"),
    [
        ("55.82 nm", "5.582500e-08", 55.825e-9),  # the unnamed number has more digits
        ("1.234 µm", "0", 1.234e-6),
        ("77.70 pm", "5.582500e-08", 77.7e-12),  # another one's number does not count
        ("5 lightyears", "5.582500e-08", None),
    ],
)
def test_zeiss_units_and_digits(tmp_path: Path, size: str, precise: str, expected: float | None) -> None:
    text = files.zeiss_text(WIDTH, HEIGHT, size, precise)
    check(read_micrograph(files.zeiss(tmp_path / "a.tif", PICTURE, text)), expected, "Zeiss")


def test_zeiss_doubts(tmp_path: Path) -> None:
    path = files.zeiss(tmp_path / "a.tif", PICTURE, files.zeiss_text(1024, 768))
    check(read_micrograph(path), None, "Zeiss", "", "resized or cropped after acquisition (1024 x 768 to 160 x 120)")
    other = files.zeiss_text(WIDTH, HEIGHT, "6.000 nm", "6.000000e-09")
    path = files.zeiss(tmp_path / "b.tif", PICTURE, files.zeiss_text(WIDTH, HEIGHT), other)
    check(read_micrograph(path), None, "Zeiss", "", "tag 34119 AP_IMAGE_PIXEL_SIZE says 6e-09 m")


# TESCAN ---------------------------------------------------------------------------------------


def test_tescan_tag(tmp_path: Path) -> None:
    path = files.tescan(tmp_path / "a.tif", PICTURE.astype(np.uint16) * 200, files.tescan_text(0))
    check(read_micrograph(path), 5e-9, "TESCAN", "tag 50431 PixelSizeX")
    path = files.tescan(tmp_path / "b.tif", PICTURE, files.tescan_text(0, height_m=7e-9))
    check(read_micrograph(path), None, "TESCAN", "", "not square")
    path = files.tescan(tmp_path / "c.tif", PICTURE, "other bytes under an unregistered number")
    check(read_micrograph(path), None, None)


@pytest.mark.parametrize("name", ["a-png.hdr", "a.hdr", "A-PNG.HDR"])
def test_tescan_header_file(tmp_path: Path, name: str) -> None:
    stem = "A" if name.startswith("A") else "a"
    path = beside(tmp_path / f"{stem}.png", name, files.tescan_text(0))
    check(read_micrograph(path), 5e-9, "TESCAN", f"{name} [MAIN] PixelSizeX")


def test_tescan_tag_and_header_have_to_agree(tmp_path: Path) -> None:
    path = files.tescan(tmp_path / "a.tif", PICTURE, files.tescan_text(0))
    (tmp_path / "a-tif.hdr").write_text(files.tescan_text(0, 8e-9))
    check(read_micrograph(path), None, "TESCAN", "", "a-tif.hdr [MAIN] PixelSizeX says 8e-09 m")


# Hitachi and JEOL -----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
@pytest.mark.parametrize("ending", [".txt", ".TXT", ".Txt"])
def test_hitachi_text_file(tmp_path: Path, encoding: str, ending: str) -> None:
    path = beside(tmp_path / "a.png", f"a{ending}", files.hitachi_text(WIDTH, HEIGHT), encoding=encoding)
    check(read_micrograph(path), 5e-9, "Hitachi", "PixelSize")


@pytest.mark.parametrize("size", ["12,5", "1,250", "12.5.1", "1,5e-9"])
def test_a_number_that_can_be_read_in_two_ways_is_none(tmp_path: Path, size: str) -> None:
    path = beside(tmp_path / "a.png", "a.txt", files.hitachi_text(WIDTH, HEIGHT, size))
    check(read_micrograph(path), None, "Hitachi")


def test_a_hitachi_text_of_another_picture_is_doubted(tmp_path: Path) -> None:
    path = beside(tmp_path / "a.png", "a.txt", files.hitachi_text(1280, 960))
    check(read_micrograph(path), None, "Hitachi", "", "resized or cropped after acquisition (1280 x 960 to 160 x 120)")
    path = beside(tmp_path / "b.png", "b.txt", files.hitachi_text(WIDTH, HEIGHT, ""))  # S-4700: magnification only
    check(read_micrograph(path), None, "Hitachi")


@pytest.mark.parametrize("dollars", ["$", "$$"])
@pytest.mark.parametrize(("marker", "size"), [("1um", None), ("1µm", None), ("1000nm", None), ("1um", "5.01nm")])
def test_jeol_text_file(tmp_path: Path, dollars: str, marker: str, size: str | None) -> None:
    text = files.jeol_text(WIDTH, HEIGHT, 200, marker, size, dollars=dollars)
    path = beside(tmp_path / "a.png", "a.txt", text, encoding="cp1252")
    source = "$CM_PIXEL_SIZE" if size else "SM_MICRON_BAR"
    check(read_micrograph(path), 5.01e-9 if size else 5e-9, "JEOL", source)


def test_jeol_bar_by_the_scanned_size(tmp_path: Path) -> None:
    taller = np.vstack([PICTURE, np.full((8, WIDTH), 7, np.uint8)])
    micrograph = read_micrograph(beside(tmp_path / "a.png", "a.txt", files.jeol_text(WIDTH, HEIGHT), picture=taller))
    assert micrograph.info_bar_rows == (HEIGHT, HEIGHT + 8)
    np.testing.assert_array_equal(micrograph.pixels, PICTURE)
    check(micrograph, 5e-9, "JEOL", "a.txt", "is cut off")


def test_jeol_doubts(tmp_path: Path) -> None:
    path = beside(tmp_path / "a.png", "a.txt", files.jeol_text(WIDTH * 2, HEIGHT * 2))
    check(read_micrograph(path), None, "JEOL", "", "resized or cropped")
    path = beside(tmp_path / "b.png", "b.txt", files.jeol_text(WIDTH, HEIGHT, 200, "1um", "7nm"))
    check(read_micrograph(path), None, "JEOL", "", "states 7e-09 m but draws a scale bar of 5e-09 m")
    path = beside(tmp_path / "c.png", "c.txt", files.jeol_text(WIDTH, HEIGHT, 0))
    check(read_micrograph(path), None, "JEOL")


@pytest.mark.parametrize("text", ["", "0 0.5 0.5 0.1 0.1\n", "PixelSize=5\n", "notes: [SEM] 5 nm\n"])
def test_texts_of_others_are_passed_over(tmp_path: Path, text: str) -> None:
    check(read_micrograph(beside(tmp_path / "a.png", "a.txt", text)), None, None)


# OME-TIFF and ImageJ --------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "unit", "expected"), [(5.0, "nm", 5e-9), (0.02, "µm", 2e-8), (2.0, "Å", 2e-10)])
def test_ome_tiff(tmp_path: Path, value: float, unit: str, expected: float) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": value, "PhysicalSizeY": value}
    metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    path = plain(tmp_path / "a.ome.tif", metadata=metadata)
    check(read_micrograph(path), expected, "OME-TIFF", "PhysicalSizeX")


def test_ome_tiff_without_a_length(tmp_path: Path) -> None:
    check(read_micrograph(plain(tmp_path / "a.ome.tif", metadata={"axes": "YX"})), None, "OME-TIFF")
    metadata = {"axes": "YX", "PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "pixel"}
    check(read_micrograph(plain(tmp_path / "b.ome.tif", metadata=metadata)), None, "OME-TIFF")
    xml = '<OME xmlns="http://x.org/OME"><Image><Pixels SizeX="{}" SizeY="{}" PhysicalSizeX="0.5"/></Image></OME>'
    check(read_micrograph(plain(tmp_path / "c.ome.tif", description=xml.format(WIDTH, HEIGHT))), 5e-7, "OME-TIFF")
    path = plain(tmp_path / "d.ome.tif", description=xml.format(WIDTH * 2, HEIGHT * 2))
    check(read_micrograph(path), None, "OME-TIFF", "", "resized or cropped")
    path = plain(tmp_path / "e.ome.tif", description=xml.format(WIDTH, HEIGHT - 9))
    check(read_micrograph(path), None, "OME-TIFF", "", "describes 111 rows")


def imagej(path: Path, unit: str, per_unit: tuple[float, float]) -> Path:
    return plain(path, imagej=True, resolution=per_unit, resolutionunit="NONE", metadata={"unit": unit})


@pytest.mark.parametrize(
    ("unit", "per_unit", "expected"),
    [("nm", 0.2, 5e-9), ("um", 200.0, 5e-9), ("\\u00B5m", 200.0, 5e-9), ("micron", 200.0, 5e-9), ("mm", 2e4, 5e-8)],
)
def test_imagej_calibration(tmp_path: Path, unit: str, per_unit: float, expected: float) -> None:
    check(read_micrograph(imagej(tmp_path / "a.tif", unit, (per_unit, per_unit))), expected, "ImageJ", "resolution")


def test_imagej_without_calibration(tmp_path: Path) -> None:
    for unit in ("pixel", "pixels", "", "inch", "cm"):
        check(read_micrograph(imagej(tmp_path / "a.tif", unit, (300.0, 300.0))), None, "ImageJ")
    check(read_micrograph(imagej(tmp_path / "b.tif", "nm", (1.0, 1.0))), None, "ImageJ", "", "1 pixel per nm")
    check(read_micrograph(imagej(tmp_path / "c.tif", "nm", (0.2, 0.3))), None, "ImageJ", "", "not square")


# plain files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dpi", [1, 72, 96, 300, 600, 2400, 25_000])
def test_a_print_resolution_is_no_pixel_size(tmp_path: Path, dpi: int) -> None:
    path = plain(tmp_path / "a.tif", resolution=(dpi, dpi), resolutionunit="INCH")
    check(read_micrograph(path), None, None)


def test_a_resolution_that_no_printer_has_is_one(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.tif", resolution=(2e6, 2e6), resolutionunit="CENTIMETER")
    check(read_micrograph(path), 5e-9, None, "TIFF resolution tags")
    path = plain(tmp_path / "b.tif", resolution=(2e6, 1e6), resolutionunit="CENTIMETER")
    check(read_micrograph(path), None, None, "", "not square")
    path = plain(tmp_path / "c.tif", resolution=(2e6, 2e6), resolutionunit="NONE")
    check(read_micrograph(path), None, None)


def test_png_and_jpeg_have_no_pixel_size(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        assert cv2.imwrite(str(tmp_path / name), PICTURE)
        check(read_micrograph(tmp_path / name), None, None)


# DigitalMicrograph ----------------------------------------------------------------------------


@pytest.fixture
def dm(tmp_path: Path) -> Callable[..., Path]:
    pytest.importorskip("nionswift_plugin.DM_IO")
    return lambda name, *arguments, **options: files.digital_micrograph(tmp_path / name, *arguments, **options)


@pytest.mark.parametrize("name", ["a.dm3", "a.dm4"])
@pytest.mark.parametrize(
    ("stored", "read"),
    [("float32", "float32"), ("float64", "float32"), ("uint16", "uint16"), ("int16", "uint16"), ("int32", "float32")],
)  # fmt: skip
def test_digital_micrograph_types(dm: Callable[..., Path], name: str, stored: str, read: str) -> None:
    values = (PICTURE // 2).astype(stored)
    micrograph = read_micrograph(dm(name, values))
    assert micrograph.pixels.dtype == np.dtype(read)
    np.testing.assert_array_equal(micrograph.pixels, values)
    check(micrograph, 5e-9, "Gatan", "Scale")


def test_unsigned_bytes_of_digital_micrograph_stay_unsigned(dm: Callable[..., Path]) -> None:
    path = dm("a.dm3", PICTURE.view(np.int8))
    content = path.read_bytes()
    kind = content.index(b"DataType") + len("DataType%%%%") + 8  # behind the header's length and the kind of number
    assert content[kind] in (6, 9)
    path.write_bytes(content[:kind] + b"\6" + content[kind + 1 :])
    np.testing.assert_array_equal(read_micrograph(path).pixels, PICTURE)


def test_digital_micrograph_calibrations(dm: Callable[..., Path]) -> None:
    values = PICTURE.astype(np.float32)
    check(read_micrograph(dm("a.dm3", values, 0.5, "µm")), 5e-7, "Gatan")
    check(read_micrograph(dm("b.dm3", values, 1.0, "")), None, "Gatan")
    check(read_micrograph(dm("c.dm3", values, 0.1, "1/nm")), None, "Gatan", "", "no length (a diffraction pattern?)")


def test_a_stack_of_digital_micrograph_gives_its_first_picture(dm: Callable[..., Path]) -> None:
    values = np.stack([PICTURE, 255 - PICTURE]).astype(np.float32)
    micrograph = read_micrograph(dm("a.dm4", values))
    np.testing.assert_array_equal(micrograph.pixels, PICTURE)
    check(micrograph, 5e-9, "Gatan", "", "the first of 2 pictures is used")


def test_colour_of_digital_micrograph_becomes_grey(dm: Callable[..., Path]) -> None:
    micrograph = read_micrograph(dm("a.dm3", np.repeat(PICTURE[..., None], 3, axis=2)))
    np.testing.assert_array_equal(micrograph.pixels, PICTURE)


def test_spectra_and_complex_values_are_refused(dm: Callable[..., Path]) -> None:
    from hpddrnet_trt.core.errors import BadInputFile

    for name, values, reason in (
        ("a.dm3", PICTURE[0].astype(np.float32), "spectrum"),
        ("b.dm3", PICTURE.astype(np.complex64), "complex"),
        ("c.dm4", np.zeros((2, 3, 4, 5), np.float32), "4-dimensional"),
    ):
        with pytest.raises(BadInputFile, match=reason):
            read_micrograph(dm(name, values))
    path = dm("d.dm3", PICTURE.astype(np.float32), **{"Meta Data": {"Format": "Spectrum image"}})
    with pytest.raises(BadInputFile, match="spectrum"):
        read_micrograph(path)


def test_both_versions_at_once_in_many_threads(dm: Callable[..., Path]) -> None:
    """nionswift-io keeps the version in a global: without a lock dm3 and dm4 spoil each other."""
    from concurrent.futures import ThreadPoolExecutor

    paths = [dm("a.dm3", PICTURE.astype(np.float32)), dm("a.dm4", PICTURE.astype(np.float32))] * 20
    with ThreadPoolExecutor(8) as pool:
        for micrograph in pool.map(read_micrograph, paths):
            np.testing.assert_array_equal(micrograph.pixels, PICTURE)


def test_a_missing_reader_names_the_extra(dm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from hpddrnet_trt.core.errors import MissingDependency

    path = dm("a.dm3", PICTURE.astype(np.float32))
    monkeypatch.setitem(sys.modules, "nionswift_plugin.DM_IO.parse_dm3", None)
    with pytest.raises(MissingDependency, match=r"hpddrnet-trt\[dm\]"):
        read_micrograph(path)


# real pictures --------------------------------------------------------------------------------


def test_real_pictures_through_every_vendor(tmp_path: Path, sem_data: Path) -> None:
    """A real micrograph, saved in each vendor's form, comes back with its values and its pixel size."""
    picture = read_micrograph(next((sem_data / "nasa-super1" / "images").rglob("*.png"))).pixels
    height, width = picture.shape
    saved = {
        FEI: files.fei(tmp_path / "f.tif", picture, files.fei_text(width, height), files.fei_xml(width, height)),
        "Zeiss": files.zeiss(tmp_path / "z.tif", picture, files.zeiss_text(width, height)),
        "TESCAN": files.tescan(tmp_path / "t.tif", picture, files.tescan_text(0)),
        "Hitachi": beside(tmp_path / "h.png", "h.txt", files.hitachi_text(width, height), picture=picture),
        "JEOL": beside(tmp_path / "j.png", "j.txt", files.jeol_text(width, height), picture=picture),
    }
    for vendor, path in saved.items():
        micrograph = read_micrograph(path)
        np.testing.assert_array_equal(micrograph.pixels, picture)
        check(micrograph, 5e-9, vendor)


def test_expected_file_lists_what_is_tested(sem_data: Path) -> None:
    """The table in data/README.md calls exactly these vendors tested on real files."""
    listing = json.loads((sem_data / "vendor-tiff" / "expected.json").read_text())
    assert {entry["vendor"].split()[0] for entry in listing["files"]} == {"Zeiss", "Thermo/FEI"}
