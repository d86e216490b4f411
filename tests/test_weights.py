"""The models that come with the package: complete, small, described, found by name, and as good as they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.accuracy.evaluate import assess
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.weights import CHECKPOINT, DEFAULT, FOLDER, INT8, locate, shipped_models

pytestmark = pytest.mark.usefixtures("one_thread")


def card(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def test_the_default_model_is_shipped() -> None:
    assert DEFAULT in shipped_models()


@pytest.mark.parametrize("name", shipped_models())
def test_complete_small_and_described(name: str) -> None:
    manifests = [read_manifest(locate(name, suffix)) for suffix in (CHECKPOINT, ".onnx", INT8)]
    for manifest in manifests:
        assert manifest.name == name
        assert manifest.data is not None
        assert manifest.data.license == "MIT"
        assert manifest.classes == manifests[0].classes
    assert [manifest.precision for manifest in manifests] == [None, "fp32", "int8"]
    assert sum(path.stat().st_size for path in FOLDER.glob(f"{name}*")) <= 24e6  # once, not twice
    for part in ("## Data", "## Figures", "## Limits", "## Licence", "## Command"):
        assert part in card(name)


@pytest.mark.parametrize("name", shipped_models())
def test_checkpoint_and_onnx_give_the_same_labels(name: str) -> None:
    image, _ = simulate(104, 152, seed=3)
    with load_segmenter(name, engine="torch") as reference:
        wanted = reference.segment(image).labels
    # Simulated grains are nothing it knows: close calls everywhere.
    for precision, share in (("file", 0.99), ("auto", 0.99), ("int8", 0.9)):
        with load_segmenter(name, precision=precision) as small:
            assert np.mean(small.segment(image).labels == wanted) > share


def test_a_name_means_the_shipped_files_whatever_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(DEFAULT) == FOLDER / f"{DEFAULT}.onnx"
    assert locate(DEFAULT, CHECKPOINT).name == f"{DEFAULT}.safetensors"
    assert locate("runs/model.onnx") == Path("runs/model.onnx")
    Path(DEFAULT).mkdir()
    assert locate(DEFAULT) == FOLDER / f"{DEFAULT}.onnx"
    assert locate(f"{DEFAULT}/x.onnx") == Path(DEFAULT, "x.onnx")


def test_unknown_names_list_what_is_there() -> None:
    with pytest.raises(UsageError, match=DEFAULT):
        load_engine("nasa-super9")


@pytest.mark.parametrize("precision", ["file", "int8"])
def test_card_figures_are_those_of_the_file(sem_data: Path, precision: Any) -> None:
    """The card's tables, rows "test": mIoU, micro-IoU averaged per image, pixel accuracy, in percent."""
    dataset = FolderDataset.open(sem_data / DEFAULT)
    rows = re.findall(r"^\| test \|(.*)\|$", card(DEFAULT), flags=re.MULTILINE)
    said = [float(value) for value in rows[precision == "int8"].split("|")[:3]]
    with load_segmenter(DEFAULT, precision=precision) as segmenter:
        scores = assess(segmenter, dataset, "test", progress=False).scores
    found = [100 * value for value in (scores.miou, scores.mean_image_micro_iou, scores.pixel_accuracy)]
    assert found == pytest.approx(said, abs=0.05)
