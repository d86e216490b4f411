"""The models that come with the package: complete, small, described, found by name, and as good as they say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.accuracy.evaluate import assess
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.weights import DEFAULT, FOLDER, locate, shipped_models

pytestmark = pytest.mark.usefixtures("one_thread")


def card(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def test_the_default_model_is_shipped() -> None:
    assert DEFAULT in shipped_models()


@pytest.mark.parametrize("name", shipped_models())
def test_complete_small_and_described(name: str) -> None:
    manifests = [read_manifest(FOLDER / f"{name}{suffix}") for suffix in (".safetensors", ".onnx")]
    for suffix, manifest in zip((".safetensors", ".onnx"), manifests, strict=True):
        assert (FOLDER / f"{name}{suffix}").stat().st_size <= 14e6
        assert manifest.name == name
        assert manifest.data is not None
        assert manifest.data.license == "MIT"
    assert manifests[0].classes == manifests[1].classes
    for part in ("## Data", "## Figures", "## Limits", "## Licence", "## Command"):
        assert part in card(name)


@pytest.mark.parametrize("name", shipped_models())
def test_checkpoint_and_onnx_give_the_same_labels(name: str) -> None:
    image, _ = simulate(104, 152, seed=3)
    with load_segmenter(name) as small, load_segmenter(name, engine="torch") as reference:
        labels, wanted = small.segment(image).labels, reference.segment(image).labels
    assert np.mean(labels == wanted) > 0.99  # simulated grains are nothing it knows: close calls everywhere


def test_a_name_means_the_shipped_files_whatever_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(DEFAULT) == FOLDER / f"{DEFAULT}.onnx"
    assert locate(DEFAULT, ".safetensors") == FOLDER / f"{DEFAULT}.safetensors"
    assert locate("runs/model.onnx") == Path("runs/model.onnx")
    Path(DEFAULT).mkdir()
    assert locate(DEFAULT) == FOLDER / f"{DEFAULT}.onnx"
    assert locate(f"{DEFAULT}/x.onnx") == Path(DEFAULT, "x.onnx")


def test_unknown_names_list_what_is_there() -> None:
    with pytest.raises(UsageError, match=DEFAULT):
        load_engine("nasa-super9")


def test_card_figures_are_those_of_the_file(sem_data: Path) -> None:
    """The card's table, row "test": mIoU, micro-IoU averaged per image, pixel accuracy, in percent."""
    dataset = FolderDataset.open(sem_data / DEFAULT)
    (row,) = re.findall(r"^\| test \|(.*)\|$", card(DEFAULT), flags=re.MULTILINE)
    said = [float(value) for value in row.split("|")[:3]]
    with load_segmenter(DEFAULT) as segmenter:
        scores = assess(segmenter, dataset, "test", progress=False).scores
    found = [100 * value for value in (scores.miou, scores.mean_image_micro_iou, scores.pixel_accuracy)]
    assert found == pytest.approx(said, abs=0.05)
