"""The store of a mosaic as layers of napari: labels and maps lie over the image they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.mosaic.create import create_store
from hpddrnet_trt.mosaic.layout import CELL, NO_DATA
from tests.mosaic.mosaics import SETTINGS, block, grey, labels_of, layout_of
from tests.toy import CLASSES, ToyEngine

pytest.importorskip("ome_zarr")
# ome-zarr still has a class that it deprecates as default of an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")


def _options(node: Any) -> dict[str, Any]:
    """Where a layer lies, of all that the full resolution of an image says."""
    steps = node.metadata["coordinateTransformations"][0]
    said = {step["type"]: step[step["type"]] for step in steps}
    return {"scale": said["scale"], "translate": said.get("translation", [0, 0]), "cache": False}


def test_labels_and_maps_lie_over_the_image(tmp_path: Path) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    from hpddrnet_trt.results.ome import write_ome_zarr
    from tests.integrations.napari_viewer import ViewerModel

    shape = (1, 512, 640)
    path = write_ome_zarr(
        tmp_path / "a.ome.zarr", np.zeros(shape[1:], np.uint8), CLASSES, pixel_size_m=50e-9,
        image=np.full(shape[1:], 9, np.uint8),
    )  # fmt: skip
    labels = labels_of(shape)
    source = grey(shape, path=path)
    store = create_store(path, "mosaic", source, layout_of(shape), SETTINGS, ToyEngine().manifest, {})
    for box in store.layout:
        store.write(block(box, labels))

    def nodes(folder: Path) -> list[Any]:
        location = parse_url(str(folder))
        assert location is not None
        return list(Reader(location)())

    viewer = ViewerModel()
    image = nodes(path)[0]
    viewer.add_image(image.data, **_options(image))
    (found,) = (node for node in nodes(store.folder) if node.metadata.get("name", "").endswith("mosaic"))
    drawn = viewer.add_labels(found.data, **_options(found))
    coarse = nodes(store.folder / "confidence")[0]
    confidence = viewer.add_image(coarse.data[0], **_options(coarse))
    assert np.array_equal(np.asarray(drawn.data[0]), labels[0])
    assert found.metadata["color"][NO_DATA][3] == 0
    assert np.allclose(viewer.layers[0].extent.world, drawn.extent.world)
    # The edges of a layer lie half a pixel beyond the middles of its first and last pixel.
    for corner in ((3, 4), (0, 9)):
        edge = confidence.data_to_world([side - 0.5 for side in corner])
        assert np.allclose(edge, drawn.data_to_world([side * CELL - 0.5 for side in corner]))
