"""What a mosaic may lie in: the same pixels from every kind, and damage named, never passed over."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.mosaic.layout import Box
from hpddrnet_trt.mosaic.sources import open_source
from tests.mosaic.source_files import SIZE, SPACING, metadata, volume, whole, zarr_store

zarr = pytest.importorskip("zarr")

PIXELS = volume()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["yx", "zyx", "czyx", "tczyx", "cyx", "xy"])
def test_ome_zarr_of_any_axes(tmp_path: Path, version: str, axes: str) -> None:
    slices = PIXELS if "z" in axes else PIXELS[:1]
    stored = {"yx": slices[0], "xy": slices[0].T, "cyx": slices, "zyx": slices}.get(axes)
    stored = slices.reshape((1,) * (len(axes) - 3) + slices.shape) if stored is None else stored
    source = open_source(zarr_store(tmp_path / "a.zarr", stored, version, axes))
    assert (source.shape, source.dtype, source.fill_value) == (slices.shape, np.uint8, 0)
    assert source.pixel_size_m == pytest.approx(SIZE)
    assert source.spacing_m == (pytest.approx(SPACING) if "z" in axes else None)
    assert np.array_equal(whole(source), slices)


def test_shards_are_the_unit_of_reading_and_chunks_that_of_damage(tmp_path: Path) -> None:
    store = zarr_store(tmp_path / "a.zarr", PIXELS, shards=(1, 64, 64))
    source = open_source(store)
    assert source.unit == (64, 64)
    shard = store / "0/c/1/1/2"
    content = bytearray(shard.read_bytes())
    content[5:40] = os.urandom(35)  # the first chunk of the shard; its index is at the end
    shard.write_bytes(content)
    piece = source.read(Box(1, 10, 20, 130, 160))
    assert [box for box, _ in piece.unreadable] == [Box(1, 64, 128, 32, 32)]
    assert "0/c/1/1/2" in piece.unreadable[0][1]
    expected = PIXELS[1, 10:140, 20:180].copy()
    expected[54:86, 108:140] = 0
    assert np.array_equal(piece.pixels, expected)
    shard.write_bytes(content[:-7])  # now without its index
    assert [box for box, _ in source.read(Box(1, 10, 20, 130, 160)).unreadable] == [Box(1, 64, 128, 64, 52)]
    assert source.read(Box(0, 10, 20, 130, 160)).unreadable == ()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_chunk_that_is_not_there_was_never_acquired(tmp_path: Path, version: str) -> None:
    store = zarr_store(tmp_path / "a.zarr", PIXELS[0], version, "yx", fill_value=9)
    (store / "0" / ("c/1/2" if version == "0.5" else "1.2")).unlink()
    source = open_source(store)
    expected = PIXELS[:1].copy()
    expected[0, 32:64, 64:96] = 9
    assert source.fill_value == 9
    assert np.array_equal(whole(source), expected)
    assert source.sample(10**6).size == np.count_nonzero(expected != 9)


@pytest.mark.parametrize(
    ("stored", "read"),
    [("u1", "u1"), (">u2", "u2"), ("?", "u1"), ("i2", "f4"), ("u4", "f4"), (">f4", "f4"), ("f8", "f4"), ("f2", "f4")],
)
def test_types(tmp_path: Path, stored: str, read: str) -> None:
    values = PIXELS[0] > 100 if stored == "?" else PIXELS[0].astype(stored)
    source = open_source(zarr_store(tmp_path / "a.zarr", values, "0.4", "yx"))
    assert source.dtype == np.dtype(read)
    pixels = source.read(Box(0, 3, 5, 60, 70)).pixels
    assert pixels.dtype == np.dtype(read)
    assert np.array_equal(pixels, values[3:63, 5:75] * (255 if stored == "?" else 1))


def test_what_is_no_number_was_never_acquired(tmp_path: Path) -> None:
    values = PIXELS[0].astype(np.float32)
    values[:40, :50] = np.nan
    values[50, 60] = np.inf
    source = open_source(zarr_store(tmp_path / "a.zarr", values, axes="yx", fill_value=np.nan))
    assert source.fill_value == 0
    assert np.array_equal(whole(source)[0], np.nan_to_num(values, posinf=0))
    assert np.isfinite(source.sample(500)).all()


@pytest.mark.parametrize(
    ("scale", "unit", "more", "size"),
    [
        (4.0, "nanometer", {}, 4e-9),
        (0.004, "micrometer", {}, 4e-9),
        (4e-6, "millimeter", {}, 4e-9),
        (40.0, "angstrom", {}, 4e-9),
        (2.0, "nanometer", {"coordinateTransformations": [{"type": "scale", "scale": [2.0, 2.0]}]}, 4e-9),
        (4.0, None, {}, None),
        (4.0, "parsec", {}, None),
        (-4.0, "nanometer", {}, None),
        (0.0, "nanometer", {}, None),
        (4.0, "meter", {}, None),
        (1.0, "nanometer", {"coordinateTransformations": [{"type": "scale", "scale": [4.0, 5.0]}]}, None),
    ],
)
def test_scale(tmp_path: Path, scale: float, unit: str | None, more: dict[str, Any], size: float | None) -> None:
    store = zarr_store(tmp_path / "a.zarr", PIXELS[0], axes="yx")
    zarr.open_group(str(store)).attrs.update(metadata("0.5", "yx", scale, unit, **more))
    assert open_source(store).pixel_size_m == (None if size is None else pytest.approx(size))
    assert open_source(store, pixel_size=7e-9).pixel_size_m == 7e-9


def test_channel_is_chosen_and_time_is_not(tmp_path: Path) -> None:
    store = zarr_store(tmp_path / "a.zarr", PIXELS[:2, None], axes="czyx")
    with pytest.raises(UsageError, match="2 channels; choose one with --channel 0 to 1"):
        open_source(store)
    with pytest.raises(UsageError, match="no channel 2: there are 2, counted from 0"):
        open_source(store, channel=2)
    assert np.array_equal(whole(open_source(store, channel=1)), PIXELS[1:2])
    with pytest.raises(BadInputFile, match="3 points in time"):
        open_source(zarr_store(tmp_path / "t.zarr", PIXELS, axes="tyx"))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_stores_of_several_images(tmp_path: Path, version: str) -> None:
    def group(name: str, attributes: dict[str, Any]) -> None:
        written = {"ome": attributes} if version == "0.5" else attributes
        zarr.open_group(str(tmp_path / name), mode="a", zarr_format=3 if version == "0.5" else 2).attrs.update(written)

    group("series.zarr", {"bioformats2raw.layout": 3})
    zarr_store(tmp_path / "series.zarr/0", PIXELS[:1], version)
    assert np.array_equal(whole(open_source(tmp_path / "series.zarr")), PIXELS[:1])
    zarr_store(tmp_path / "series.zarr/1", PIXELS[1:], version)
    with pytest.raises(UsageError, match="several images: 0, 1; choose one with --image"):
        open_source(tmp_path / "series.zarr")
    assert np.array_equal(whole(open_source(tmp_path / "series.zarr", image="1")), PIXELS[1:])

    group("plate.zarr", {"plate": {"wells": [{"path": "A/1"}, {"path": "B/2"}]}})
    for well in ("A/1", "B/2"):
        group(f"plate.zarr/{well}", {"well": {"images": [{"path": "0"}]}})
        zarr_store(tmp_path / "plate.zarr" / well / "0", PIXELS[:1], version)
    with pytest.raises(UsageError, match="several images: A/1/0, B/2/0"):
        open_source(tmp_path / "plate.zarr")
    assert open_source(tmp_path / "plate.zarr", image="B/2").shape == PIXELS[:1].shape
    with pytest.raises(BadInputFile, match="C/3 does not exist; check the path and --image"):
        open_source(tmp_path / "plate.zarr", image="C/3")
    with pytest.raises(BadInputFile, match="does not lie in it"):
        open_source(tmp_path / "plate.zarr", image="../series.zarr/0")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"zarr_format": 3, "node_type": "array"}', bytes(range(157, 256)), None]
)
@pytest.mark.parametrize("place", ["zarr.json", "0/zarr.json"])
def test_broken_metadata_is_one_sentence(tmp_path: Path, place: str, content: bytes | None) -> None:
    store = zarr_store(tmp_path / "a.zarr", PIXELS[0], axes="yx")
    (store / place).unlink() if content is None else (store / place).write_bytes(content)
    with pytest.raises(BadInputFile, match=r"a\.zarr") as caught:
        open_source(store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "image",
    [
        7,
        {},
        {"axes": "yx", "datasets": []},
        {"axes": [{"name": "y"}, {"name": "y"}], "datasets": [{"path": "0"}]},
        {"axes": [{"name": "y"}, {"name": "lambda"}], "datasets": [{"path": "0"}]},
        {"axes": ["z", "y", "x"], "datasets": [{"path": "0"}]},
        {"axes": ["y", "x"], "datasets": [{"path": "../../elsewhere"}]},
        {"axes": ["y", "x"], "datasets": [{"path": "1"}]},
        {
            "axes": ["y", "x"],
            "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1]}]}],
        },
        {
            "axes": ["y", "x"],
            "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": "a"}]}],
        },
    ],
)
def test_senseless_metadata_is_one_sentence(tmp_path: Path, image: Any) -> None:
    store = zarr_store(tmp_path / "a.zarr", PIXELS[0], axes="yx")
    zarr.open_group(str(store)).attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    with pytest.raises(BadInputFile, match=r"a\.zarr"):
        open_source(store)


def test_labels_are_no_micrograph(tmp_path: Path) -> None:
    store = zarr_store(tmp_path / "a.zarr", PIXELS[0], axes="yx")
    group = zarr.open_group(str(store))
    group.attrs["ome"] = {**group.attrs["ome"], "image-label": {}}
    with pytest.raises(BadInputFile, match="holds labels"):
        open_source(store)


def _edit_array(store: Path, **changes: Any) -> Path:
    file = store / "0/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return store


def test_claims_that_no_memory_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = _edit_array(zarr_store(tmp_path / "a.zarr", PIXELS[0], axes="yx"), shape=[10**6, 10**6])
    source = open_source(store)  # 10^12 pixels, most of which are not there
    assert source.shape == (1, 10**6, 10**6)
    assert not source.read(Box(0, 999_000, 999_000, 50, 60)).pixels.any()
    assert source.sample(1000).size <= 1000
    for side, said in ((10**6, "smaller chunks"), (30_000, None)):
        _edit_array(store, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [side, side]}})
        if said is None:
            open_source(store)
            assert "decoded as a whole: every read takes 900.0 MB" in caplog.text
        else:
            with pytest.raises(BadInputFile, match=said):
                open_source(store)
    with pytest.raises(BadInputFile, match="has no pixels"):
        open_source(_edit_array(store, shape=[0, 100]))


@pytest.mark.parametrize("codec", ["secret-codec", "blosc"])
def test_a_codec_that_is_not_known(tmp_path: Path, codec: str) -> None:
    codecs = [{"name": "bytes"}, {"name": codec, "configuration": {"cname": "secret"}}]
    with pytest.raises(BadInputFile, match="no Zarr array that can be read here"):
        open_source(_edit_array(zarr_store(tmp_path / "a.zarr", PIXELS[0], axes="yx"), codecs=codecs))


def test_deep_chunks_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(zarr_store(tmp_path / "a.zarr", PIXELS, chunks=(1, 32, 32), shards=(3, 32, 32)))
    assert "slices deep" not in caplog.text
    assert np.array_equal(whole(source), PIXELS)
    with caplog.at_level(logging.WARNING):
        store = tmp_path / "b.zarr"
        group = zarr.open_group(str(store), mode="w")
        group.create_array("0", shape=PIXELS.shape, dtype="u1", chunks=(2, 32, 32))[...] = PIXELS
        group.attrs.update(metadata("0.5", "zyx", 4.0, "nanometer"))
        assert np.array_equal(whole(open_source(store)), PIXELS)
    assert "2 slices deep" in caplog.text


def test_signature_is_of_the_files_that_are_read(tmp_path: Path) -> None:
    store = zarr_store(tmp_path / "a.zarr", PIXELS)
    source = open_source(store)
    here, there = Box(1, 0, 0, 32, 64), Box(1, 64, 64, 64, 64)
    before = source.signature(here), source.signature(there)
    assert before == (open_source(store).signature(here), open_source(store).signature(there))
    os.utime(store / "0/c/1/3/2", ns=(1, 1))
    assert source.signature(here) == before[0]
    assert source.signature(there) != before[1]
    (store / "0/c/1/0/1").unlink()
    assert source.signature(here) != before[0]


def test_a_store_that_changes_or_goes_is_not_read_on(tmp_path: Path) -> None:
    store = zarr_store(tmp_path / "a.zarr", PIXELS[0], axes="yx")
    source = open_source(store)
    source.read(Box(0, 0, 0, 9, 9))
    _edit_array(store, fill_value=3)
    with pytest.raises(BadInputFile, match="has changed since it was opened"):
        source.read(Box(0, 0, 0, 9, 9))
    shutil.rmtree(store)  # or its file system went away: nothing there must not read as nothing acquired
    with pytest.raises(BadInputFile, match="cannot be read any more"):
        source.read(Box(0, 0, 0, 9, 9))


def _sum(source: Any) -> int:
    return int(source.read(Box(0, 0, 0, 100, 100)).pixels.sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_sources_go_to_other_processes(tmp_path: Path, method: str) -> None:
    source = open_source(zarr_store(tmp_path / "a.zarr", PIXELS))
    expected = _sum(source)
    assert _sum(pickle.loads(pickle.dumps(source))) == expected
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_sum, (source,)) == expected


def test_what_is_no_mosaic(tmp_path: Path) -> None:
    (tmp_path / "loop.zarr").symlink_to(tmp_path / "loop.zarr")
    (tmp_path / "a.txt").write_text("no picture")
    for address in ("https://a.org/b.zarr", "s3://bucket/b.zarr", "file:///tmp/b.zarr", Path("http://a.org/b.zarr")):
        with pytest.raises(UsageError, match="is an address"):
            open_source(address)
    for name in ("loop.zarr", "missing.zarr", "missing.tif"):
        with pytest.raises(BadInputFile, match=f"{name} does not exist"):
            open_source(tmp_path / name)
    with pytest.raises(BadInputFile, match=r"a\.txt"):
        open_source(tmp_path / "a.txt")
    store = zarr_store(tmp_path / "a.zarr", PIXELS)
    with pytest.raises(UsageError, match="is an OME-Zarr, for which --positions means nothing"):
        open_source(store, positions="p.csv")
    for size in (0.0, -1e-9, 4.0, float("nan")):
        with pytest.raises(UsageError, match="no microscope has a pixel size"):
            open_source(store, pixel_size=size)
