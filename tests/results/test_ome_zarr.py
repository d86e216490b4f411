"""OME-Zarr 0.5: read with zarr itself, and checked by two libraries that know the specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core.errors import ContractError
from tests.toy import CLASSES

zarr = pytest.importorskip("zarr")
pytest.importorskip("ome_zarr")
# ome-zarr still has a class that it deprecates as default of an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 2**16, (600, 1023), dtype=np.uint16)
LABELS = (IMAGE // 30000).astype(np.uint8)
SIZE = 97.6562e-9
ORIGIN = {"model": "toy", "window": [0.0, 255.0], "tiling": None}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    from hpddrnet_trt.results.ome import write_ome_zarr

    def call(labels: np.ndarray = LABELS, **options: Any) -> Path:
        return write_ome_zarr(tmp_path / "a.ome.zarr", labels, CLASSES, provenance=ORIGIN, **options)

    return call


def _levels(group: Any) -> list[tuple[list[float], Any]]:
    """Scale and pixels of each level."""
    (pyramid,) = group.attrs["ome"]["multiscales"]
    return [
        (level["coordinateTransformations"][0]["scale"], group[level["path"]][:]) for level in pyramid["datasets"]
    ]


def test_micrograph_with_labels(write: Any) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    path = write(pixel_size_m=SIZE, image=IMAGE)
    location = parse_url(str(path))
    assert location is not None
    assert [node.data[0].shape for node in Reader(location)() if node.data] == [IMAGE.shape, LABELS.shape]
    root = zarr.open_group(str(path), mode="r")
    labels = root["labels/classes"]
    assert root["labels"].attrs["ome"] == {"version": "0.5", "labels": ["classes"]}
    for group, pixels in ((root, IMAGE), (labels, LABELS)):
        assert group.attrs["ome"]["version"] == "0.5"
        levels = _levels(group)
        assert np.array_equal(levels[0][1], pixels)
        assert levels[0][1].dtype == pixels.dtype
        assert levels[0][0] == pytest.approx([SIZE * 1e6] * 2)
        assert levels[1][1].shape == (300, 511)
        assert levels[1][0] == pytest.approx([SIZE * 2e6] * 2, rel=0.01)
        axes = group.attrs["ome"]["multiscales"][0]["axes"]
        assert axes == [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    assert set(np.unique(_levels(labels)[1][1])) <= {0, 1, 2}
    described = labels.attrs["ome"]["image-label"]
    assert described["source"] == {"image": "../../"}
    assert described["colors"][1] == {"label-value": 1, "rgba": [250, 100, 0, 255]}
    assert described["properties"][2] == {"label-value": 2, "class": "clay"}
    assert root.attrs["hpddrnet-trt"]["provenance"] == ORIGIN
    alone = zarr.open_group(str(write(pixel_size_m=SIZE)), mode="r")  # the folder itself is the label image
    assert np.array_equal(_levels(alone)[0][1], LABELS)
    assert "source" not in alone.attrs["ome"]["image-label"]
    assert alone.attrs["ome"]["multiscales"][0]["axes"][0]["unit"] == "micrometer"


def test_shapes_survive_the_pyramid_without_new_classes(write: Any) -> None:
    """Means would put a class between two others."""
    labels = np.random.default_rng(1).integers(0, 2, (512, 512), dtype=np.uint8) * np.uint8(2)
    root = zarr.open_group(str(write(labels)), mode="r")
    assert 1 not in np.unique(_levels(root)[1][1])


def test_unknown_pixel_size_is_said_and_not_made_up(write: Any) -> None:
    root = zarr.open_group(str(write(image=IMAGE)), mode="r")
    for group in (root, root["labels/classes"]):
        assert group.attrs["ome"]["multiscales"][0]["axes"] == [{"name": name, "type": "space"} for name in "yx"]
        assert _levels(group)[0][0] == [1, 1]
    assert root.attrs["hpddrnet-trt"]["scale_unit"] == "pixel"



@pytest.mark.parametrize(
    "options", [{"image": IMAGE, "pixel_size_m": SIZE}, {"image": IMAGE}, {"pixel_size_m": SIZE}, {"shape": (3, 700)}]
)
def test_others_find_it_valid(write: Any, options: dict[str, Any]) -> None:
    models, yaozarrs = pytest.importorskip("ome_zarr_models"), pytest.importorskip("yaozarrs")
    shape = options.pop("shape", None)
    if shape is not None:
        options["image"] = np.ones(shape, np.float32)
    path = write(LABELS if shape is None else np.ones(shape, np.uint8), **options)
    root = zarr.open_group(str(path), mode="r")
    groups = {"": root, "labels/classes": root["labels/classes"]} if "image" in options else {"": root}
    kinds = [type(models.open_ome_zarr(group)).__name__ for group in groups.values()]
    assert kinds == ["Image", "ImageLabel"][-len(groups) :]
    for group in (*groups, *(["labels"] if "image" in options else [])):
        yaozarrs.validate_zarr_store(str(path / group))
    assert shape is None or [pixels.shape for _, pixels in _levels(root)] == [shape]  # a small image is one level


def test_an_older_one_is_replaced_and_a_failure_leaves_it(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(image=IMAGE)
    write(LABELS[:100, :100], pixel_size_m=SIZE)
    assert not (path / "labels").exists()
    before = json.loads((path / "zarr.json").read_text())
    with pytest.raises(ContractError, match="differ in size"):
        write(image=IMAGE[1:])
    monkeypatch.setattr("hpddrnet_trt.results.ome._write_labels", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(image=IMAGE)
    assert json.loads((path / "zarr.json").read_text()) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ome.zarr"]


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
