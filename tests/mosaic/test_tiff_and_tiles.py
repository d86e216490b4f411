"""TIFF pyramids and stacks, folders of tiles and slices; and that every kind of file gives the same pixels."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.mosaic.layout import Box
from hpddrnet_trt.mosaic.sources import KINDS, open_source
from tests.data.vendor_files import draw_bar, grains
from tests.mosaic.source_files import SIZE, SPACING, tile_folder, tiled_tiff, volume, whole, zarr_store

PIXELS = volume()
SLICE = PIXELS[0]


def _table(folder: Path, lines: list[str], columns: str = "file,x,y") -> None:
    (folder / "positions.csv").write_text("\n".join([columns, *lines]) + "\n")


def _slices(folder: Path, pixels: np.ndarray, name: str = "slice{}.png") -> Path:
    folder.mkdir()
    for number, picture in enumerate(pixels, 8):  # 8, 9, 10
        Image.fromarray(picture).save(folder / name.format(number))
    return folder


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One volume in all kinds of files."""
    pytest.importorskip("zarr")
    folder = tmp_path_factory.mktemp("kinds")
    tiles = folder / "tiles"
    lines = []
    for z, picture in enumerate(PIXELS):
        part = tile_folder(folder / f"part{z}", picture)
        tiles.mkdir(exist_ok=True)
        for file in part.iterdir():
            row, column = int(file.name[1:4]), int(file.name[6:9])
            file.rename(tiles / f"z{z}_{file.name}")
            lines.append(f"z{z}_{file.name},{70 * column + 1000},{60 * row - 50},{z}")
    _table(tiles, lines, "file,x,y,z")
    paths = {
        "zarr 0.5": zarr_store(folder / "5.zarr", PIXELS, "0.5"),
        "zarr 0.5 sharded": zarr_store(folder / "s.zarr", PIXELS, "0.5", shards=(1, 96, 64)),
        "zarr 0.4": zarr_store(folder / "4.zarr", PIXELS, "0.4", "tczyx", chunks=(1, 1, 2, 50, 60))
        if False
        else zarr_store(folder / "4.zarr", PIXELS, "0.4"),
        "pyramid": tiled_tiff(folder / "pyramid.tif", PIXELS),
        "lzw strips": tiled_tiff(
            folder / "strips.tif", PIXELS, tile=None, compression="lzw", rowsperstrip=17, predictor=2
        ),
        "plain strips": tiled_tiff(folder / "plain.tif", PIXELS, tile=None, compression=None, rowsperstrip=7),
        "plain tiles": tiled_tiff(folder / "tiles.tif", PIXELS, compression=None, levels=0),
        "slices": _slices(folder / "slices", PIXELS),
        "tiles": tiles,
    }
    tifffile.imwrite(
        folder / "imagej.tif", PIXELS, imagej=True, metadata={"axes": "ZYX", "spacing": 0.01, "unit": "um"}
    )
    tifffile.imwrite(folder / "big.tif", PIXELS, bigtiff=True, byteorder=">", photometric="minisblack", tile=(64, 64))
    paths |= {"ImageJ": folder / "imagej.tif", "pages": folder / "big.tif"}
    return {name: open_source(path) for name, path in paths.items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_kind_gives_the_same_pixels(every_kind: dict[str, Any], data: st.DataObject) -> None:
    slices, height, width = PIXELS.shape
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    tall, wide = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    box = Box(data.draw(st.integers(0, slices - 1)), top, left, tall, wide)
    expected = PIXELS[box.z, box.rows, box.columns]
    for name, source in every_kind.items():
        piece = source.read(box)
        assert piece.unreadable == (), name
        assert piece.pixels.dtype == np.uint8, name
        assert np.array_equal(piece.pixels, expected), name
        assert len(source.signature(box)) == 32, name


def test_every_kind_says_the_same(every_kind: dict[str, Any]) -> None:
    samples = {name: source.sample(500) for name, source in every_kind.items()}
    for name, source in every_kind.items():
        assert source.shape == PIXELS.shape, name
        assert source.fill_value == 0, name
        assert np.array_equal(samples[name], samples["zarr 0.5"]), name
        assert np.array_equal(pickle.loads(pickle.dumps(source)).sample(500), samples[name]), name
    assert 400 <= samples["tiles"].size <= 1200
    assert every_kind["plain strips"].sample(10**7).size == PIXELS.size
    scaled = [every_kind[name] for name in ("zarr 0.5", "zarr 0.4", "pyramid", "lzw strips")]
    assert [source.pixel_size_m for source in scaled] == [pytest.approx(SIZE)] * 4
    assert [source.spacing_m for source in scaled] == [pytest.approx(SPACING)] * 4
    assert every_kind["ImageJ"].spacing_m == pytest.approx(1e-8)
    assert every_kind["slices"].pixel_size_m is None
    units = {name: source.unit for name, source in every_kind.items()}
    assert units["zarr 0.5 sharded"] == (96, 64)
    assert units["pyramid"] == units["plain tiles"] == (32, 48)
    assert (units["lzw strips"], units["plain strips"], units["ImageJ"]) == ((17, 190), (1, 1), (1, 1))
    assert (units["slices"], units["tiles"]) == ((150, 190), (60, 70))


@pytest.mark.parametrize(
    ("dtype", "compression"),
    [("u1", "jpeg"), *itertools.product(["u1", "u2", "i2", "f4", "f8"], [None, "zlib", "lzw", "zstd"])],
)
def test_types_of_tiff(tmp_path: Path, dtype: str, compression: str | None) -> None:
    values = SLICE.astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(48, 32), compression=compression)
    source = open_source(tmp_path / "a.tif", pixel_size=5e-9)
    assert source.dtype == {"u1": np.uint8, "u2": np.uint16}.get(dtype, np.float32)
    assert source.pixel_size_m == 5e-9
    expected = tifffile.imread(tmp_path / "a.tif")
    assert np.array_equal(source.read(Box(0, 40, 30, 90, 100)).pixels, expected[40:130, 30:130])


