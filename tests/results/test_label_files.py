"""Label PNG and TIFF, OME-TIFF and confidence maps: scale, class names and provenance, read by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.data.labels import write_label_png, write_label_tiff
from hpddrnet_trt.results.ome import CLASSES as CLASS_NAMES
from hpddrnet_trt.results.ome import PROVENANCE, write_ome_tiff
from hpddrnet_trt.results.tables import write_confidence

CLASSES = [
    ClassInfo(name="Grundmaße <{0}>", color=(10, 20, 30)),
    ClassInfo(name="γ′ & pores", color=(250, 100, 0)),
]
PALETTE = [entry.color for entry in CLASSES]
LABELS = np.random.default_rng(0).integers(0, 2, (31, 47), dtype=np.uint8)
ORIGIN: dict[str, Any] = {"model": "toy", "window": [0.0, 255.0], "tiling": None, "source": "größe {x}.tif"}
SIZE = 97.6562e-9


def test_png_carries_scale_and_provenance(tmp_path: Path) -> None:
    write_label_png(tmp_path / "m.png", LABELS, PALETTE, pixel_size_m=SIZE, provenance=ORIGIN)
    with Image.open(tmp_path / "m.png") as image:
        image.load()
        assert json.loads(image.text["hpddrnet-trt"]) == ORIGIN
        assert 0.0254 / image.info["dpi"][0] == pytest.approx(SIZE, rel=1e-6)
        assert np.array_equal(np.asarray(image), LABELS)


def _chunks(content: bytes) -> dict[bytes, bytes]:
    found, at = {}, 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        found[content[at + 4 : at + 8]] = content[at + 8 : at + 8 + length]
        at += 12 + length
    return found


def test_png_states_its_scale_in_whole_pixels_per_metre(tmp_path: Path) -> None:
    for size, stated in ((SIZE, round(1 / SIZE)), (None, None), (0.4e-9, None), (0.5, None)):
        path = write_label_png(tmp_path / "m.png", LABELS, PALETTE, pixel_size_m=size)
        scale = _chunks(path.read_bytes()).get(b"pHYs")
        if stated is None:
            assert scale is None
        else:
            assert scale == stated.to_bytes(4, "big") * 2 + b"\x01"


def test_tiff_carries_provenance(tmp_path: Path) -> None:
    write_label_tiff(tmp_path / "m.tif", LABELS, PALETTE, provenance=ORIGIN)
    with tifffile.TiffFile(tmp_path / "m.tif") as tif:
        assert json.loads(tif.pages.first.description) == ORIGIN
        assert "XResolution" not in tif.pages.first.tags or tif.pages.first.tags["ResolutionUnit"].value == 1
        assert np.array_equal(tif.asarray(), LABELS)


@pytest.mark.parametrize("size", [1e-13, 1e13])
def test_absurd_scales_are_left_out_of_tiff(tmp_path: Path, size: float) -> None:
    write_label_tiff(tmp_path / "m.tif", LABELS, PALETTE, pixel_size_m=size)
    with tifffile.TiffFile(tmp_path / "m.tif") as tif:
        assert tif.pages.first.tags["ResolutionUnit"].value == 1


def _annotations(xml: str) -> dict[str, dict[str, str]]:
    space = {"ome": "http://www.openmicroscopy.org/Schemas/OME/2016-06"}
    return {
        entry.attrib["Namespace"]: {pair.attrib["K"]: pair.text or "" for pair in entry.iterfind(".//ome:M", space)}
        for entry in ElementTree.fromstring(xml).iterfind(".//ome:MapAnnotation", space)
    }


def test_ome_tiff_carries_scale_classes_and_provenance(tmp_path: Path) -> None:
    path = write_ome_tiff(tmp_path / "m.ome.tif", LABELS, CLASSES, pixel_size_m=SIZE, provenance=ORIGIN)
    with tifffile.TiffFile(path) as tif:
        assert tif.is_ome
        assert np.array_equal(tif.asarray(), LABELS)
        assert tif.series[0].axes == "YX"
        assert tuple(tif.pages.first.colormap[:, 1] >> 8) == PALETTE[1]
        xml = tif.ome_metadata
        assert xml is not None
        assert b'PhysicalSizeXUnit="\xc2\xb5m"' in tif.pages.first.tags["ImageDescription"].value.encode()
    found = _annotations(xml)
    assert found[CLASS_NAMES] == {"0": "Grundmaße <{0}>", "1": "γ′ & pores"}
    assert found[PROVENANCE]["source"] == "größe {x}.tif"
    assert json.loads(found[PROVENANCE]["window"]) == [0.0, 255.0]
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), LABELS)


def test_ome_tiff_as_its_schema_reads_it(tmp_path: Path) -> None:
    ome_types = pytest.importorskip("ome_types")
    path = write_ome_tiff(tmp_path / "m.ome.tif", LABELS, CLASSES, pixel_size_m=SIZE, provenance=ORIGIN)
    (image,) = ome_types.from_tiff(path).images
    assert image.pixels.physical_size_x_unit.name == image.pixels.physical_size_y_unit.name == "MICROMETER"
    assert image.pixels.physical_size_x == image.pixels.physical_size_y == pytest.approx(SIZE * 1e6)
    assert len(image.annotation_refs) == 2


def test_ome_tiff_without_a_pixel_size_states_none(tmp_path: Path) -> None:
    with tifffile.TiffFile(write_ome_tiff(tmp_path / "m.ome.tif", LABELS, CLASSES)) as tif:
        assert tif.ome_metadata is not None
        assert "PhysicalSize" not in tif.ome_metadata
        assert list(_annotations(tif.ome_metadata)) == [CLASS_NAMES]
        assert tif.pages.first.tags["ResolutionUnit"].value == 1


def test_confidence_keeps_its_numbers(tmp_path: Path) -> None:
    values = np.random.default_rng(1).uniform(size=(31, 47)).astype(np.float32)
    path = write_confidence(tmp_path / "c.tif", values, pixel_size_m=SIZE, provenance=ORIGIN)
    with tifffile.TiffFile(path) as tif:
        assert np.array_equal(tif.asarray(), values)
        assert json.loads(tif.pages.first.description) == ORIGIN
        per_centimetre, of = tif.pages.first.tags["XResolution"].value
        assert 1e-2 / (per_centimetre / of) == pytest.approx(SIZE, rel=1e-6)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), values)
