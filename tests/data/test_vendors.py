"""Pixel size and vendor from every kind of metadata, and doubt where they cannot be right.

The files are constructed (``vendor_files``); the two real ones are read in ``test_micrograph.py``.
"""

from __future__ import annotations

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


# tags of TIFF files and texts beside pictures ---------------------------------------------------

Write = Callable[[Path], Path]  # folder -> the file in it
FEI = "Thermo Fisher / FEI"
TEXT, XML = files.fei_text(WIDTH, HEIGHT), files.fei_xml(WIDTH, HEIGHT)
NO_SCAN = TEXT.replace("[Scan]\r\nPixelWidth=5e-09\r\nPixelHeight=5e-09\r\n", "")
NO_BEAM = TEXT.replace("Scan=EScan", "").replace("[Scan]", "[Other]")
E_SCAN = "[EScan]\r\nPixelWidth="
TWO_SCANS = TEXT.replace(f"{E_SCAN}5e-09\r\nPixelHeight=5e-09", f"{E_SCAN}6e-09")
ZEISS = files.zeiss_text(WIDTH, HEIGHT)
OTHER_ZEISS = files.zeiss_text(WIDTH, HEIGHT, "6.000 nm", "6.000000e-09")
OME = '<OME xmlns="http://x.org/OME"><Image><Pixels SizeX="{}" SizeY="{}" PhysicalSizeX="0.5"/></Image></OME>'
OTHER_SIZE = "resized or cropped after acquisition"


def fei(text: str | None, xml: str | None = None) -> Write:
    return lambda folder: files.fei(folder / "a.tif", PICTURE, text, xml)


def zeiss(text: str | None, text16: str | None = None) -> Write:
    return lambda folder: files.zeiss(folder / "a.tif", PICTURE, text, text16)


def tescan(text: str, picture: np.ndarray = PICTURE, header: str | None = None) -> Write:
    def write(folder: Path) -> Path:
        if header is not None:
            (folder / "a-tif.hdr").write_text(header)
        return files.tescan(folder / "a.tif", picture, text)

    return write


def sidecar(text: str, name: str = "a.txt", encoding: str = "utf-8") -> Write:
    return lambda folder: beside(folder / f"{name[0]}.png", name, text, encoding=encoding)


def hitachi(*size: str, width: int = WIDTH, height: int = HEIGHT) -> Write:
    return sidecar(files.hitachi_text(width, height, *size))


def jeol(*arguments: Any, width: int = WIDTH, height: int = HEIGHT, dollars: str = "$$") -> Write:
    return sidecar(files.jeol_text(width, height, *arguments, dollars=dollars), encoding="cp1252")


def tiff(name: str = "a.tif", **options: Any) -> Write:
    def write(folder: Path) -> Path:
        tifffile.imwrite(folder / name, PICTURE, software=False, **{"metadata": None, **options})
        return folder / name

    return write


def ome(**metadata: Any) -> Write:
    return tiff("a.ome.tif", metadata={"axes": "YX", **metadata})


def ome_of(width: int, height: int) -> Write:
    return tiff("a.ome.tif", description=OME.format(width, height))


def imagej(unit: str, x: float, y: float | None = None) -> Write:
    return tiff(imagej=True, resolution=(x, x if y is None else y), resolutionunit="NONE", metadata={"unit": unit})


def resolution(x: float, y: float, unit: str) -> Write:
    return tiff(resolution=(x, y), resolutionunit=unit)


def encoded(name: str) -> Write:
    def write(folder: Path) -> Path:
        assert cv2.imwrite(str(folder / name), PICTURE)
        return folder / name

    return write