def test_color_becomes_grey_as_in_micrographs(tmp_path: Path) -> None:
    from hpddrnet_trt.data.micrograph import read_micrograph

    color = np.random.default_rng(0).integers(0, 255, (100, 120, 3), np.uint8)
    color[:50] = color[:50, :, :1]
    for compression in (None, "zlib"):
        tifffile.imwrite(tmp_path / "a.tif", color, compression=compression, rowsperstrip=30)
        grey = read_micrograph(tmp_path / "a.tif").pixels
        assert np.array_equal(open_source(tmp_path / "a.tif").read(Box(0, 7, 5, 80, 90)).pixels, grey[7:87, 5:95])
    tifffile.imwrite(tmp_path / "a.tif", 255 - SLICE, photometric="miniswhite")
    assert np.array_equal(whole(open_source(tmp_path / "a.tif"))[0], SLICE)
    tifffile.imwrite(tmp_path / "bits.tif", SLICE > 99, photometric="minisblack", tile=(32, 32))
    assert np.array_equal(whole(open_source(tmp_path / "bits.tif"))[0], np.where(SLICE > 99, 255, 0))


def test_what_would_differ_from_tile_to_tile_is_refused(tmp_path: Path) -> None:
    planes = np.zeros((3, 64, 64), np.uint8)
    for options, said in (
        ({"data": planes, "photometric": "rgb", "planarconfig": "separate"}, "color channels one behind the other"),
        ({"data": planes.transpose(1, 2, 0).astype("f4"), "photometric": "rgb"}, "floating point"),
        ({"data": planes[0], "extratags": [(274, "H", 1, 6, True)]}, "turned or mirrored"),
        ({"data": np.zeros((4, 16, 16), np.uint8), "volumetric": True, "tile": (2, 16, 16)}, "volumes within one page"),
        ({"data": planes[0].astype("c8")}, "complex64"),
        ({"data": planes[0], "compression": "jpeg2000"}, "not supported"),
    ):  # fmt: skip
        tifffile.imwrite(tmp_path / "a.tif", **{"photometric": "minisblack", **options})
        with pytest.raises(BadInputFile, match=said):
            open_source(tmp_path / "a.tif")


def test_channels_of_a_tiff(tmp_path: Path) -> None:
    both = np.stack([PIXELS, PIXELS + 1], axis=1)
    tifffile.imwrite(tmp_path / "a.ome.tif", both, photometric="minisblack", metadata={"axes": "ZCYX"})
    with pytest.raises(UsageError, match="2 channels; choose one with --channel 0 to 1"):
        open_source(tmp_path / "a.ome.tif")
    for channel in (0, 1):
        assert np.array_equal(whole(open_source(tmp_path / "a.ome.tif", channel=channel)), PIXELS + channel)


