"""Candidates of one network in lower precision, measured once each.

Sensitivity analysis and the mixed-precision search both ask for the same thing: with these
convolutions quantised and those not, how accurate is the network? Answers are kept in a journal on
disk, so that either can be interrupted and continued, and the search reuses what the analysis found.
:func:`open_study` makes everything that this needs from an FP32 export and micrographs;
:func:`precision_table` tells what every precision does throughout.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpddrnet_trt.accuracy.acceptance import reference_for
from hpddrnet_trt.accuracy.evaluator import Accuracy, AccuracyEvaluator
from hpddrnet_trt.core.cache import cache_folder
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.manifest import CalibrationRecord, InputContract, Manifest
from hpddrnet_trt.core.precisions import LowPrecision
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.runtimes import load_onnxruntime
from hpddrnet_trt.data.datasets import FolderDataset, find_images
from hpddrnet_trt.data.intensity import range_of
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.export import images as micrographs
from hpddrnet_trt.export.calibrate import MAX_IMAGES, calibration_record, float_model
from hpddrnet_trt.export.histograms import Statistics, merge
from hpddrnet_trt.export.ranges import METHODS, Method, ranges_of
from hpddrnet_trt.export.statistics import measure
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.nodes import name_nodes
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.graph.qdq import count_convolutions
from hpddrnet_trt.graph.rounding import simulate_rounding
from hpddrnet_trt.graph.work import Work, macs_and_bytes
from hpddrnet_trt.inference import load_segmenter

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationConfig:
    """Everything but the choice of layers: the FP32 graph, what could be quantised, and its ranges.

    ``model`` has named nodes; ``plan`` is the full placement, ``ranges`` hold every tensor of it.
    """

    model: onnx.ModelProto
    manifest: Manifest  # of the FP32 file
    plan: qdq.Plan
    ranges: Mapping[str, qdq.Range]
    precision: LowPrecision = "int8"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the convolutions that can be quantised, in the graph's order."""
        return self.plan.nodes

    def graph(self, layers: Collection[str], *, half: bool) -> onnx.ModelProto:
        """The graph with ``layers`` quantised for TensorRT; ``half``: the rest typed FP16, else FP32."""
        if unknown := set(layers) - set(self.layers):
            raise UsageError(f"the network has no convolution to quantise called {', '.join(sorted(unknown))}")
        model = self.model
        if layers:
            chosen = qdq.subset(self.model, "tensorrt", layers)
            model = qdq.quantize(self.model, "tensorrt", chosen, self.ranges, self.precision)
        return to_half(model) if half else model

    def described(self, layers: Collection[str], *, half: bool) -> Manifest:
        """The description that goes with :meth:`graph`."""
        if layers:
            return self.manifest.replace(precision=self.precision, quantized_for="tensorrt")
        return self.manifest.replace(precision="fp16" if half else "fp32")

    def digest(self) -> str:
        """Checksum of graph, weights, placement, ranges and precision."""
        digest = hashlib.sha256(self.model.SerializeToString(deterministic=True))
        ranges = sorted((name, list(pair)) for name, pair in self.ranges.items())
        digest.update(json.dumps([self.precision, asdict(self.plan), ranges]).encode())
        return digest.hexdigest()


class CandidateCache:
    """Accuracy by choice of layers; each choice is measured once.

    ``journal``: a JSON file that holds the answers between runs; one of another network, of other
    data or versions is started anew, and one that cannot be written gives a warning. None keeps them in memory.
    """

    def __init__(
        self, config: QuantizationConfig, evaluator: AccuracyEvaluator, *, journal: Path | None = None
    ) -> None:
        self.config, self.evaluator = config, evaluator
        self._journal = journal
        self._identity = "" if journal is None else _identity(config, evaluator)
        self._answers = _read(journal, self._identity)

    def measure(self, layers: Collection[str], *, half: bool = False) -> Accuracy:
        """Accuracy with ``layers`` quantised and the rest FP32, or FP16 where ``half``."""
        order = [name for name in self.config.layers if name in set(layers)]
        key = hashlib.sha256(json.dumps([order, half]).encode()).hexdigest()
        if key not in self._answers:
            graph = self.config.graph(layers, half=half)
            accuracy = self.evaluator.score_graph(graph, self.config.described(layers, half=half))
            self._answers[key] = asdict(accuracy)
            self._write()
        return Accuracy(**self._answers[key])

    def _write(self) -> None:
        if self._journal is None:
            return
        content = {"identity": self._identity, "answers": self._answers}
        try:
            write_text(self._journal, json.dumps(content, indent=1) + "\n")
        except (OSError, UserError) as exc:
            logger.warning("what was measured is not kept for the next run: %s", exc)
            self._journal = None


