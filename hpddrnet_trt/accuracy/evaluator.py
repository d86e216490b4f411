"""How much accuracy a lower precision costs: one evaluator scores many candidates on the same micrographs.

The reference's labels are computed once and kept compressed on disk; micrographs are read one at a
time, so memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
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
from hpddrnet_trt.export.images import Crop, also_shifted, at_setting
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
    agreement_under_shift: float | None = None  # the same share at other settings of the microscope, where asked for

    @property
    def drop(self) -> float:
        """Masked mIoU lost against the reference, in percentage points; negative where the candidate is better."""
        return 100 * (self.reference_masked_miou - self.masked_miou)

    @property
    def fidelity(self) -> float:
        """Mean IoU of the candidate's labels against the reference's: agreement that rare classes weigh on."""
        return float(np.mean(list(self.class_ious.values())))

    @property
    def least_agreement(self) -> float:
        """Of the pictures as they are and under shift, what agrees less."""
        return min(self.agreement, 1.0 if self.agreement_under_shift is None else self.agreement_under_shift)

    def text(self) -> str:
        """One line for people."""
        shifted = self.agreement_under_shift
        elsewhere = "" if shifted is None else f", {100 * shifted:.3f} % at other settings of the microscope"
        return (
            f"masked mIoU {100 * self.masked_miou:.2f} % ({-self.drop:+.2f} points against FP32's "
            f"{100 * self.reference_masked_miou:.2f} %), mIoU {100 * self.miou:.2f} %, "
            f"labels equal on {100 * self.agreement:.3f} % of the pixels{elsewhere}, {self.images} images, "
            f"{self.runtime}"
        )

    def cells(self) -> str:
        """Change of masked mIoU in percentage points, equal labels (under shift, too, where known) and IoU to FP32:
        columns of a table."""
        shifted = self.agreement_under_shift
        elsewhere = "" if shifted is None else f"  {100 * shifted:>10.3f}%"
        return f"{-self.drop:>+7.2f}  {100 * self.agreement:>11.3f}%{elsewhere}  {100 * self.fidelity:>10.2f}%"

    def headings(self) -> str:
        """Of :meth:`cells`, without the first."""
        elsewhere = "" if self.agreement_under_shift is None else "  under shift"
        return f"{'labels equal':>12}{elsewhere}  {'IoU to FP32':>11}"

    def evidence(self, what: str, source: str) -> ValidationRecord:
        """The same for a model file's description."""
        values = {
            "miou": self.miou,
            "masked_miou": self.masked_miou,
            "reference_miou": self.reference_miou,
            "reference_masked_miou": self.reference_masked_miou,
            "masked_miou_drop_percentage_points": self.drop,
            "agreement": self.agreement,
            **({} if self.agreement_under_shift is None else {"agreement_under_shift": self.agreement_under_shift}),
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

    ``under_shift``: labels are compared also at other settings of the microscope, those that calibration knows
    (:data:`~hpddrnet_trt.export.images.SHIFTED`), each picture at one of them or, of few, at several.
    """

    def __init__(
        self, dataset: FolderDataset, split: str, reference: Segmenter, *, under_shift: bool = False,
        progress: bool = True,
    ) -> None:  # fmt: skip
        reference, dataset = matched(reference, dataset)
        self._dataset, self._split, self._progress = dataset, split, progress
        whole = [Crop(sample.image, 0, 0) for sample in dataset.split(split)]
        self._views = also_shifted(whole) if under_shift else whole
        self._tiles: dict[int, tuple[int, int] | None] = {}  # by view: of the reference, None where it ran whole
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
        against_masks, against_reference, under_shift = (LabelComparison(len(names)) for _ in range(3))
        candidate, _ = matched(candidate, self._dataset)

        def add(index: int, image: Micrograph, mask: Labels) -> None:
            result = candidate.segment(image)
            self._check_tiles(index, image, _tile_of(result))
            labels = result.labels
            if self._views[index].shift is not None:
                under_shift.update(labels, self._recall(index))
                return
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
            agreement_under_shift=under_shift.agreement if under_shift.images else None,
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
            if self._views[index].shift is None:
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
        views = groupby(enumerate(self._views), key=lambda entry: entry[1].image)
        for (_, image, mask), (_, of_image) in zip(samples, views, strict=True):
            for index, view in of_image:
                pixels, labels = at_setting(image.pixels, mask, view, *mask.shape)
                use(index, replace(image, pixels=pixels), labels)

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
