"""Valid files in the form of each vendor, constructed from what the vendors' real files are known to hold.

Used by the tests of reading and by the fuzzer; only the two files of ``shared/data/vendor-tiff`` are real.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

PIXEL_SIZE_M = 5e-9


def grains(height: int = 192, width: int = 256, seed: int = 0, noise: float = 12.0) -> np.ndarray:
    """A grey picture ``[H, W]`` uint8 with blobs and shot noise, like a micrograph of grains."""
    random = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(random.normal(size=(height, width)), (0, 0), 7)
    shape = 110 + 60 * np.sign(smooth) * np.sqrt(np.abs(smooth) / np.abs(smooth).max())
    return np.clip(shape + random.normal(0, noise, (height, width)), 0, 255).astype(np.uint8)


def draw_bar(
    picture: np.ndarray, rows: int, *, level: int = 0, ink: int = 255, style: str = "text", line: int | None = None
) -> np.ndarray:
    """The picture with an information bar of ``rows`` below it, in one of the vendors' styles.

    ``style``: "text" (one line and a scale bar), "table" (frames and two lines, as FEI's), "ticks" (dotted scale, as
    Hitachi's), "logo" (a box of the opposite level at the right, as Zeiss's) or "empty". ``line``: level of a line
    along the upper edge.
    """
    width = picture.shape[1]
    bar = np.full((rows, width), level, np.uint8)
    size = rows / 60
    font = cv2.FONT_HERSHEY_SIMPLEX

    def write(text: str, x: float, y: float) -> None:
        cv2.putText(bar, text, (int(x * width), int(y * rows)), font, size, ink, max(1, round(size)), cv2.LINE_AA)

    if style in ("text", "logo"):
        write("15.0kV x5.00k SE", 0.02, 0.7)
        cv2.rectangle(bar, (int(0.7 * width), int(0.5 * rows)), (int(0.85 * width), int(0.6 * rows)), ink, -1)
    if style == "logo":
        bar[:, int(0.93 * width) :] = ink
    if style == "table":
        bar[[0, -1]] = ink
        bar[:, [0, -1]] = ink
        for x in (0.2, 0.45, 0.7):
            bar[:, int(x * width)] = ink
        for x, text in ((0.02, "HV 5 kV"), (0.22, "mag"), (0.47, "HFW"), (0.72, "2 um")):
            write(text, x, 0.8)
    if style == "ticks":
        write("S-4800 10.0kV 8.1mm x15.0k SE(U)", 0.01, 0.75)
        for x in np.linspace(0.75, 0.97, 11):
            bar[rows // 4 : rows // 2, int(x * width)] = ink
    if line is not None:
        bar[:2] = line
    return np.vstack([picture, bar])


# TIFF tags ----------------------------------------------------------------------------------


def _tagged(path: Path, picture: np.ndarray, tags: list[tuple[int, int, bytes]], **options: Any) -> Path:
    extra = [(code, kind, len(content), content, True) for code, kind, content in tags]
    tifffile.imwrite(path, picture, extratags=extra, metadata=None, software=False, **options)
    return path


def fei_text(
    width: int, height: int, size_m: float | str = PIXEL_SIZE_M, *, height_m: float | str | None = None
) -> str:
    lines = [
        "[User]", "Date=12/14/2022", "[System]", "Type=DualBeam", "[Beam]", "HV=5000", "Beam=EBeam", "Scan=EScan",
        "[Scan]", f"PixelWidth={size_m}", f"PixelHeight={size_m if height_m is None else height_m}",
        "[EScan]", f"PixelWidth={size_m}", f"PixelHeight={size_m if height_m is None else height_m}",
        "[IScan]", "PixelWidth=9e-09", "PixelHeight=9e-09",
        "[Image]", f"ResolutionX={width}", f"ResolutionY={height}", "[PrivateFei]", "DatabarHeight=",
    ]  # fmt: skip
    return "\r\n".join([*lines, ""])


def fei_xml(width: int, height: int, size_m: float = PIXEL_SIZE_M) -> str:
    return (
        '<?xml version="1.0"?>\r\n<Metadata xmlns:nil="http://schemas.fei.com/Metadata/v1/2013/07">'
        "<Instrument><Manufacturer>FEI Company</Manufacturer></Instrument><BinaryResult>"
        f"<ImageSize><X>{width}</X><Y>{height}</Y></ImageSize><PixelSize>"
        f'<X unit="m" unitPrefixPower="1">{size_m}</X><Y unit="m" unitPrefixPower="1">{size_m}</Y>'
        "</PixelSize></BinaryResult></Metadata>"
    )


def phenom_xml(bar_rows: int, size_um: float = PIXEL_SIZE_M * 1e6) -> str:
    return (
        f'<?xml version="1.0"?><FeiImage><databarHeight>{bar_rows}</databarHeight><pixelWidth unit="um">{size_um}'
        f'</pixelWidth><pixelHeight unit="um">{size_um}</pixelHeight></FeiImage>'
    )


def fei(path: Path, picture: np.ndarray, text: str | None = None, xml: str | None = None, **options: Any) -> Path:
    """Thermo Fisher / FEI: the text in tag 34682 and the XML in 34683."""
    tags = [(code, 2, value.encode() + b"\0") for code, value in ((34682, text), (34683, xml)) if value is not None]
    return _tagged(path, picture, tags, **options)


def zeiss_text(width: int, height: int, size: str = "5.000 nm", precise: str = "5.000000e-09") -> str:
    lines = ["0", "0", "0", precise, "2.000000e+03", "6", "795", "DP_IMAGE_STORE",
             f"Store resolution = {width} * {height}", "AP_PIXEL_SIZE", "Pixel Size = 77.70 nm", "AP_IMAGE_PIXEL_SIZE",
             f"Image Pixel Size = {size}", "AP_WD", "WD = 7.7 mm", "SV_VERSION", "Version = V06.03"]  # fmt: skip
    return "\r\n".join([*lines, ""])


def zeiss(path: Path, picture: np.ndarray, text: str | None, text16: str | None = None, **options: Any) -> Path:
    """Zeiss SmartSEM: the text in tag 34118 and in UTF-16 in 34119."""
    tags = [] if text is None else [(34118, 2, text.encode("cp1252") + b"\0")]
    tags += [] if text16 is None else [(34119, 2, text16.encode("utf-16-le") + b"\0\0")]
    return _tagged(path, picture, tags, **options)


def tescan_text(bar_rows: int, size_m: float = PIXEL_SIZE_M, *, height_m: float | None = None) -> str:
    height_m = size_m if height_m is None else height_m
    return (
        f"[MAIN]\r\nAccFrames=1\r\nCompany=TESCAN, a.s.\r\nDevice=MIRA3 LMH\r\nImageStripSize={bar_rows}\r\n"
        f"Magnification=5000.0\r\nPixelSizeX={size_m}\r\nPixelSizeY={height_m}\r\n[SEM]\r\nHV=15000.0\r\nWD=0.01\r\n"
    )


def tescan(path: Path, picture: np.ndarray, text: str, **options: Any) -> Path:
    """TESCAN: a thumbnail and then the lines in tag 50431."""
    thumbnail = cv2.imencode(".jpg", cv2.resize(picture.astype(np.uint8), (32, 24)))[1].tobytes()
    body = text.replace("[MAIN]\r\n", "").replace("\r\n", "\n").encode()
    return _tagged(path, picture, [(50431, 7, b"\1\0" + thumbnail + b"\2\0" + b"\n" + body + b"\0")], **options)


# files beside the picture ---------------------------------------------------------------------


def hitachi_text(width: int, height: int, size_nm: float | str = PIXEL_SIZE_M * 1e9) -> str:
    lines = ["[SemImageFile]", "InstructName=SU8230", "ImageName=img.tif", f"DataSize={width}x{height}",
             f"PixelSize={size_nm}", "SignalName=SE(U)", "AcceleratingVoltage=15000 Volt", "Magnification=10000",
             "WorkingDistance=8100 um"]  # fmt: skip
    return "\r\n".join([*lines, ""])


def jeol_text(
    width: int, height: int, bar_px: int = 200, marker: str = "1um", size: str | None = None, *, dollars: str = "$$"
) -> str:
    lines = ["$CM_FORMAT JEOL/SEM", "$CM_VERSION 1.0", "$CM_INSTRUMENT JSM-7800F", "$CM_MAG 5000",
             f"$CM_FULL_SIZE {width} {height}", f"{dollars}SM_MICRON_BAR {bar_px}",
             f"{dollars}SM_MICRON_MARKER {marker}"]  # fmt: skip
    if size is not None:
        lines.append(f"$CM_PIXEL_SIZE {size}")
    return "\r\n".join([*lines, ""])


# other formats --------------------------------------------------------------------------------


def digital_micrograph(path: Path, values: np.ndarray, scale: float = 5.0, unit: str = "nm", **metadata: Any) -> Path:
    """dm3 or dm4 by the path's ending, written by nionswift-io; needs that package."""
    from nion.data import Calibration, DataAndMetadata
    from nionswift_plugin.DM_IO import dm3_image_utils

    colour = values.ndim == 3 and values.dtype == np.uint8
    dimensions = 2 if colour else values.ndim
    calibrations = [Calibration.Calibration() for _ in range(dimensions - 2)]
    calibrations += [Calibration.Calibration(0.0, scale, unit) for _ in range(min(dimensions, 2))]
    descriptor = DataAndMetadata.DataDescriptor(dimensions == 3, 2 if dimensions == 4 else 0, min(dimensions, 2))
    data = DataAndMetadata.new_data_and_metadata(
        values, data_descriptor=descriptor, dimensional_calibrations=calibrations, metadata=metadata
    )
    with path.open("wb") as stream:
        dm3_image_utils.save_image(data, stream, int(path.suffix[-1]))
    return path


