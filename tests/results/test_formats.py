"""Every kind of result file: an ending of its own, a writer, and a reader that finds labels, scale and origin."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.data.labels import write_label_png, write_label_tiff
from hpddrnet_trt.inference.result import Provenance, Segmentation
from hpddrnet_trt.inference.tiling import TilingReport
from hpddrnet_trt.results import ALWAYS_POSSIBLE, FORMATS, KINDS, check_kinds, format_of
from hpddrnet_trt.results.ome import CLASSES as CLASS_NAMES
from hpddrnet_trt.results.ome import PROVENANCE, write_ome_tiff
from tests.toy import manifest

# ome-zarr still has a class that it deprecates as default of an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")

CLASSES = [
    ClassInfo(name="Grundmaße <{0}>", color=(10, 20, 30)),
    ClassInfo(name="γ′ & pores", color=(250, 100, 0)),
    ClassInfo(name="clay", color=(0, 90, 200)),
]
PALETTE = [entry.color for entry in CLASSES]
LABELS = np.zeros((96, 160), np.uint8)
LABELS[10:40, 20:60] = 1
LABELS[50:90, 100:160] = 2
AREAS = [11760, 1200, 2400]
GREY = np.random.default_rng(0).integers(0, 256, LABELS.shape, dtype=np.uint8)
CONFIDENCE = np.random.default_rng(1).uniform(size=LABELS.shape).astype(np.float32)
SIZE = 97.6562e-9
RESULT = Segmentation(
    LABELS, manifest(classes=CLASSES), CONFIDENCE, pixel_size_m=SIZE, source=Path("in/größe {x}.tif"),
    provenance=Provenance("toy", "ab12", None, "numpy", "fp32", "0.1", "single", (0.0, 255.0), "2026-01-01T00:00:00Z"),
    tiling=TilingReport((64, 64), 16, 6, "blended scores", 0.01),
)  # fmt: skip


class Read(NamedTuple):
    """What another program finds in a file: pixels of each class, metres a pixel, where it comes from."""

    areas: list[int]
    pixel_size_m: Any = pytest.approx(SIZE, rel=1e-6)  # of tables and ROIs, whose users find it elsewhere
    record: Any = RESULT.record()


def _areas(labels: np.ndarray) -> list[int]:
    return np.bincount(labels.ravel(), minlength=3).tolist()


def _png(path: Path) -> Read:
    with Image.open(path) as image:
        image.load()
        return Read(_areas(np.asarray(image)), 0.0254 / image.info["dpi"][0], json.loads(image.text["hpddrnet-trt"]))


def _tiff(path: Path) -> Read:
    with tifffile.TiffFile(path) as tif, Image.open(path) as image:
        pixels, page = tif.asarray(), tif.pages.first
        assert np.array_equal(np.asarray(image), pixels)  # Pillow reads it too
        per_centimetre, of = page.tags["XResolution"].value
        confidence = pixels.dtype == np.float32
        assert not confidence or np.array_equal(pixels, CONFIDENCE)
        return Read(AREAS if confidence else _areas(pixels), 1e-2 * of / per_centimetre, json.loads(page.description))


def _annotations(xml: str | None) -> dict[str, dict[str, str]]:
    assert xml is not None
    space = {"ome": "http://www.openmicroscopy.org/Schemas/OME/2016-06"}
    return {
        entry.attrib["Namespace"]: {pair.attrib["K"]: pair.text or "" for pair in entry.iterfind(".//ome:M", space)}
        for entry in ElementTree.fromstring(xml).iterfind(".//ome:MapAnnotation", space)
    }


def _ome_tiff(path: Path) -> Read:
    with tifffile.TiffFile(path) as tif, Image.open(path) as picture:
        labels, xml = tif.asarray(), tif.ome_metadata
        assert np.array_equal(np.asarray(picture), labels)
        assert tif.series[0].axes == "YX"
        assert tuple(tif.pages.first.colormap[:, 1] >> 8) == PALETTE[1]
    found = _annotations(xml)
    assert found[CLASS_NAMES] == {str(index): entry.name for index, entry in enumerate(CLASSES)}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in RESULT.record().items()}
    assert found[PROVENANCE] == texts
    ome_types = pytest.importorskip("ome_types")  # knows the schema
    (image,) = ome_types.from_tiff(path).images
    assert image.pixels.physical_size_x_unit.name == image.pixels.physical_size_y_unit.name == "MICROMETER"
    assert image.pixels.physical_size_x == image.pixels.physical_size_y
    assert len(image.annotation_refs) == 2
    return Read(_areas(labels), image.pixels.physical_size_x * 1e-6)


def _ome_zarr(path: Path) -> Read:
    root = pytest.importorskip("zarr").open_group(str(path), mode="r")
    level = root.attrs["ome"]["multiscales"][0]["datasets"][0]
    size = level["coordinateTransformations"][0]["scale"][0] * 1e-6
    return Read(_areas(root["s0"][:]), size, root.attrs["hpddrnet-trt"]["provenance"])


def _rois(path: Path) -> Read:
    return Read([AREAS[index] for index, _ in enumerate(pytest.importorskip("roifile").roiread(path))])


def _column(name: str) -> Callable[[Path], Read]:
    def read(path: Path) -> Read:
        with path.open(newline="") as stream:
            return Read([int(row[name]) for row in csv.DictReader(stream)])

    return read


READERS = {
    "png": _png, "tiff": _tiff, "ome-tiff": _ome_tiff, "ome-zarr": _ome_zarr, "rois": _rois,
    "regions": _column("area_px"), "grains": _column("area_px"), "confidence": _tiff, "fractions": _column("pixels"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_written_by_its_ending_and_says_scale_and_origin(kind: str, tmp_path: Path) -> None:
    form = FORMATS[kind]
    for module in form.modules:
        pytest.importorskip(module)
    assert form.description
    assert form.ending.startswith(".")
    for ending in form.endings:
        for name in (f"a.b{ending}", f"A{ending.upper()}"):
            assert format_of(Path(name)) is form
            assert READERS[kind](RESULT.save(tmp_path / name)) == Read(AREAS)
    if form.image:
        RESULT.save(tmp_path / f"a.b{form.ending}", image=GREY)
    else:
        with pytest.raises(UsageError, match="holds the micrograph"):
            RESULT.save(tmp_path / f"b{form.ending}", image=GREY)
    assert len(list(tmp_path.iterdir())) == 2 * len(form.endings)


def test_endings_are_told_apart_and_others_refused(tmp_path: Path) -> None:
    endings = [ending for form in FORMATS.values() for ending in form.endings]
    assert len(endings) == len(set(endings))
    for name in ("a.jpg", "a", "a.zarr", "a.txt"):
        with pytest.raises(UsageError, match=r"results are written as \.png, .*change the ending"):
            RESULT.save(tmp_path / name)
    with pytest.raises(UsageError, match="gave no confidence"):
        replace(RESULT, confidence=None).save(tmp_path / "a.confidence.tif")
    assert list(tmp_path.iterdir()) == []


def test_kinds_of_segment() -> None:
    assert set(READERS) == set(FORMATS)
    assert set(KINDS) == set(FORMATS) - {"fractions"}  # of which there is one table for all images
    assert set(ALWAYS_POSSIBLE) == set(KINDS) - {"confidence"}
    check_kinds(["png", "confidence"])
    with pytest.raises(UsageError, match="not 'fractions'"):
        check_kinds(["png", "fractions"])


@pytest.mark.parametrize("size", [SIZE, None, 1e-13, 0.4e-9, 0.5, 1e13])
def test_scales_that_a_format_cannot_state_are_left_out(tmp_path: Path, size: float | None) -> None:
    """PNG: whole pixels per metre; TIFF: fractions of 32 bits; no file makes up a scale."""
    content = write_label_png(tmp_path / "m.png", LABELS, PALETTE, pixel_size_m=size).read_bytes()
    at = content.find(b"pHYs")
    assert (at > 0) == (size == SIZE)
    assert at < 0 or content[at + 4 : at + 13] == round(1 / SIZE).to_bytes(4, "big") * 2 + b"\x01"
    with tifffile.TiffFile(write_label_tiff(tmp_path / "m.tif", LABELS, PALETTE, pixel_size_m=size)) as tif:
        assert (tif.pages.first.tags["ResolutionUnit"].value == 1) == (size in (None, 1e-13, 1e13))


def test_ome_tiff_without_a_pixel_size_states_none(tmp_path: Path) -> None:
    with tifffile.TiffFile(write_ome_tiff(tmp_path / "m.ome.tif", LABELS, CLASSES)) as tif:
        assert "PhysicalSize" not in (tif.ome_metadata or "")
        assert list(_annotations(tif.ome_metadata)) == [CLASS_NAMES]
        assert tif.pages.first.tags["ResolutionUnit"].value == 1
