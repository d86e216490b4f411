"""Labels are corrected in napari and saved as masks of a dataset, which training goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.description import read_description
from hpddrnet_trt.data.labels import read_mask
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.inference.rank import Ranked, Ranking
from hpddrnet_trt.integrations.napari import SegmentPanel, segment_widget
from hpddrnet_trt.integrations.napari_layers import find_layer
from hpddrnet_trt.integrations.napari_masks import save_mask
from tests.integrations.live import wait_until
from tests.integrations.napari_viewer import ToyModel, ViewerModel, application
from tests.toy import grey_image

NM = {"scale": (5.0, 5.0), "units": ("nm", "nm")}


@pytest.fixture
def viewer() -> Any:
    application()
    return ViewerModel()


@pytest.fixture
def panel(viewer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[SegmentPanel]:
    ToyModel(monkeypatch)
    widget = segment_widget(viewer)
    yield widget.panel
    widget.panel.close()
    widget.native.deleteLater()


def segmented(viewer: Any, panel: SegmentPanel, pixels: Any, name: str, **options: Any) -> tuple[Any, Any]:
    """An image layer and its labels, as a person has them after Run."""
    from qtpy.QtWidgets import QApplication

    layer = viewer.add_image(pixels, name=name, **options)
    panel.layers.value = layer
    panel.run()

    def done() -> bool:
        QApplication.processEvents()
        return not panel.running

    wait_until(done, 20)
    return layer, find_layer(viewer, layer, "labels")


def test_corrected_labels_become_a_dataset(viewer: Any, panel: SegmentPanel, tmp_path: Path) -> None:
    """The widget's own buttons: Run, paint, Save; and what training reads is what was painted."""
    folder = tmp_path / "corrected"
    panel.dataset.value = folder
    panel.model_file.value = tmp_path / "toy.onnx"
    painted = {}
    for number in range(3):
        pixels = grey_image(40, 48, seed=number)
        _, labels = segmented(viewer, panel, pixels, f"sample {number}", **NM)
        labels.data[3:9, 5:20] = 2
        labels.data[0, :] = 255
        painted[f"sample_{number}"] = (pixels, labels.data.copy())
        panel.save_button.native.click()
    assert panel.message.value == (
        f"saved {folder / 'masks' / 'train' / 'sample_2.png'} (2 train, 1 val); train on it: "
        f"hpddrnet-trt train {folder} --from CHECKPOINT (the .safetensors file that toy.onnx was made from)"
    )
    (tmp_path / "toy.safetensors").touch()  # where training leaves it
    panel.save()
    assert panel.message.value.endswith(
        f"; train on it: hpddrnet-trt train {folder} --from {tmp_path / 'toy.safetensors'}"
    )
    dataset = FolderDataset.open(folder)
    assert dataset.class_names == ["grain", "pore", "clay"]
    assert dataset.palette == [(0, 0, 0), (250, 100, 0), (0, 90, 200)]
    assert [len(dataset.split(name)) for name in ("train", "val")] == [2, 1]
    for split in ("train", "val"):
        for sample in dataset.split(split):
            image, mask = dataset.load(sample)
            assert np.array_equal(image, painted[sample.name][0])
            assert np.array_equal(mask, painted[sample.name][1])
            assert read_micrograph(sample.image).pixel_size_m == pytest.approx(5e-9)


def test_saving_again_replaces_the_mask_only(viewer: Any, panel: SegmentPanel, tmp_path: Path) -> None:
    layer, labels = segmented(viewer, panel, grey_image(40, 48), "a")
    first = save_mask(tmp_path, viewer, layer, "test")
    image = tmp_path / "images" / "test" / "a.tif"
    before = image.stat()
    labels.data[:] = 1
    again = save_mask(tmp_path, viewer, layer, "train")  # it stays where it is: a picture in two splits would leak
    assert again == first
    assert again.counts == {"train": 0, "val": 0, "test": 1}
    assert image.stat() == before
    assert (read_mask(again.mask) == 1).all()