CASES: list[tuple[Any, ...]] = [  # what is written, pixel size, vendor, where the size stands, remarks
    (fei(TEXT), 5e-9, FEI, "tag 34682 [EScan] PixelWidth"),
    (fei(None, XML), 5e-9, FEI, "tag 34683"),
    (fei(TEXT, XML), 5e-9, FEI, "tag 34682"),
    # The beam that took the picture counts, and where none is named they have to agree.
    (fei(NO_SCAN), 5e-9, FEI, "[EScan]"),
    (fei(NO_SCAN.replace("Scan=EScan", "Scan=IScan")), 9e-9, FEI, "[IScan]"),
    (fei(NO_BEAM), None, FEI, "", "[IScan] PixelWidth says 9e-09 m"),
    (fei(NO_BEAM.replace("9e-09", "")), 5e-9, FEI, "[EScan]"),
    # So have sections and tags.
    (fei(TWO_SCANS), None, FEI, "", "[EScan] PixelWidth says 6e-09 m but FEI tag 34682 [Scan]"),
    (fei(TEXT, files.fei_xml(WIDTH, HEIGHT, 7e-9)), None, FEI, "", "tag 34683 BinaryResult/PixelSize says 7e-09 m"),
    (fei(files.fei_text(WIDTH // 2, HEIGHT // 2)), None, FEI, "", OTHER_SIZE),
    (fei(files.fei_text(WIDTH * 2, HEIGHT * 2)), None, FEI, "", OTHER_SIZE),
    # An empty size is unknown without a word, a senseless one with one.
    *((fei(files.fei_text(WIDTH, HEIGHT, value)), None, FEI, "") for value in ("0", "", "nan", "inf", "none")),
    *((fei(files.fei_text(WIDTH, HEIGHT, value)), None, FEI, "", "senseless") for value in ("-1e-9", "1", "1e-20")),
    (fei(files.fei_text(WIDTH, HEIGHT, "1e400")), None, FEI, ""),
    (fei(files.fei_text(WIDTH, HEIGHT, height_m=6e-9)), None, FEI, "", "not square (5e-09 x 6e-09 m, FEI tag 34682"),
    (zeiss(ZEISS), 5e-9, "Zeiss", "tag 34118"),
    (zeiss(None, ZEISS), 5e-9, "Zeiss", "tag 34119"),
    (zeiss(ZEISS, ZEISS), 5e-9, "Zeiss", "tag 34118"),
    # The unnamed number has more digits, but not where it is another one's.
    (zeiss(files.zeiss_text(WIDTH, HEIGHT, "55.82 nm", "5.582500e-08")), 55.825e-9, "Zeiss", ""),
    (zeiss(files.zeiss_text(WIDTH, HEIGHT, "1.234 µm", "0")), 1.234e-6, "Zeiss", ""),
    (zeiss(files.zeiss_text(WIDTH, HEIGHT, "77.70 pm", "5.582500e-08")), 77.7e-12, "Zeiss", ""),
    (zeiss(files.zeiss_text(WIDTH, HEIGHT, "5 lightyears", "5.582500e-08")), None, "Zeiss", ""),
    (zeiss(files.zeiss_text(1024, 768)), None, "Zeiss", "", f"{OTHER_SIZE} (1024 x 768 to 160 x 120)"),
    (zeiss(ZEISS, OTHER_ZEISS), None, "Zeiss", "", "tag 34119 AP_IMAGE_PIXEL_SIZE says 6e-09 m"),
    (tescan(files.tescan_text(0), PICTURE.astype(np.uint16) * 200), 5e-9, "TESCAN", "tag 50431 PixelSizeX"),
    (tescan(files.tescan_text(0, height_m=7e-9)), None, "TESCAN", "", "not square"),
    (tescan("other bytes under an unregistered number"), None, None, ""),
    (
        tescan(files.tescan_text(0), header=files.tescan_text(0, 8e-9)),
        None, "TESCAN", "", "a-tif.hdr [MAIN] PixelSizeX says 8e-09 m",
    ),
    *(
        (sidecar(files.tescan_text(0), name), 5e-9, "TESCAN", f"{name} [MAIN] PixelSizeX")
        for name in ("a-png.hdr", "a.hdr", "A-PNG.HDR")
    ),
    *(
        (sidecar(files.hitachi_text(WIDTH, HEIGHT), f"a{ending}", encoding), 5e-9, "Hitachi", "PixelSize")
        for encoding in ("utf-8", "utf-16", "cp1252")
        for ending in (".txt", ".TXT", ".Txt")
    ),
    # A number that can be read in two ways is none; an S-4700 states the magnification only.
    *((hitachi(size), None, "Hitachi", "") for size in ("12,5", "1,250", "12.5.1", "1,5e-9", "")),
    (hitachi(width=1280, height=960), None, "Hitachi", "", f"{OTHER_SIZE} (1280 x 960 to 160 x 120)"),
    *(
        (jeol(200, marker, dollars=dollars), 5e-9, "JEOL", "SM_MICRON_BAR")
        for marker in ("1um", "1µm", "1000nm")
        for dollars in ("$", "$$")
    ),
    *((jeol(200, "1um", "5.01nm", dollars=mark), 5.01e-9, "JEOL", "$CM_PIXEL_SIZE") for mark in ("$", "$$")),
    (jeol(width=WIDTH * 2, height=HEIGHT * 2), None, "JEOL", "", "resized or cropped"),
    (jeol(200, "1um", "7nm"), None, "JEOL", "", "states 7e-09 m but draws a scale bar of 5e-09 m"),
    (jeol(0), None, "JEOL", ""),
    *((sidecar(text), None, None, "") for text in ("", "0 0.5 0.5 0.1 0.1\n", "PixelSize=5\n", "notes: [SEM] 5 nm\n")),
    *(
        (
            ome(PhysicalSizeX=value, PhysicalSizeY=value, PhysicalSizeXUnit=unit, PhysicalSizeYUnit=unit),
            expected, "OME-TIFF", "PhysicalSizeX",
        )
        for value, unit, expected in ((5.0, "nm", 5e-9), (0.02, "µm", 2e-8), (2.0, "Å", 2e-10))
    ),
    (ome(), None, "OME-TIFF", ""),
    (ome(PhysicalSizeX=1.0, PhysicalSizeXUnit="pixel"), None, "OME-TIFF", ""),
    (ome_of(WIDTH, HEIGHT), 5e-7, "OME-TIFF", ""),
    (ome_of(WIDTH * 2, HEIGHT * 2), None, "OME-TIFF", "", "resized or cropped"),
    (ome_of(WIDTH, HEIGHT - 9), None, "OME-TIFF", "", "describes 111 rows"),
    (imagej("nm", 0.2), 5e-9, "ImageJ", "resolution"),
    *((imagej(unit, 200.0), 5e-9, "ImageJ", "resolution") for unit in ("um", "\\u00B5m", "micron")),
    (imagej("mm", 2e4), 5e-8, "ImageJ", "resolution"),
    *((imagej(unit, 300.0), None, "ImageJ", "") for unit in ("pixel", "pixels", "", "inch", "cm")),
    (imagej("nm", 1.0), None, "ImageJ", "", "1 pixel per nm"),
    (imagej("nm", 0.2, 0.3), None, "ImageJ", "", "not square"),
    # A print resolution is no pixel size; one that no printer has is.
    *((resolution(dpi, dpi, "INCH"), None, None, "") for dpi in (1, 72, 96, 300, 600, 2400, 25_000)),
    (resolution(2e6, 2e6, "CENTIMETER"), 5e-9, None, "TIFF resolution tags"),
    (resolution(2e6, 1e6, "CENTIMETER"), None, None, "", "not square"),
    (resolution(2e6, 2e6, "NONE"), None, None, ""),
    (encoded("a.png"), None, None, ""),
    (encoded("a.jpg"), None, None, ""),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pixel_size_and_vendor(tmp_path: Path, case: tuple[Any, ...]) -> None:
    write, *expected = case
    micrograph = read_micrograph(write(tmp_path))
    check(micrograph, *expected)
    assert micrograph.pixels.shape == PICTURE.shape  # nothing is cut off


@pytest.mark.parametrize("vendor", [FEI, "JEOL"])
def test_bar_by_the_acquired_size(tmp_path: Path, vendor: str) -> None:
    taller = np.vstack([PICTURE, np.full((10, WIDTH), 40, np.uint8)])
    if vendor == FEI:
        path = files.fei(tmp_path / "a.tif", taller, TEXT)
    else:
        path = beside(tmp_path / "a.png", "a.txt", files.jeol_text(WIDTH, HEIGHT), picture=taller)
    micrograph = read_micrograph(path)
    np.testing.assert_array_equal(micrograph.pixels, PICTURE)
    assert micrograph.info_bar_rows == (HEIGHT, HEIGHT + 10)
    source = "34682" if vendor == FEI else "a.txt"
    check(micrograph, 5e-9, vendor, source, "the information bar (rows 120 to 129) is cut off")


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