def samples(folder: Path, picture: np.ndarray) -> dict[str, Callable[[], Path]]:
    """``{name: writer}`` of small valid files, one of each kind, for the fuzzer."""
    height, width = picture.shape
    deep = picture.astype(np.uint16) * 200
    ramp = np.repeat(np.arange(256, dtype=np.uint16)[None] * 257, 3, axis=0)
    text = fei_text(width, height - 20)

    def beside(name: str, content: str, ending: str, image_ending: str = ".png") -> Path:
        path = folder / f"{name}{image_ending}"
        tifffile.imwrite(path, picture) if image_ending == ".tif" else cv2.imwrite(str(path), picture)
        (folder / f"{name}{ending}").write_text(content, newline="")
        return path

    def encoded(name: str, values: np.ndarray) -> Path:
        assert cv2.imwrite(str(folder / name), values)
        return folder / name

    def tiff(name: str, values: np.ndarray, **options: Any) -> Path:
        tifffile.imwrite(folder / name, values, **options)
        return folder / name

    return {
        "png": lambda: encoded("grey.png", picture),
        "png16": lambda: encoded("deep.png", deep),
        "png16rgb": lambda: encoded("colour.png", np.repeat(deep[..., None], 3, axis=2)),
        "jpeg": lambda: encoded("grey.jpg", picture),
        "tiff": lambda: tiff("plain.tif", deep),
        "bigtiff": lambda: tiff("big.tif", picture, bigtiff=True, byteorder=">"),
        "tiff-lzw": lambda: tiff("lzw.tif", deep, compression="lzw", predictor=True, rowsperstrip=16),
        "tiff-deflate": lambda: tiff("deflate.tif", picture, compression="zlib", tile=(64, 64)),
        "tiff-jpeg": lambda: tiff("jpeg.tif", picture, compression="jpeg", rowsperstrip=32),
        "tiff-palette": lambda: tiff("palette.tif", picture, photometric="palette", colormap=ramp),
        "tiff-pages": lambda: tiff("pages.tif", np.stack([picture] * 3), photometric="minisblack"),
        "imagej": lambda: tiff(
            "imagej.tif", deep, imagej=True, resolution=(0.2, 0.2), metadata={"unit": "nm"}, resolutionunit="NONE"
        ),
        "ome": lambda: tiff(
            "x.ome.tif", deep, metadata={"PhysicalSizeX": 5.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 5.0,
                                         "PhysicalSizeYUnit": "nm", "axes": "YX"}),
        "fei": lambda: fei(folder / "fei.tif", picture, text, fei_xml(width, height - 20)),
        "phenom": lambda: fei(folder / "phenom.tif", picture, xml=phenom_xml(20)),
        "zeiss": lambda: zeiss(
            folder / "zeiss.tif", picture, zeiss_text(width, height), zeiss_text(width, height), compression="lzw"
        ),
        "tescan": lambda: tescan(folder / "tescan.tif", deep, tescan_text(20)),
        "tescan-hdr": lambda: beside("t", tescan_text(20), "-png.hdr"),
        "hitachi": lambda: beside("h", hitachi_text(width, height), ".txt", ".tif"),
        "jeol": lambda: beside("j", jeol_text(width, height - 20), ".txt"),
        "dm3": lambda: digital_micrograph(folder / "a.dm3", picture.astype(np.float32)),
        "dm4": lambda: digital_micrograph(folder / "a.dm4", np.stack([picture] * 2).astype(np.int16)),
    }  # fmt: skip
