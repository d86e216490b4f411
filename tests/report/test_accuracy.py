"""The page: what it holds, that it loads nothing, and what it says when something is missing."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hpddrnet_trt.accuracy import Assessment, Robustness, assess, measure_robustness
from hpddrnet_trt.cli import app
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.data.augment import SHIFTS
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.report.accuracy import (
    check_target,
    class_rows,
    gallery_image,
    headline,
    largest_confusions,
    render_html,
    veil_color,
    warnings,
    write_report,
)
from hpddrnet_trt.report.accuracy_figures import curves_beside
from tests.accuracy.small_dataset import IGNORED_ROWS, SHAPE, write_dataset
from tests.report.pages import Page
from tests.toy import CLASSES, ToyEngine, manifest, write_toy_onnx

HEADER = "step,epoch,lr,train/loss,train/loss_main,train/loss_auxiliary,val/loss,val/miou,val/mean_accuracy,"
HEADER += "val/pixel_accuracy,val/iou/grain,val/iou/pore,val/iou/clay\n"
ROWS = ["10,1,0.001,1.5,1.0,0.5,,,,,,,\n", "20,2,0.002,1.2,0.8,0.4,,,,,,,\n", "20,2,,,,,0.9,0.5,0.6,0.7,0.4,0.6,nan\n"]


@pytest.fixture
def found(segmenter: Segmenter, dataset: FolderDataset) -> Assessment:
    return assess(segmenter, dataset, "test", worst=2, progress=False)


@pytest.fixture
def robust(segmenter: Segmenter, dataset: FolderDataset) -> Robustness:
    return measure_robustness(segmenter, dataset, "test", shifts=SHIFTS[:2], progress=False)


def test_an_engine_without_class_scores_has_no_reliability(found: Assessment) -> None:
    assert found.reliability
    pages = [render_html(replace(found, reliability=kept, pictures=[])) for kept in (found.reliability, {})]
    assert ["Class scores" in page for page in pages] == [True, False]


def test_the_page_holds_everything_and_loads_nothing(found: Assessment, robust: Robustness, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(HEADER + "".join(ROWS))
    curves = curves_beside(tmp_path / "model.safetensors")
    files = write_report(found, tmp_path / "out" / "page.html", curves=curves, robustness=robust)
    page = Page(files.html.read_text(encoding="utf-8"))
    assert len(page.sources) == 6 + 3 * 3  # figures; three overlays of each of three images
    page.assert_complete_in_itself()
    for word in ("Confusion matrix", "area fraction", "Loss, validation IoU", "IoU against"):
        assert any(word in alternative for alternative in page.alternatives)
    origin = found.origin
    for word in (headline(found), "toy", origin.data_sha256, "licence MIT", "numpy", origin.command.split()[0]):
        assert word in page.text
    row = class_rows(found)[0]
    for interval in (row.interval.text(1, 100), row.errors[0].error.text(2, 100, sign=True), row.distance.text(1)):
        assert interval.startswith("[")
        assert interval in page.text
    assert "None: no metrics.csv" not in page.text
    assert page.headings == ["d", "a", "c"]
    positions = [page.text.index(f" {rank} · mIoU") for rank in ("worst", "2nd worst", "best")]
    assert positions == sorted(positions)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "page.csv", "page.html", "page.robustness.png",
    ]  # fmt: skip
    assert files.robustness is not None
    with Image.open(files.robustness) as figure:
        assert figure.size[0] > 1000


def test_without_curves_and_robustness_the_page_says_so(found: Assessment, tmp_path: Path) -> None:
    found = replace(found, origin=replace(found.origin, file="model.onnx", sha256="0" * 64))
    files = write_report(found, tmp_path / "page.html")
    text = Page(files.html.read_text(encoding="utf-8")).text
    assert "None: no metrics.csv of a training run lies beside model.onnx" in text
    assert ("Robustness" in text, files.robustness) == (False, None)
    assert sorted(path.name for path in tmp_path.glob("page*")) == ["page.csv", "page.html"]


def overlay_pixels(address: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as image:
        return np.asarray(image.convert("RGBA"))


def test_pictures_show_labels_errors_and_what_is_not_labelled(found: Assessment) -> None:
    entry = found.pictures[0]  # the first 12 rows are wrong, the last 5 are not labelled
    panels = {panel.title: panel for panel in gallery_image(found, 1).groups[0]}
    assert list(panels) == ["micrograph", "truth", "prediction", "errors"]
    pixels = {name: overlay_pixels(panel.overlay) for name, panel in panels.items() if panel.overlay}
    assert all(picture.shape == (*SHAPE, 4) for picture in pixels.values())
    colours = np.array([item.color for item in CLASSES])
    np.testing.assert_array_equal(pixels["errors"][:12, :, :3], colours[entry.truth[:12]])
    assert (pixels["errors"][:12, :, 3] == 255).all()
    right = pixels["errors"][12:-IGNORED_ROWS].reshape(-1, 4)
    assert len(np.unique(right, axis=0)) == 1
    assert 0 < right[0, 3] < 255  # a veil
    np.testing.assert_array_equal(pixels["prediction"][..., :3], colours[entry.predicted])
    assert len(np.unique(pixels["truth"][-IGNORED_ROWS:].reshape(-1, 4), axis=0)) == 2  # stripes and gaps
    assert (pixels["truth"][-IGNORED_ROWS:, :, 3] == 0).any()
    assert f"{IGNORED_ROWS * SHAPE[1]} pixels not labelled" in panels["truth"].note
    assert panels["errors"].note == f"{12 * SHAPE[1]} of {35 * SHAPE[1]:,} labelled pixels"


def test_errors_stand_out_from_their_veil() -> None:
    assert veil_color([(68, 68, 68), (0, 0, 255)]) == (255, 255, 255)
    assert veil_color([(240, 228, 66), (255, 255, 255)]) == (10, 14, 22)


def test_the_table_of_classes_and_the_largest_confusions(found: Assessment) -> None:
    rows = class_rows(found)
    assert [row.name for row in rows] == [entry.name for entry in CLASSES]
    assert [sum(values) for values in zip(*((row.truth, row.predicted) for row in rows), strict=True)] == [
        pytest.approx(1), pytest.approx(1),
    ]  # fmt: skip
    per_image = [image.counts / image.counts.sum() for image in found.images]
    expected = np.mean([abs(part.sum(axis=1)[0] - part.sum(axis=0)[0]) for part in per_image])
    assert rows[0].errors[0].size.value == pytest.approx(expected)
    counts = np.array([[50, 3, 0, 1], [9, 70, 0, 0], [0, 0, 80, 0]])
    pairs = largest_confusions(replace(found, counts=counts))
    assert [(pair.truth, pair.predicted, pair.pixels) for pair in pairs] == [
        ("pore", "grain", 9), ("grain", "pore", 3), ("grain", "no class", 1),
    ]  # fmt: skip
    assert pairs[0].share == pytest.approx(9 / 13)
    assert largest_confusions(replace(found, counts=np.diag([1, 2, 3, 0])[:3])) == []


def test_what_a_reader_must_know(found: Assessment) -> None:
    assert warnings(found) == []
    trained = replace(found, origin=replace(found.origin, split="train", trained_on="small"))
    assert "trained on" in warnings(trained)[0]
    broken = replace(found, counts=np.array([[5, 0, 0, 2], [0, 5, 0, 0], [0, 0, 0, 0]]))
    assert warnings(broken) == [
        "2 predictions lie outside the classes: the model file may be damaged",
        "not in the truth of these images: clay",
    ]
    text = render_html(replace(broken, images=[replace(found.images[0], name="<b>bold</b>"), *found.images[1:]]))
    assert "2 predictions lie outside" in Page(text).text
    assert "&lt;b&gt;bold" in text
    assert "<b>bold" not in text


def test_one_image_and_no_label_still_make_a_page(tmp_path: Path, segmenter: Segmenter) -> None:
    single = assess(segmenter, write_dataset(tmp_path / "one", {"a": 2}), "test", progress=False)
    page = Page(render_html(single))
    assert "on 1 image," in page.text
    assert " only image · mIoU" in page.text
    dataset = write_dataset(tmp_path / "two", {"a": 0})
    cv2.imwrite(str(dataset.split("test")[0].mask), np.full(SHAPE, 255, np.uint8))
    nothing = assess(segmenter, dataset, "test", progress=False)
    robust = measure_robustness(segmenter, dataset, "test", shifts=SHIFTS[:1], progress=False)
    page = Page(render_html(nothing, robustness=robust))
    assert "no labelled pixel: nothing to measure" in page.text
    assert "100.00 % of all pixels are not labelled" in page.text
    assert nothing.pictures == []


def test_a_point_that_was_not_measured_is_told_with_its_reason(dataset: FolderDataset) -> None:
    fixed = Segmenter(ToyEngine(manifest("logits", size=40)), tile="whole")
    robust = measure_robustness(fixed, dataset, "test", shifts=[SHIFTS[-1]], progress=False)
    page = Page(render_html(assess(fixed, dataset, "test", progress=False), robustness=robust))
    assert "magnification 2 was not measured: an image height of 80 pixels does not fit this model" in page.text


def test_targets_that_cannot_be_written_are_told_first(tmp_path: Path, found: Assessment) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*file: "):
        check_target(tmp_path / "file" / "page.html")
    for name in ("page.pdf", "page", "."):
        with pytest.raises(UsageError, match=r"ends in \.html"):
            write_report(found, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir() if path.name != "small"] == ["file"]
    check_target(tmp_path / "new" / "page.html")  # a folder that is to be made


# -- learning curves: the record of a training run, whole, cut off, or somebody else's ----------------


def test_columns_without_their_gaps(tmp_path: Path) -> None:
    record, model = tmp_path / "metrics.csv", tmp_path / "model.onnx"
    assert curves_beside(model) is None
    record.write_text(HEADER)
    assert curves_beside(model) is None
    record.write_text(HEADER + "".join(ROWS) + ROWS[1][:9])  # cut off by a training that goes on
    curves = curves_beside(model)
    assert curves is not None
    assert curves.columns["lr"] == [(10, 0.001), (20, 0.002)]  # and not the number that was cut off
    assert curves.columns["train/loss"] == [(10, 1.5), (20, 1.2)]
    assert (curves.columns["val/miou"], curves.classes["pore"]) == ([(20, 0.5)], [(20, 0.6)])
    assert list(curves.classes) == ["grain", "pore", "clay"]


@pytest.mark.parametrize("content", ["time,speed\n1,2\n", "", HEADER + ROWS[0].replace("10,", "ten,"), "\x00\x01\n"])
def test_a_foreign_file_is_passed_over_with_a_word(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    assert curves_beside(tmp_path / "model.safetensors") is None
    assert "not the record of a training run" in caplog.text


# -- from model file to page ---------------------------------------------------------------------------


def test_the_command_writes_page_robustness_and_json(dataset: FolderDataset, tmp_path: Path) -> None:
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))
    page, figures = tmp_path / "out" / "page.html", tmp_path / "figures.json"

    def printed(*options: str) -> str:
        command = ["evaluate", str(model), "--data", str(dataset.root), *options]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    before = sorted(tmp_path.iterdir())
    assert "working range" not in printed()
    assert sorted(tmp_path.iterdir()) == before  # only the table, in the terminal
    said = printed("--report", str(page), "--robustness", "--json", str(figures))
    assert "micro IoU, per picture" in said
    assert "working range" in said
    for path in (page, page.with_suffix(".csv"), page.with_suffix(".robustness.png"), figures):
        assert f"written: {path}" in said
        assert path.is_file()
    record = json.loads(figures.read_text())
    assert record["model"] == str(model)
    assert 0.5 < record["miou"] < record["pixel_accuracy"] < 1
    assert record["robustness"]["sweeps"][0]["shift"] == "contrast"