def test_damaged_and_missing_tiles_of_a_tiff(tmp_path: Path) -> None:
    path = tiled_tiff(tmp_path / "a.tif", PIXELS)
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[1]
        offsets, counts = page.dataoffsets, page.databytecounts
        at = {name: page.tags[name].valueoffset for name in ("TileOffsets", "TileByteCounts")}
        size = page.tags["TileByteCounts"].valuebytecount // len(counts)
    with path.open("r+b") as file:
        file.seek(offsets[5])
        file.write(os.urandom(counts[5]))
        for index, offset in ((6, 10**9), (7, 0)):
            file.seek(at["TileOffsets"] + 8 * index)
            file.write(offset.to_bytes(8, "little"))
        file.seek(at["TileByteCounts"] + size * 7)
        file.write(bytes(size))
    source = open_source(path)
    piece = source.read(Box(1, 10, 20, 130, 160))
    assert [box for box, _ in piece.unreadable] == [Box(1, 32, 48, 32, 48), Box(1, 32, 96, 32, 48)]
    assert "tile 5 of" in piece.unreadable[0][1]
    assert "it should lie in bytes 1000000000" in piece.unreadable[1][1]
    expected = PIXELS[1, 10:140, 20:180].copy()
    expected[22:54, 28:160] = 0  # 7 has no place: a sparse file
    assert np.array_equal(piece.pixels, expected)
    assert source.read(Box(0, 10, 20, 130, 160)).unreadable == ()


def test_a_cut_off_tiff_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SLICE, rowsperstrip=40)
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[: -50 * 190])
    piece = open_source(tmp_path / "a.tif").read(Box(0, 0, 0, 150, 190))
    assert [box for box, _ in piece.unreadable] == [Box(0, 80, 0, 40, 190), Box(0, 120, 0, 30, 190)]
    assert np.array_equal(piece.pixels[:80], SLICE[:80])
    for size in (3, 9, 200):
        (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:size])
        with pytest.raises(BadInputFile, match=r"a\.tif"):
            open_source(tmp_path / "a.tif")


def test_a_tiff_of_enormous_strips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SLICE, compression="zlib", rowsperstrip=150)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        tags = {tag.name: tag for tag in tif.pages[0].tags}

    def claim(**values: int) -> Path:
        for name, value in values.items():
            kind = {3: (2, "H"), 4: (4, "I")}[int(tags[name].dtype)]
            place = tags[name].valueoffset
            content[place : place + kind[0]] = min(value, 65535 if kind[0] == 2 else value).to_bytes(kind[0], "little")
        (tmp_path / "b.tif").write_bytes(content)
        return tmp_path / "b.tif"

    source = open_source(claim(ImageWidth=50_000, ImageLength=45_000, RowsPerStrip=45_000))
    assert "every read takes 2250.0 MB of memory" in caplog.text
    assert source.shape == (1, 45_000, 50_000)


def test_tiffs_that_change(tmp_path: Path) -> None:
    source = open_source(tiled_tiff(tmp_path / "a.tif", PIXELS))
    before = source.signature(Box(0, 0, 0, 9, 9))
    os.utime(tmp_path / "a.tif", ns=(1, 1))
    assert source.signature(Box(0, 0, 0, 9, 9)) != before
    with pytest.raises(BadInputFile, match="has changed since it was opened"):
        source.read(Box(0, 0, 0, 9, 9))


def test_reads_at_once(every_kind: dict[str, Any]) -> None:
    wrong: list[str] = []

    def read(name: str, source: Any) -> None:
        pieces = {top: source.read(Box(1, top, 3, 40, 180)).pixels for top in range(0, 100, 9)}
        wrong.extend(name for top in pieces if not np.array_equal(pieces[top], PIXELS[1, top : top + 40, 3:183]))

    threads = [threading.Thread(target=read, args=entry) for entry in every_kind.items() for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


# Tiles


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("r{row:03}_c{column:03}.png", None),
        ("Sample 3 Row{row}-Col{column}.png", None),
        ("Tile_{row:03}-{column:03}-000000_0-000.png", None),
        ("x{column:02}_y{row:02}.png", None),
        ("a{row}b{column}.png", "a{row}b{column}"),
        ("2026_{column}-{row}.png", "_{column}-{row}. overlap=0"),
    ],
)
def test_positions_in_names(tmp_path: Path, name: str, positions: str | None) -> None:
    folder = tile_folder(tmp_path / "tiles", SLICE, name)
    assert np.array_equal(whole(open_source(folder, positions=positions)), SLICE[None])
    if positions is not None:  # as the command line hands it on
        assert np.array_equal(whole(open_source(folder, positions=Path(positions))), SLICE[None])


