"""How much accuracy a lower precision costs: one evaluator scores many candidates on the same micrographs.

The reference's labels are computed once and kept compressed on disk; micrographs are read one at a
time, so memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.accuracy.evaluate import samples_of
from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import Manifest, ValidationRecord
from hpddrnet_trt.core.metrics import LabelComparison, Scores
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.graph.model import save_model
from hpddrnet_trt.graph.nodes import copied
from hpddrnet_trt.graph.rounding import RUNTIME_REMARK, simulate_rounding, uses_half
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.matched import matched
from hpddrnet_trt.inference.result import Segmentation

if TYPE_CHECKING:
    import onnx

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Accuracy:
    """A candidate beside the FP32 reference, on the same images; fractions, 0..1.

    What is lost is told, and decided, in ``masked_miou``, the mIoU of the classes in the masks
    (:mod:`hpddrnet_trt.core.metrics`): in ``miou`` one pixel of an absent class would weigh as much as a whole class.
    """

    miou: float
    masked_miou: float
    reference_miou: float
    reference_masked_miou: float
    agreement: float  # share of all pixels with the reference's label
    class_ious: dict[str, float]  # candidate's labels against the reference's, classes that occur
    images: int
    runtime: str

    @property
    def drop(self) -> float:
        """Masked mIoU lost against the reference, in percentage points; negative where the candidate is better."""
        return 100 * (self.reference_masked_miou - self.masked_miou)

    @property
    def fidelity(self) -> float:
        """Mean IoU of the candidate's labels against the reference's: agreement that rare classes weigh on."""
        return float(np.mean(list(self.class_ious.values())))

    def text(self) -> str:
        """One line for people."""
        return (
            f"masked mIoU {100 * self.masked_miou:.2f} % ({-self.drop:+.2f} points against FP32's "
            f"{100 * self.reference_masked_miou:.2f} %), mIoU {100 * self.miou:.2f} %, "
            f"labels equal on {100 * self.agreement:.3f} % of the pixels, {self.images} images, {self.runtime}"
        )

    def cells(self) -> str:
        """Change of masked mIoU in percentage points, equal labels and IoU to FP32, as three columns of a table."""
        return f"{-self.drop:>+7.2f}  {100 * self.agreement:>11.3f}%  {100 * self.fidelity:>10.2f}%"

    def evidence(self, what: str, source: str) -> ValidationRecord:
        """The same for a model file's description."""
        values = {
            "miou": self.miou,
            "masked_miou": self.masked_miou,
            "reference_miou": self.reference_miou,
            "reference_masked_miou": self.reference_masked_miou,
            "masked_miou_drop_percentage_points": self.drop,
            "agreement": self.agreement,
            **{f"iou_against_reference/{name}": value for name, value in self.class_ious.items()},
        }
        return ValidationRecord(what=what, runtime=self.runtime, values=values, images=self.images, source=source)


