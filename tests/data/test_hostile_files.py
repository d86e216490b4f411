"""Micrograph files that lie: what they claim is held against what they hold, before memory is taken."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.data.micrograph import read_micrograph
from tests.conftest import REPOSITORY
from tests.data import vendor_files

PICTURE = vendor_files.grains(120, 160)
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Nothing here may take more than 64 MB, whatever the file claims (counts what Python and numpy take)."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * MEGABYTE


def refuse(path: Path, reason: str) -> None:
    with pytest.raises(BadInputFile, match=reason) as caught:
        read_micrograph(path)
    assert "\n" not in str(caught.value)


def patch_tag(
    path: Path, code: int, *, kind: int | None = None, count: int | None = None, value: int | None = None
) -> Path:
    """Change one entry of the first directory of a little-endian classic TIFF."""
    content = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", content, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        if struct.unpack_from("<H", content, entry)[0] == code:
            old = struct.unpack_from("<HHII", content, entry)
            new = (code, kind or old[1], old[2] if count is None else count, old[3] if value is None else value)
            struct.pack_into("<HHII", content, entry, *new)
            path.write_bytes(content)
            return path
    raise AssertionError(f"no tag {code}")


def plain(path: Path, picture: np.ndarray = PICTURE, **options: object) -> Path:
    tifffile.imwrite(path, picture, metadata=None, software=False, **options)
    return path


# TIFF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 150])
def test_pages_in_a_circle_end(tmp_path: Path, length: int) -> None:
    content = bytearray(plain(tmp_path / "loop.tif").read_bytes())
    start = struct.unpack_from("<I", content, 4)[0]
    tags = struct.unpack_from("<H", content, start)[0]
    link = start + 2 + 12 * tags
    directory = bytes(content[start:link])
    for _ in range(length - 1):
        struct.pack_into("<I", content, link, len(content))
        link = len(content) + len(directory)
        content += directory + bytes(4)
    struct.pack_into("<I", content, link, start)
    (tmp_path / "loop.tif").write_bytes(content)
    refuse(tmp_path / "loop.tif", "in a circle")


def test_a_chain_of_a_million_pages_ends(tmp_path: Path) -> None:
    content = bytearray(plain(tmp_path / "chain.tif").read_bytes())
    start = struct.unpack_from("<I", content, 4)[0]
    link = start + 2 + 12 * struct.unpack_from("<H", content, start)[0]
    first = len(content)
    struct.pack_into("<I", content, link, first)
    directories = np.zeros((70_000, 18), np.uint8)  # one tag each
    directories[:, 0] = 1
    following = first + 18 * (1 + np.arange(70_000, dtype="<u4"))
    directories[:, 14:18] = following.astype("<u4").view(np.uint8).reshape(-1, 4)
    (tmp_path / "chain.tif").write_bytes(bytes(content) + directories.tobytes())
    refuse(tmp_path / "chain.tif", "more than 65536 pages")


def test_a_picture_larger_than_its_pixel_data_is_refused(tmp_path: Path) -> None:
    path = patch_tag(plain(tmp_path / "a.tif"), 257, kind=4, count=1, value=5_000_000)
    patch_tag(path, 278, kind=4, count=1, value=5_000_000)
    refuse(path, "should reach byte 800000176 but the file has")


@pytest.mark.parametrize("compression", ["zlib", "lzw", "packbits", "jpeg"])
def test_a_compressed_picture_that_cannot_be_in_its_bytes_is_refused(tmp_path: Path, compression: str) -> None:
    path = plain(tmp_path / "a.tif", compression=compression, rowsperstrip=120)
    patch_tag(path, 257, kind=4, count=1, value=1_000_000)
    patch_tag(path, 278, kind=4, count=1, value=1_000_000)
    refuse(path, "cannot be in the")


def test_a_strip_that_unpacks_to_a_thousand_times_its_size_is_cut_short(tmp_path: Path) -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(MEGABYTE)) for _ in range(128)) + packer.flush()
    path = plain(tmp_path / "bomb.tif", np.zeros((16, 16), np.uint8))
    content = path.read_bytes()
    path.write_bytes(content + bomb)
    patch_tag(path, 273, value=len(content))
    patch_tag(path, 279, kind=4, value=len(bomb))
    patch_tag(path, 259, value=8)
    refuse(path, "bomb.tif cannot be decoded")  # 256 bytes are asked for, and more is an error


def test_a_jpeg_strip_larger_than_the_picture_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(stream, "JPEG")
    path = plain(tmp_path / "j.tif", np.zeros((64, 64), np.uint8), rowsperstrip=64)
    content = path.read_bytes()
    path.write_bytes(content + stream.getvalue())
    patch_tag(path, 273, value=len(content))
    patch_tag(path, 279, kind=4, value=len(stream.getvalue()))
    patch_tag(path, 259, value=7)
    tracemalloc.reset_peak()  # making it took more
    refuse(path, "9000 x 9000")


def test_senseless_tiles_and_many_samples_are_refused(tmp_path: Path) -> None:
    path = plain(tmp_path / "t.tif", tile=(64, 64), compression="zlib")
    patch_tag(path, 322, kind=4, count=1, value=1 << 20)
    refuse(patch_tag(path, 323, kind=4, count=1, value=1 << 20), "tiles")
    path = plain(tmp_path / "s.tif")
    patch_tag(path, 277, value=50)
    with pytest.raises(BadInputFile, match="50 values each, more than the limit of 80000"):
        read_micrograph(path, max_pixels=20_000)


def test_missing_strips_are_no_black_rows(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.tif", rowsperstrip=120)
    refuse(patch_tag(path, 273, kind=4, value=0), "missing")
    path = plain(tmp_path / "b.tif", rowsperstrip=60)
    refuse(patch_tag(path, 273, count=1, kind=4, value=9600), "1 strips or tiles of pixel data instead of 2")


def test_claimed_bulk_is_not_loaded(tmp_path: Path) -> None:
    path = patch_tag(plain(tmp_path / "bulk.tif"), 273, count=100_000_000, value=4096)
    os.truncate(path, 2 << 30)  # a hole: the claim fits into the file
    refuse(path, "tag 273 claims 400000000 bytes")
    path = patch_tag(plain(tmp_path / "text.tif", description="ImageJ=1.54f"), 270, count=1_000_000_000, value=4096)
    os.truncate(path, 2 << 30)
    refuse(path, "tag 270 claims")


def test_a_wrong_count_of_data_that_are_there_does_no_harm(tmp_path: Path) -> None:
    path = patch_tag(plain(tmp_path / "a.tif"), 279, kind=4, value=1000)
    np.testing.assert_array_equal(read_micrograph(path).pixels, PICTURE)


def test_unusual_codecs_are_not_reached(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.tif", compression="jpeg2000")
    refuse(path, "method that is not supported")


def test_an_enormous_vendor_text_leaves_the_picture_readable(tmp_path: Path) -> None:
    text = vendor_files.fei_text(160, 120) + "x" * (5 * MEGABYTE)
    micrograph = read_micrograph(vendor_files.fei(tmp_path / "f.tif", PICTURE, text))
    np.testing.assert_array_equal(micrograph.pixels, PICTURE)
    assert micrograph.pixel_size_m is None
    assert "tag 34682 holds" in micrograph.remarks[0]


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {chr(98 + level)} "{f"&{chr(97 + level)};" * 10}">' for level in range(9)
) + "]>"  # fmt: skip


def test_xml_entities_are_not_expanded(tmp_path: Path) -> None:
    xml = vendor_files.fei_xml(160, 120).replace("<Metadata", f"{LAUGHS}<Metadata").replace("FEI Company", "&j;")
    micrograph = read_micrograph(vendor_files.fei(tmp_path / "f.tif", PICTURE, xml=xml))
    assert micrograph.pixel_size_m is None
    pixels = '<Pixels PhysicalSizeX="5" PhysicalSizeXUnit="nm"/>'
    ome = f'<?xml version="1.0"?>{LAUGHS}<OME><Image>{pixels}</Image>&j;</OME>'
    assert read_micrograph(plain(tmp_path / "o.ome.tif", description=ome)).pixel_size_m is None


def test_deep_xml_ends(tmp_path: Path) -> None:
    xml = "<Metadata>" + "<a>" * 500_000
    assert read_micrograph(vendor_files.fei(tmp_path / "f.tif", PICTURE, xml=xml)).pixel_size_m is None


# PNG and JPEG ---------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(path: Path, *extra: bytes, width: int = 8, height: int = 8, rows: int = 8) -> Path:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes([99]) * width for _ in range(rows))))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("kind", [b"zTXtComment\0\0", b"iTXtComment\0\1\0\0\0", b"iCCPicc\0\0"])
def test_text_bombs_in_png_do_not_go_off(tmp_path: Path, kind: bytes) -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(MEGABYTE)) for _ in range(80)) + packer.flush()
    path = png(tmp_path / "b.png", chunk(kind[:4], kind[4:] + bomb))
    refuse(path, "too large")


def test_png_rows_that_are_not_there_are_no_black_rows(tmp_path: Path) -> None:
    assert read_micrograph(png(tmp_path / "a.png")).pixels.shape == (8, 8)
    refuse(png(tmp_path / "b.png", rows=5), "need 72 bytes but 45 are there")
    refuse(png(tmp_path / "c.png", width=20_000, height=20_000), "cannot be in")


def test_black_png_pictures_are_no_damage(tmp_path: Path) -> None:
    for shape, dtype in (((9, 5), np.uint8), ((9, 5), np.uint16), ((9, 5, 3), np.uint8)):
        Image.fromarray(np.zeros(shape, dtype)).save(tmp_path / "a.png")
        assert not read_micrograph(tmp_path / "a.png").pixels.any()


def test_a_jpeg_that_cannot_hold_its_picture_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(PICTURE).save(stream, "JPEG")
    content = bytearray(stream.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 30_000, 30_000)
    (tmp_path / "a.jpg").write_bytes(content)
    refuse(tmp_path / "a.jpg", "30000 x 30000 pixels cannot be in")


def test_a_jpeg_of_endless_scans_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(PICTURE).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    last = content.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(content[:last] + content[last:-2] * 500 + content[-2:])
    refuse(tmp_path / "a.jpg", "scans")


# DigitalMicrograph ----------------------------------------------------------------------------


@pytest.fixture
def dm(tmp_path: Path) -> Callable[[str], Path]:
    pytest.importorskip("nionswift_plugin.DM_IO")
    return lambda name: vendor_files.digital_micrograph(tmp_path / name, PICTURE.astype(np.float32))


@pytest.mark.parametrize("name", ["a.dm3", "a.dm4"])
def test_lengths_in_digital_micrograph_files_are_checked(dm: Callable[[str], Path], name: str) -> None:
    path = dm(name)
    content = bytearray(path.read_bytes())
    size = 4 if name.endswith("3") else 8
    mark = re.search(rb"Data(?:.{8})?%%%%", content, re.DOTALL)
    assert mark is not None
    place = mark.end() + 3 * size  # behind the header's length, "array" and the kind of number
    assert int.from_bytes(content[place : place + size], "big") == PICTURE.size
    content[place : place + size] = ((1 << 8 * size - 4) - 1).to_bytes(size, "big")
    path.write_bytes(content)
    refuse(path, name)


def test_a_huge_digital_micrograph_file_is_not_read(dm: Callable[[str], Path]) -> None:
    path = dm("a.dm4")
    os.truncate(path, 1 << 40)
    refuse(path, "too many for")


@pytest.mark.parametrize("name", ["a.dm3", "a.dm4"])
def test_nested_tags_end(tmp_path: Path, name: str) -> None:
    pytest.importorskip("nionswift_plugin.DM_IO")
    kind = "I" if name.endswith("3") else "Q"
    root = struct.pack(f">bb{kind}", 0, 0, 1)
    entry = struct.pack(">bH", 20, 0) + (bytes(8) if kind == "Q" else b"") + root
    head = struct.pack(f">I{kind}I", int(name[-1]), 1000, 1)
    (tmp_path / name).write_bytes(head + root + entry * 100_000)
    refuse(tmp_path / name, "RecursionError")


# files beside the picture ---------------------------------------------------------------------


def test_a_sidecar_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    beside = tmp_path / "a.txt"
    beside.write_text(vendor_files.hitachi_text(160, 120))
    os.truncate(beside, 5 << 30)
    micrograph = read_micrograph(tmp_path / "a.png")
    assert micrograph.pixel_size_m is None
    assert f"a.txt holds {5 << 30} bytes" in micrograph.remarks[0]


def test_only_ordinary_files_of_the_vendors_count_as_sidecars(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    (tmp_path / "a-png.hdr").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "a.txt")  # opening it would wait for ever
    assert read_micrograph(tmp_path / "a.png").remarks == ()
    Image.fromarray(PICTURE).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("PixelSize=5\nnotes of a user\n" + "x" * 2 * MEGABYTE)
    assert read_micrograph(tmp_path / "b.png").remarks == ()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_sidecar_that_may_not_be_read_is_a_remark(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(vendor_files.hitachi_text(160, 120))
    (tmp_path / "a.txt").chmod(0)
    assert "cannot be read" in read_micrograph(tmp_path / "a.png").remarks[0]


# everything at random -------------------------------------------------------------------------


@pytest.mark.parametrize("cases", [330, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_end_in_a_picture_or_in_one_sentence(cases: int) -> None:
    """The fuzzer's first cases, in a process of their own: a decoder might take that down, or much memory."""
    pytest.importorskip("nionswift_plugin.DM_IO")
    pytest.importorskip("resource")
    run = subprocess.run(
        [sys.executable, "-m", "tests.data.fuzz_micrographs", str(cases)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    totals = [int(word) for word in re.findall(r"\d+", re.findall("^all .*", run.stdout, re.MULTILINE)[0])]
    assert sum(totals) == cases
    assert min(totals) > cases / 6  # both ends occur: the damage is neither too weak nor too strong