def test_grid_with_overlap_and_mirrored_axes(tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    folder.mkdir()
    lines = []
    for row in range(3):
        for column in range(4):
            Image.fromarray(SLICE[45 * row : 45 * row + 60, 30 * column : 30 * column + 40]).save(
                folder / f"{row}{column}.png"
            )
            lines.append(f"{row}{column}.png, {-column}, {row + 5}")
    _table(folder, lines, "# overlap=25% mirror=x\nfile, Column, Row")
    assert np.array_equal(whole(open_source(folder)), SLICE[None, :150, :130])
    (folder / "positions.csv").rename(folder / "places.txt")
    assert np.array_equal(whole(open_source(folder, positions=folder / "places.txt")), SLICE[None, :150, :130])
    assert open_source(folder, positions=Path("slices")).shape == (12, 60, 40)


def test_stage_coordinates(tmp_path: Path) -> None:
    folder = tile_folder(tmp_path / "tiles", SLICE, "{row}{column}.png")
    lines = [
        f"{row}{column}.png;{0.28 * column - 3};{7.5 - 0.24 * row}" for row in range(3) for column in range(3)
    ]  # the stage's y points up
    _table(folder, lines, "# mirror=y\nfile;x_um;y_um")
    with pytest.raises(UsageError, match=r"need a pixel size, which .* does not state; give --pixel-size"):
        open_source(folder)
    assert np.array_equal(whole(open_source(folder, pixel_size=SIZE)), SLICE[None])


def test_later_tiles_lie_above_and_failed_ones_let_others_be_seen(tmp_path: Path) -> None:
    values = [50, 100, 150]
    for value in values:
        Image.fromarray(np.full((40, 60), value, np.uint8)).save(tmp_path / f"{value}.png")
    _table(tmp_path, ["50.png,0,0", "100.png,30,20", "150.png,200,0"])
    source = open_source(tmp_path)
    expected = np.zeros((60, 260), np.uint8)
    expected[:40, :60], expected[20:60, 30:90], expected[:40, 200:] = values
    assert np.array_equal(whole(source)[0], expected)
    assert set(source.sample(10**6)) == set(values)
    before = {left: source.signature(Box(0, 0, left, 10, 10)) for left in (0, 100, 200)}
    (tmp_path / "100.png").write_bytes((tmp_path / "100.png").read_bytes()[:60])
    (tmp_path / "150.png").unlink()
    piece = source.read(Box(0, 5, 0, 55, 250))
    boxes = [box for box, _ in piece.unreadable]
    assert boxes == [Box(0, 40, 30, 20, 60), Box(0, 20, 60, 20, 30), Box(0, 5, 200, 35, 50)]
    assert ["100.png" in why for _, why in piece.unreadable] == [True, True, False]
    expected[20:60, 30:90] = expected[:, 200:] = 0
    expected[20:40, 30:60] = 50
    assert np.array_equal(piece.pixels, expected[5:, :250])
    after = {left: source.signature(Box(0, 0, left, 10, 10)) for left in (0, 100, 200)}
    assert [before[left] == after[left] for left in (0, 100, 200)] == [True, True, False]
    reopened = open_source(tmp_path)  # now knowing nothing of their sizes
    assert reopened.shape == (1, 60, 260)
    assert [box for box, _ in reopened.read(Box(0, 5, 0, 55, 250)).unreadable] == boxes
    (tmp_path / "50.png").unlink()
    with pytest.raises(BadInputFile, match="none of 3 pictures can be read"):
        open_source(tmp_path)


def test_information_bars_are_cut_off_every_tile(tmp_path: Path) -> None:
    picture = grains(384, 512)
    tiles = [picture, picture[::-1], picture[:, ::-1]]
    for number, tile in enumerate(tiles):
        Image.fromarray(draw_bar(tile, 28)).save(tmp_path / f"{number}.png")
    Image.fromarray(picture[:, :300]).save(tmp_path / "3.png")  # of another size, and without a bar
    _table(tmp_path, ["0.png,0,0", "1.png,512,0", "2.png,0,384", "3.png,512,384"])
    source = open_source(tmp_path)
    assert source.shape == (1, 768, 1024)
    pixels = source.read(Box(0, 0, 0, 768, 1024)).pixels
    assert np.array_equal(pixels[:384], np.hstack(tiles[:2]))
    assert np.array_equal(pixels[384:, :812], np.hstack([tiles[2], picture[:, :300]]))
    assert not pixels[384:, 812:].any()


def test_tiles_that_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, size in enumerate((5.0, 5.0, 8.0)):
        scale = {"metadata": {"unit": "nm"}, "resolution": (1 / size, 1 / size)}
        tifffile.imwrite(tmp_path / f"t{number}.tif", SLICE, imagej=True, **scale)
    tifffile.imwrite(tmp_path / "t3.tif", SLICE.astype(np.uint16))
    _table(tmp_path, [f"t{number}.tif,{200 * number},0" for number in range(3)])
    assert open_source(tmp_path).pixel_size_m == pytest.approx(5e-9)
    assert "1 of its pictures state another pixel size" in caplog.text
    _table(tmp_path, ["t0.tif,0,0", "t1.tif,99999,99999", "t3.tif,0,500"])
    source = open_source(tmp_path)
    assert "cover less than a tenth" in caplog.text
    assert "other pictures uint8" in source.read(Box(0, 500, 0, 9, 9)).unreadable[0][1]
    _table(tmp_path, ["t0.tif,0,0", "t1.tif,1,0"], "# overlap=-10\nfile,column,row")
    assert open_source(tmp_path).shape == (1, 150, 209 + 190)
    assert "leaves gaps" in caplog.text


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "has the columns of nothing"),
        ("file,left,top\na.png,1,2", "has the columns file, left, top"),
        ("file,x,y", "lists no tiles"),
        ("file,x,y\na.png,1", "tile 1 in the table"),
        ("file,x,y\na.png,1,2\nb.png,one,2", "tile 2 in the table"),
        ("file,x,y\na.png,nan,2", "tile 1 in the table"),
        ("file,x,y\na.png,1e300,2", "tile 1 in the table"),
        ("file,x,y,z\na.png,1,2,upper", "tile 1 in the table"),
        ("file,x,y\na.png,1,2\na.png,3,4", "a.png 2 times"),
        ("file,x,y\nmissing.png,1,2", "none of 1 pictures can be read"),
        ("# overlap=100\nfile,column,row\na.png,1,2", "overlap=100 makes no sense"),
        ("# mirror=z\nfile,column,row\na.png,1,2", "mirror=z makes no sense"),
        (b"file,x,y\n\xff\xfe\xfd,1,2", "is no text"),
    ],
)
def test_tables_that_make_no_sense(tmp_path: Path, table: str | bytes, said: str) -> None:
    Image.fromarray(SLICE).save(tmp_path / "a.png")
    (tmp_path / "positions.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    with pytest.raises((BadInputFile, UsageError), match=said) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_and_positions_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="there is no picture"):
        open_source(tmp_path)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(BadInputFile, match="none of 1 pictures can be read"):
        open_source(tmp_path)
    folder = _slices(tmp_path / "slices", PIXELS)
    for positions, said in (
        ("missing.csv", "missing.csv does not exist"),
        ("r{row}", "a pattern of names"),
        ("r{row}_c{column}", "do not all say row and column"),
        ("overlap=10", "do not all say row and column"),
        ("{row}{column} overlap=many", "makes no sense"),
    ):
        with pytest.raises((BadInputFile, UsageError), match=said):
            open_source(folder, positions=positions)
    Image.fromarray(SLICE[:70]).save(folder / "slice11.png")
    with pytest.raises(BadInputFile, match="no slices of one volume"):
        open_source(folder)


def test_a_damaged_slice_is_one_unreadable_slice(tmp_path: Path) -> None:
    folder = _slices(tmp_path / "slices", PIXELS)
    (folder / "slice9.png").write_bytes(b"")
    source = open_source(folder, spacing=1e-8)
    assert (source.shape, source.spacing_m) == (PIXELS.shape, 1e-8)
    piece = source.read(Box(1, 10, 20, 30, 40))
    assert [box for box, _ in piece.unreadable] == [Box(1, 10, 20, 30, 40)]
    assert "slice9.png is an empty file" in piece.unreadable[0][1]
    assert np.array_equal(source.read(Box(2, 10, 20, 30, 40)).pixels, PIXELS[2, 10:40, 20:60])


def test_a_single_picture(tmp_path: Path) -> None:
    Image.fromarray(SLICE).save(tmp_path / "a.png")
    assert np.array_equal(whole(open_source(tmp_path / "a.png", pixel_size=SIZE)), SLICE[None])


def test_options_name_what_they_are_for() -> None:
    assert {option for kind in KINDS for option in kind.options} == {"image", "positions", "channel"}