def _identity(config: QuantizationConfig, evaluator: AccuracyEvaluator) -> str:
    """Of all that an answer follows from, the passes that make and round the graphs included."""
    onnxruntime = load_onnxruntime("search for the fastest precision")
    run = simulate_rounding(config.graph(config.layers, half=True)).SerializeToString(deterministic=True)
    graph = hashlib.sha256(run).hexdigest()
    return f"{config.digest()} {graph} {evaluator.digest} onnxruntime {onnxruntime.__version__}"


def _read(journal: Path | None, identity: str) -> dict[str, dict[str, Any]]:
    if journal is None:
        return {}
    try:
        content = json.loads(journal.read_text(encoding="utf-8"))
        if content["identity"] != identity:
            return {}
        answers: dict[str, dict[str, Any]] = content["answers"]
        for entry in answers.values():
            Accuracy(**entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # not there, cut off or foreign: measure again
    return answers


@dataclass(frozen=True)
class Study:
    """An open evaluator, the configuration whose candidates it scores, and what the calibration saw."""

    evaluator: AccuracyEvaluator
    cache: CandidateCache
    method: Method
    calibration: CalibrationRecord
    statistics: tuple[Statistics, ...]  # by micrograph, in the order that covers the grey levels early
    operations: dict[str, Work]  # of one frame

    @property
    def shares(self) -> dict[str, float]:
        """Share of the multiply-accumulates by node."""
        total = sum(work.macs for work in self.operations.values())
        return {name: work.macs / total for name, work in self.operations.items()}


@dataclass(frozen=True)
class StudySettings:
    """What candidates are calibrated and judged on.

    They are judged on ``split`` of the dataset ``data``. ``calibration_images``: default is the dataset's training
    split, of which ``max_images`` give the ranges by ``method``. ``reference``: what candidates are compared with,
    default as :func:`~hpddrnet_trt.accuracy.acceptance.reference_for`. ``size``: height and width of the
    calibration crops; ``frame``: those that operations are counted for, default ``size``. With ``resume`` the
    answers of an earlier run are used. ``under_shift``: labels are compared at other settings of the
    microscope, too, as ranges are measured in any case.
    """

    data: Path
    split: str = "val"
    precision: LowPrecision = "int8"
    calibration_images: Sequence[Path] | None = None
    method: Method = "max"
    max_images: int = MAX_IMAGES
    size: tuple[int, int] | None = None
    frame: tuple[int, int] | None = None
    reference: Path | None = None
    resume: bool = True
    under_shift: bool = False


@contextmanager
def open_study(source: Path, settings: StudySettings) -> Iterator[Study]:
    """Calibrate the FP32 export ``source`` and open an evaluator, as ``settings`` say.

    What was measured is kept in the user's cache, see :mod:`hpddrnet_trt.export.statistics_cache`. Raises
    :class:`UsageError` before anything is measured for a split, a frame or a reference that does not do.
    """
    method, split = settings.method, settings.split
    model, manifest = float_model(source)
    name_nodes(model)
    plan = qdq.plan(model, "tensorrt", settings.precision)
    contract = input_contract(manifest)
    dataset = FolderDataset.open(settings.data)
    judged = [sample.image for sample in dataset.split(split)]
    images = settings.calibration_images
    if images is None and "train" not in dataset.splits:
        raise UsageError(
            f"dataset {settings.data} has no training split to calibrate on; name micrographs with --calib"
        )
    compared_with = reference_for(settings.reference, source, manifest)
    images = find_images(settings.data, "train") if images is None else list(images)
    height, width = micrographs.crop_size(contract, settings.size, images)
    chosen = micrographs.choose_images(images, settings.max_images)
    warn_of_overlap(chosen, judged, f"{dataset.name}/{split}")
    crops = micrographs.plan_crops(
        chosen, height, width, intensity_range=range_of(manifest.intensity), read_at_m=manifest.read_at_m
    )
    crops = micrographs.also_shifted(crops)
    shown = (height, width) if settings.frame is None else _checked_frame(settings.frame, contract)
    operations = macs_and_bytes(model, (contract.batch.minimum, contract.channels, *shown))
    measured = measure(model, manifest, plan.tensors, crops, (height, width), cache="user")
    statistics = tuple(of_image for _, of_image in measured)
    ranges = ranges_of(reduce(merge, statistics), method, symmetric=True)
    config = QuantizationConfig(model, manifest, plan, ranges, settings.precision)
    with (
        load_segmenter(compared_with, precision="file") as fp32,
        AccuracyEvaluator(dataset, split, fp32, under_shift=settings.under_shift) as evaluator,
    ):
        journal = cache_folder() / "trials" / f"{config.digest()[:24]}.{evaluator.digest[:24]}.json"
        yield Study(
            evaluator=evaluator,
            cache=CandidateCache(config, evaluator, journal=journal if settings.resume else None),
            method=method,
            calibration=calibration_record(chosen, crops, (height, width), method),
            statistics=statistics,
            operations=operations,
        )


def warn_of_overlap(calibrated: Sequence[Path], judged: Sequence[Path], where: str) -> None:
    """Warn where micrographs that give the figures gave the ranges too."""
    both = {path.resolve() for path in calibrated} & {path.resolve() for path in judged}
    if both:
        logger.warning(
            "%d of the %d micrographs of %s that accuracy is measured on gave the ranges as well: it flatters",
            len(both), len(judged), where,
        )  # fmt: skip


def _checked_frame(frame: tuple[int, int], contract: InputContract) -> tuple[int, int]:
    for name, value, axis in zip(("height", "width"), frame, (contract.height, contract.width), strict=True):
        if value < 1 or value % contract.multiple or not axis.admits(value):
            raise UsageError(
                f"times cannot be estimated for a frame of {frame[0]}x{frame[1]}: the model's {name} is a multiple of "
                f"{contract.multiple} within {axis}"
            )
    return frame


@dataclass(frozen=True)
class Row:
    """One precision; ``layers``: convolutions in 8 bits."""

    name: str
    layers: int
    accuracy: Accuracy


@dataclass(frozen=True)
class PrecisionTable:
    source: str  # dataset and split judged on
    convolutions: int
    rows: tuple[Row, ...]

    def text(self) -> str:
        """A table for people."""
        first = self.rows[0].accuracy
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{self.source}, {first.images} images, FP32 masked mIoU {100 * first.reference_masked_miou:.2f} %",
            f"{'precision':<{width}}  {'8-bit convolutions':>18}  {'masked':>7}  {'change':>7}  {first.headings()}",
        ]
        for row in self.rows:
            accuracy = row.accuracy
            lines.append(
                f"{row.name:<{width}}  {row.layers:>12} of {self.convolutions:<2}  "
                f"{100 * accuracy.masked_miou:>6.2f}%  {accuracy.cells()}"
            )
        lines.append("rounding of FP16, BF16 and FP8 is simulated, sums are accumulated in FP32")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def precision_table(study: Study, *, progress: bool = True) -> PrecisionTable:
    """Score every precision on the study's split, the quantised ones with FP16 around them."""
    _, convolutions = count_convolutions(study.cache.config.model)
    rows = tuple(progress_bar(_rows(study), desc="precisions", total=3 + len(METHODS), unit="", show=progress))
    return PrecisionTable(study.evaluator.source, convolutions, rows)


def _rows(study: Study) -> Iterator[Row]:
    config, evaluator = study.cache.config, study.evaluator
    model, manifest = config.model, config.manifest
    yield Row("FP16", 0, evaluator.score_graph(to_half(model), manifest.replace(precision="fp16")))
    yield Row("BF16", 0, evaluator.score_graph(to_half(model, kind="bf16"), manifest.replace(precision="bf16")))
    statistics = reduce(merge, study.statistics)
    int8 = replace(config, plan=qdq.plan(model, "tensorrt"), precision="int8")
    for method in METHODS:
        cache = CandidateCache(replace(int8, ranges=ranges_of(statistics, method, symmetric=True)), evaluator)
        yield Row(f"INT8 {method}", len(int8.layers), cache.measure(int8.layers, half=True))
    ranges = ranges_of(statistics, "max", symmetric=True)
    fp8 = replace(config, plan=qdq.plan(model, "tensorrt", "fp8"), ranges=ranges, precision="fp8")
    yield Row("FP8 max", len(fp8.layers), CandidateCache(fp8, evaluator).measure(fp8.layers, half=True))