class AccuracyEvaluator:
    """Scores candidates on one split of a dataset against a reference model; use it as a context manager.

    ``reference``: the FP32 model, an open segmenter that the caller closes. Raises as
    :func:`~hpddrnet_trt.accuracy.evaluate.assess` does when model and dataset do not fit, and
    :class:`UsageError` for a split without images or without a labelled pixel.

    Micrographs too large for the reference to run whole are cut into tiles, and then the candidate must take the
    same tiles: other cuts change labels too, which would pass for the cost of the precision.
    """

    def __init__(self, dataset: FolderDataset, split: str, reference: Segmenter, *, progress: bool = True) -> None:
        reference, dataset = matched(reference, dataset)
        self._dataset, self._split, self._progress = dataset, split, progress
        self._tiles: dict[int, tuple[int, int] | None] = {}  # by image: of the reference, None where it ran whole
        self._folder = tempfile.TemporaryDirectory(prefix="hpddrnet-trt-")
        try:
            # Of the labels that candidates are compared with, whoever gave them, and of the masks.
            digest = hashlib.sha256(f"{dataset.checksum()} {split} {dataset.class_names}".encode())
            self.reference = self._measure_reference(reference, digest)
        except BaseException:
            self._folder.cleanup()
            raise
        self.images = self.reference.images
        self.reference_runtime = reference.engine.runtime
        self.digest = digest.hexdigest()

    @property
    def source(self) -> str:
        """What the figures are of, for a model file's description."""
        return f"{self._dataset.name}/{self._split}"

    def score(self, candidate: Segmenter, title: str | None = None) -> Accuracy:
        """Compare an open candidate; without ``title`` there is no progress bar.

        Raises :class:`ContractError` when it cuts a micrograph otherwise than the reference does.
        """
        names = self._dataset.class_names
        against_masks, against_reference = LabelComparison(len(names)), LabelComparison(len(names))
        candidate, _ = matched(candidate, self._dataset)

        def add(index: int, image: Micrograph, mask: Labels) -> None:
            result = candidate.segment(image)
            self._check_tiles(index, image, _tile_of(result))
            labels = result.labels
            against_masks.update(labels, mask)
            against_reference.update(labels, self._recall(index))

        self._each(title, add)
        scores = against_masks.scores()
        return Accuracy(
            miou=scores.miou,
            masked_miou=scores.masked_miou,
            reference_miou=self.reference.miou,
            reference_masked_miou=self.reference.masked_miou,
            agreement=against_reference.agreement,
            class_ious=against_reference.class_ious(names),
            images=self.images,
            runtime=candidate.engine.runtime,
        )

    def score_graph(self, model: onnx.ModelProto, manifest: Manifest, title: str | None = None) -> Accuracy:
        """Compare an ONNX graph that is not a file yet, on ONNX Runtime's CPU kernels.

        What is FP16, BF16 or FP8 in it is rounded to that type by arithmetic
        (:mod:`hpddrnet_trt.graph.rounding`); sums are accumulated in FP32.
        """
        rounded = uses_half(model)
        with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
            run = manifest.replace(precision="int8" if manifest.quantized_for else "fp32") if rounded else manifest
            path = save_model(simulate_rounding(model) if rounded else copied(model), Path(folder) / "it.onnx", run)
            with Segmenter(OnnxRuntimeEngine(path)) as candidate:
                accuracy = self.score(candidate, title)
        return replace(accuracy, runtime=f"{accuracy.runtime}, {RUNTIME_REMARK}") if rounded else accuracy

    def __enter__(self) -> AccuracyEvaluator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def _measure_reference(self, reference: Segmenter, digest: hashlib._Hash) -> Scores:
        comparison = LabelComparison(len(self._dataset.class_names))

        def add(index: int, image: Micrograph, mask: Labels) -> None:
            result = reference.segment(image)
            labels, self._tiles[index] = result.labels, _tile_of(result)
            digest.update(np.ascontiguousarray(labels).data)
            np.savez_compressed(self._kept(index), labels=labels)
            comparison.update(labels, mask)

        self._each(f"FP32 reference on {self._split}", add)
        if not comparison.images:
            raise UsageError(f"split {self._split!r} of {self._dataset.root} holds no images to judge on")
        if not comparison.counts.any():
            raise UsageError(
                f"the masks of split {self._split!r} of {self._dataset.root} label no pixel (all are 255, ignore), "
                "so there is no mIoU; choose another split"
            )
        return comparison.scores()

    def _check_tiles(self, index: int, image: Micrograph, tile: tuple[int, int] | None) -> None:
        if tile != self._tiles[index]:
            height, width = image.pixels.shape
            raise ContractError(
                f"a micrograph of {height} x {width} pixels runs {_how(tile)} in this model and "
                f"{_how(self._tiles[index])} in the FP32 reference, so the difference would not be of precision alone; "
                f"use a model that takes {height} x {width}, or a dataset with smaller micrographs"
            )

    def _each(self, title: str | None, use: Callable[[int, Micrograph, Labels], None]) -> None:
        shown = self._progress and title is not None
        samples = samples_of(self._dataset, self._split, title or "", progress=shown)
        for index, (_, image, mask) in enumerate(samples):
            use(index, image, mask)

    def _kept(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.npz"

    def _recall(self, index: int) -> Labels:
        with np.load(self._kept(index)) as archive:
            labels: Labels = archive["labels"]
        return labels


def _tile_of(result: Segmentation) -> tuple[int, int] | None:
    return None if result.tiling is None else result.tiling.tile


def _how(tile: tuple[int, int] | None) -> str:
    return "whole" if tile is None else f"in tiles of {tile[0]} x {tile[1]}"