def test_planes_and_depths_are_kept(viewer: Any, panel: SegmentPanel, tmp_path: Path) -> None:
    stack = np.stack([grey_image(40, 48, seed=n).astype(np.uint16) * 257 for n in range(3)])
    viewer.add_image(stack[0] * 0, name="other")
    layer, _ = segmented(viewer, panel, stack, "run 7/b")
    viewer.dims.set_point(0, 2)
    panel.run()
    wait_for(panel)
    saved = save_mask(tmp_path, viewer, layer)
    assert saved.mask == tmp_path / "masks" / "train" / "run_7_b_2.png"
    pixels = read_micrograph(tmp_path / "images" / "train" / "run_7_b_2.tif").pixels
    assert pixels.dtype == np.uint16
    assert np.array_equal(pixels, stack[2])


def wait_for(panel: SegmentPanel) -> None:
    from qtpy.QtWidgets import QApplication

    wait_until(lambda: (QApplication.processEvents(), not panel.running)[1], 20)


def test_what_cannot_be_saved_is_said_and_leaves_nothing(viewer: Any, panel: SegmentPanel, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    panel.save()
    assert panel.message.value.startswith("choose the image, and the folder of a dataset")
    plain = viewer.add_image(grey_image(40, 48), name="plain")
    with pytest.raises(UserError, match=r"layer 'plain' has no labels yet; press Run"):
        save_mask(folder, viewer, plain)
    layer, labels = segmented(viewer, panel, grey_image(40, 48), "a")
    labels.data[0, 0] = 7
    with pytest.raises(UserError, match="the label 7 is no class; paint with 0 grain, 1 pore, 2 clay, or 255"):
        save_mask(folder, viewer, layer)
    labels.data[:] = 255
    with pytest.raises(UserError, match="nothing is labelled in this plane"):
        save_mask(folder, viewer, layer)
    labels.data[:] = 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; choose a folder"):
        save_mask(tmp_path / "file", viewer, layer)
    assert not folder.exists()

    save_mask(folder, viewer, layer)
    layer.name = "b"
    description = folder / "dataset.json"
    text = description.read_text()
    description.write_text(json.dumps({"classes": ["rock", "pore", "clay"]}))
    with pytest.raises(UserError, match="has the classes rock, pore, clay, the labels have grain, pore, clay"):
        save_mask(folder, viewer, layer)
    description.write_text(text)
    assert read_description(description).class_table() is not None
    other = viewer.add_image(255 - grey_image(40, 48), name="other")
    other, _ = segmented(viewer, panel, 255 - grey_image(40, 48), "a")
    with pytest.raises(UserError, match=r"a\.tif is another picture; rename the layer 'a"):
        save_mask(folder, viewer, other)
    (tmp_path / "city" / "train" / "imgs").mkdir(parents=True)
    with pytest.raises(UserError, match="has the layout of Cityscapes"):
        save_mask(tmp_path / "city", viewer, layer)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["a.png", "a.tif", "dataset.json"]


def test_pictures_open_in_the_order_of_rank(viewer: Any, panel: SegmentPanel, tmp_path: Path) -> None:
    """The most telling first; what the dataset has already, what was opened, and what cannot be read is passed over."""
    ranked = [Ranked(tmp_path / f"{name}.png", 0.1, 1.0) for name in ("done 1", "broken", "b", "a")]
    for one in ranked:
        cv2.imwrite(str(one.image), grey_image(40, 48))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    panel.open_next()
    assert panel.message.value.startswith("choose the file of an order")
    panel.order.value = Ranking(ranked, []).write(tmp_path / "ranking.csv")
    panel.dataset.value = tmp_path / "dataset"
    done, _ = segmented(viewer, panel, grey_image(40, 48), "done 1")
    save_mask(tmp_path / "dataset", viewer, done)
    panel.next_button.native.click()
    assert "broken.png is neither PNG" in panel.message.value
    for name in ("b", "a"):
        panel.next_button.native.click()
        assert panel.message.value == f"opened {tmp_path / name}.png"
        assert panel.layer.name == name
    panel.next_button.native.click()
    assert panel.message.value == "no picture is left of ranking.csv"
    panel.order.value = tmp_path / "b.png"
    panel.next_button.native.click()
    assert "no order of pictures" in panel.message.value
