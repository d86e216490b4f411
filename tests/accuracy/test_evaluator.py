"""The judge: a candidate's accuracy beside the reference's, and answers that are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from PIL import Image

from hpddrnet_trt.accuracy.acceptance import AcceptanceCheck, Budget
from hpddrnet_trt.accuracy.candidates import CandidateCache, QuantizationConfig
from hpddrnet_trt.accuracy.evaluate import assess, samples_of
from hpddrnet_trt.accuracy.evaluator import AccuracyEvaluator
from hpddrnet_trt.accuracy.search import choose_precision
from hpddrnet_trt.benchmark.images import Image as BenchmarkImage
from hpddrnet_trt.benchmark.scores import Scores as BenchmarkScores
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import CalibrationRecord
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.export.images import SHIFTED, Crop, also_shifted, at_setting, read_grey
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.graph.rounding import simulate_rounding
from hpddrnet_trt.inference import load_segmenter
from tests.accuracy.fakes import FakeCost

Mask = npt.NDArray[np.uint8]


@pytest.fixture
def evaluator(fp32: Path, data: Path) -> Iterator[AccuracyEvaluator]:
    with (
        load_segmenter(fp32) as reference,
        AccuracyEvaluator(FolderDataset.open(data), "val", reference, progress=False) as open_,
    ):
        yield open_


def test_the_reference_itself_loses_nothing(
    evaluator: AccuracyEvaluator, config: QuantizationConfig, fp32: Path
) -> None:
    model, manifest = load_model(fp32)
    found = evaluator.score_graph(model, manifest)
    assert (found.drop, found.agreement, found.fidelity, found.images) == (0, 1, 1, 3)
    assert 0.8 < found.miou < 0.95  # masks carry 5 % noise
    assert found.runtime.startswith("onnxruntime")
    assert CandidateCache(config, evaluator).measure([]) == found  # nothing quantised is the network itself
    assert config.described([], half=True).precision == "fp16"
    with pytest.raises(UsageError, match="no convolution to quantise called nonsense"):
        config.graph(["nonsense"], half=False)


def test_figures_are_those_of_the_labels(
    evaluator: AccuracyEvaluator, config: QuantizationConfig, data: Path, fp32: Path, tmp_path: Path
) -> None:
    """Against a straightforward computation from whole label maps."""
    graph = config.graph(config.layers[:2], half=False)
    found = evaluator.score_graph(graph, config.described(config.layers[:2], half=False))
    path = save_model(graph, tmp_path / "it.onnx", config.described(config.layers[:2], half=False))
    masks, labels = LabelComparison(3), LabelComparison(3)
    dataset = FolderDataset.open(data)
    with load_segmenter(path, engine="onnxruntime") as candidate, load_segmenter(fp32) as reference:
        for sample in dataset.split("val"):
            image, mask = dataset.load(sample)
            got = candidate.segment(image).labels
            masks.update(got, mask)
            labels.update(got, reference.segment(image).labels)
    assert (found.miou, found.masked_miou) == (masks.scores().miou, masks.scores().masked_miou)
    assert found.agreement == labels.agreement < 1
    assert list(found.class_ious.values()) == labels.scores().iou
    assert found.drop == pytest.approx(100 * (evaluator.reference.masked_miou - found.masked_miou))
    evidence = found.evidence("a test", evaluator.source)
    assert evidence.values["masked_miou_drop_percentage_points"] == found.drop
    assert set(evidence.values) >= {"iou_against_reference/dark", "agreement", "miou", "reference_masked_miou"}


def test_half_precision_is_rounded_and_says_so(evaluator: AccuracyEvaluator, fp32: Path) -> None:
    model, manifest = load_model(fp32)
    before = model.SerializeToString(deterministic=True)
    found = evaluator.score_graph(to_half(model), manifest.replace(precision="fp16"))
    assert "simulated rounding" in found.runtime
    assert 0.99 < found.agreement <= 1
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("damage", ["cut", "other network", "not json", "a list"])
def test_answers_are_kept_and_reused_and_a_journal_that_does_not_fit_is_started_anew(
    evaluator: AccuracyEvaluator,
    config: QuantizationConfig,
    tmp_path: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = tmp_path / "journal.json"
    first = CandidateCache(config, evaluator, journal=journal).measure(config.layers)
    again = CandidateCache(config, evaluator, journal=journal)
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "score_graph", lambda *_, **__: pytest.fail("measured again"))
        assert again.measure(config.layers) == first
        assert again.measure(list(reversed(config.layers))) == first  # a set, not an order
    content = json.loads(journal.read_text())
    for entry in content["answers"].values():
        entry["miou"] = 0.123
        if damage == "cut":
            del entry["agreement"]
    if damage == "other network":
        content["identity"] = "another"
    if damage == "a list":
        content["answers"] = list(content["answers"].values())
    journal.write_text("{" if damage == "not json" else json.dumps(content))
    assert CandidateCache(config, evaluator, journal=journal).measure(config.layers) == first


def with_masks(data: Path, target: Path, change: Callable[[Mask], Mask]) -> FolderDataset:
    """A copy of the dataset with other masks on ``val``."""
    shutil.copytree(data, target)
    for path in (target / "masks" / "val").iterdir():
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)
    return FolderDataset.open(target)


def test_a_class_that_no_mask_holds_does_not_decide(
    fp32: Path, data: Path, config: QuantizationConfig, tmp_path: Path
) -> None:
    """The reference predicts class 2, the masks have none: a candidate that never predicts it gains no third."""
    dataset = with_masks(data, tmp_path / "absent", lambda mask: np.where(mask == 2, np.uint8(255), mask))
    model, manifest = load_model(fp32)
    bias = next(entry for entry in model.graph.initializer if entry.name == "classifier.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[2] = -1e6
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    with load_segmenter(fp32) as reference, AccuracyEvaluator(dataset, "val", reference, progress=False) as evaluator:
        found = evaluator.score_graph(model, manifest)
    assert evaluator.reference.masked_miou > 0.8 > evaluator.reference.miou
    assert abs(found.drop) < 5
    assert found.agreement < 1  # of all pixels, those that the masks leave out too


def test_all_places_give_the_same_two_means(fp32: Path, data: Path, config: QuantizationConfig, tmp_path: Path) -> None:
    """One file's labels, and masks without one of its classes: what `evaluate`, `benchmark`, the gate and
    `choose-precision` say of them."""
    dataset = with_masks(data, tmp_path / "absent", lambda mask: np.where(mask == 2, np.uint8(255), mask))
    budget, target = Budget(min_agreement=0), tmp_path / "chosen.onnx"
    record = CalibrationRecord(method="max", images=1, images_sha256="0", source="one image", tool="a test")
    cost = FakeCost(dict.fromkeys(config.layers, 1.0))
    with load_segmenter(fp32) as reference, AccuracyEvaluator(dataset, "val", reference, progress=False) as evaluator:
        choice = choose_precision(
            CandidateCache(config, evaluator), target, budget, cost, calibration=record, progress=False
        )
    model, manifest = load_model(target)
    rounded = save_model(simulate_rounding(model), tmp_path / "rounded.onnx", manifest)
    with load_segmenter(rounded, engine="onnxruntime") as segmenter:
        scores = assess(segmenter, dataset, "val", progress=False).scores
        samples = [*samples_of(dataset, "val", "", progress=False)]
        benchmark = BenchmarkScores([BenchmarkImage(one.name, image.pixels, mask) for one, image, mask in samples])
        benchmark.add("it", [segmenter.segment(image).labels for _, image, _ in samples])
    row = benchmark.accuracy("it", None, len(dataset.classes))
    assert row is not None
    evidence = AcceptanceCheck(dataset.root, budget, "val", fp32).verify(target, fp32, tmp_path / "it.engine").values
    chosen = choice.manifest.validation[-1].values
    assert scores.miou < scores.masked_miou - 0.1
    assert {scores.miou, row.miou, evidence["miou"], chosen["miou"]} == {scores.miou}
    assert {scores.masked_miou, row.masked_miou, evidence["masked_miou"], chosen["masked_miou"]} == {scores.masked_miou}


def test_agreement_is_asked_at_other_settings_too(
    evaluator: AccuracyEvaluator, config: QuantizationConfig, data: Path, fp32: Path, tmp_path: Path
) -> None:
    """Against a straightforward computation; figures of pictures as they are stay what they are."""
    model, manifest = load_model(fp32)
    graph, described = (make(config.layers, half=False) for make in (config.graph, config.described))
    dataset = FolderDataset.open(data)
    with (
        load_segmenter(fp32) as reference,
        AccuracyEvaluator(dataset, "val", reference, under_shift=True, progress=False) as shifting,
        load_segmenter(save_model(graph, tmp_path / "it.onnx", described), engine="onnxruntime") as candidate,
    ):
        assert shifting.digest != evaluator.digest
        assert shifting.score_graph(model, manifest).agreement_under_shift == 1
        found = shifting.score_graph(graph, described)
        labels = LabelComparison(3)
        views = also_shifted([Crop(sample.image, 0, 0) for sample in dataset.split("val")])
        assert {view.shift for view in views} == {None, *SHIFTED}
        for view in (view for view in views if view.shift is not None):
            grey = read_grey(view.image)
            shown, _ = at_setting(grey, grey, view, *grey.shape)
            labels.update(candidate.segment(shown).labels, reference.segment(shown).labels)
    assert found.agreement_under_shift == labels.agreement < 1
    assert replace(found, agreement_under_shift=None) == evaluator.score_graph(graph, described)
    assert found.evidence("a test", "it").values["agreement_under_shift"] == labels.agreement
    assert found.least_agreement == min(found.agreement, labels.agreement)
    assert len(found.cells()) == len(f"{'masked':>7}  {found.headings()}")


@pytest.mark.parametrize(("split", "says"), [("empty", r"'empty'.*holds no images"), ("val", "label no pixel")])
def test_splits_without_images_or_labels_are_no_ground(
    fp32: Path, data: Path, tmp_path: Path, split: str, says: str
) -> None:
    dataset = with_masks(data, tmp_path / "ignored", lambda mask: np.full_like(mask, 255))
    dataset.samples["empty"] = []
    with load_segmenter(fp32) as reference, pytest.raises(UsageError, match=says):
        AccuracyEvaluator(dataset, split, reference, progress=False)


def test_answers_are_of_one_reference(
    evaluator: AccuracyEvaluator, data: Path, fp32: Path, config: QuantizationConfig, tmp_path: Path
) -> None:
    """Another reference of the same checkpoint, here a quantised one, is another judge with other answers."""
    ranges = dict.fromkeys(config.plan.tensors, (-3.0, 3.0))
    graph = replace(config, ranges=ranges).graph(config.layers, half=False)
    other = save_model(graph, tmp_path / "int8.onnx", config.described(config.layers, half=False))
    dataset = FolderDataset.open(data)
    with load_segmenter(other) as reference, AccuracyEvaluator(dataset, "val", reference, progress=False) as second:
        assert second.digest != evaluator.digest
    with load_segmenter(fp32) as reference, AccuracyEvaluator(dataset, "val", reference, progress=False) as same:
        assert same.digest == evaluator.digest


def test_a_journal_that_cannot_be_written_is_a_warning(
    evaluator: AccuracyEvaluator, config: QuantizationConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = CandidateCache(config, evaluator, journal=tmp_path / "file" / "journal.json")
    first = cache.measure(config.layers)
    assert caplog.text.count("not kept for the next run") == 1
    assert cache.measure(config.layers) == first
    cache.measure([])
    assert caplog.text.count("not kept for the next run") == 1
