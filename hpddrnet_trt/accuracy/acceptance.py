"""The acceptance check: a file is written only if it keeps its accuracy budget on real micrographs.

What can be run is run: a TensorRT engine on its GPU, an ONNX file on ONNX Runtime's CPU kernels, with
the rounding of FP16, BF16 and FP8 simulated. The validation record names which.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

from hpddrnet_trt.accuracy.evaluator import Accuracy, AccuracyEvaluator
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import Manifest, ValidationRecord, read_manifest
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.inference import load_segmenter
from hpddrnet_trt.inference.matched import matched
from hpddrnet_trt.weights import locate

WHAT = "accuracy against FP32"  # of the evidence
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """Limits on a candidate beside the FP32 reference; None is no limit.

    ``max_miou_drop``: percentage points of masked mIoU, the mIoU of the classes in the masks.
    ``min_agreement``: share of pixels with the reference's label, 0..1; at other settings of the microscope, too, where
    these were looked at (``under_shift`` of the evaluator).

    Raises :class:`UsageError` for limits that make no sense or none at all.
    """

    max_miou_drop: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_miou_drop is None and self.min_agreement is None:
            raise UsageError("a budget needs a limit: the mIoU that may be lost, the smallest agreement, or both")
        if self.max_miou_drop is not None and not 0 <= self.max_miou_drop <= 100:
            raise UsageError(
                f"the mIoU that may be lost is in percentage points between 0 and 100, got {self.max_miou_drop}"
            )
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise UsageError(f"the smallest agreement is a fraction between 0 and 1, got {self.min_agreement}")

    def kept_by(self, accuracy: Accuracy) -> bool:
        return not self.breaches(accuracy)

    def breaches(self, accuracy: Accuracy) -> list[str]:
        """What is over the limits, for people; empty where the budget holds. A NaN never holds."""
        wrong = []
        if self.max_miou_drop is not None and not accuracy.drop <= self.max_miou_drop:
            wrong.append(f"masked mIoU falls by {accuracy.drop:.2f} points, {self.max_miou_drop:g} are allowed")
        if self.min_agreement is not None:
            elsewhere = " at other settings of the microscope"
            wrong += [
                f"labels are equal on {100 * agreement:.2f} % of the pixels{where}, "
                f"{100 * self.min_agreement:g} % are needed"
                for agreement, where in ((accuracy.agreement, ""), (accuracy.agreement_under_shift, elsewhere))
                if agreement is not None and not agreement >= self.min_agreement
            ]
        return wrong

    def __str__(self) -> str:
        limits = []
        if self.max_miou_drop is not None:
            limits.append(f"at most {self.max_miou_drop:g} points of masked mIoU lost")
        if self.min_agreement is not None:
            limits.append(f"labels equal on at least {100 * self.min_agreement:g} % of the pixels")
        return " and ".join(limits)


@dataclass(frozen=True)
class AcceptanceCheck:
    """Verifies candidates on one split of a dataset.

    ``reference``: the checkpoint or FP32 ONNX file to compare with; None looks for it beside the
    candidate's source (:func:`find_reference`). ``device``: CUDA index of the GPU that runs an engine.
    ``under_shift``: the budget's agreement is asked at other settings of the microscope, too.
    """

    data: Path
    budget: Budget
    split: str = "test"
    reference: Path | None = None
    device: int = 0
    under_shift: bool = False

    def check(self, source: Path) -> None:
        """Whether :meth:`verify` could judge what is made from ``source``, before anyone spends minutes on that.

        Raises what it would raise: a missing split, other classes, no reference.
        """
        dataset = FolderDataset.open(self.data)
        dataset.split(self.split)
        with load_segmenter(reference_for(self.reference, source, read_manifest(source)), precision="file") as fp32:
            matched(fp32, dataset)

    def verify(self, candidate: Path, source: Path, target: Path) -> ValidationRecord:
        """Run ``candidate`` (an ONNX file or an engine made from ``source``) and return the evidence.

        Raises :class:`UserError` when it misses the budget: ``target`` is what is then not written.
        Raises :class:`UsageError` when no reference is found or the data do not fit the model.
        """
        manifest = read_manifest(candidate)
        reference = reference_for(self.reference, source, manifest)
        dataset = FolderDataset.open(self.data)
        with (
            load_segmenter(reference, precision="file") as fp32,
            AccuracyEvaluator(dataset, self.split, fp32, under_shift=self.under_shift) as evaluator,
        ):
            accuracy = _run(evaluator, candidate, manifest, self.device)
            source_text = f"{evaluator.source}, FP32: {reference.name} on {evaluator.reference_runtime}"
        if breaches := self.budget.breaches(accuracy):
            raise UserError(_refusal(breaches, accuracy, evaluator.source, manifest, target))
        logger.info("%s keeps its budget (%s): %s", target, self.budget, accuracy.text())
        evidence = accuracy.evidence(WHAT, source_text)
        limits = {
            "allowed_masked_miou_drop_percentage_points": self.budget.max_miou_drop,
            "required_agreement": self.budget.min_agreement,
        }
        kept = {name: value for name, value in limits.items() if value is not None}
        return evidence.model_copy(update={"values": {**evidence.values, **kept}})


def _run(evaluator: AccuracyEvaluator, candidate: Path, manifest: Manifest, device: int) -> Accuracy:
    if candidate.suffix.lower() == ".onnx":
        return evaluator.score_graph(*load_model(candidate), title=f"{manifest.precision} on {evaluator.source}")
    with load_segmenter(candidate, precision="file", device=device) as segmenter:
        return evaluator.score(segmenter, title=f"engine on {evaluator.source}")


def reference_for(given: Path | None, source: Path, manifest: Manifest) -> Path:
    """The model file to compare with: ``given`` (a file or a shipped model's name), else :func:`find_reference`.

    Raises :class:`UsageError` for a file that is not FP32; one of another checkpoint is taken with a warning.
    """
    if given is None:
        return find_reference(source, manifest)
    path = locate(given)
    described = read_manifest(path)
    if described.precision not in (None, "fp32") or described.quantized_for is not None:
        raise UsageError(
            f"the reference {path} is {str(described.precision).upper()}, so it would hide what lower precision costs; "
            "give the checkpoint or the FP32 ONNX file"
        )
    checkpoint = sha256_of(path) if path.suffix.lower() == ".safetensors" else described.checkpoint_sha256
    if checkpoint != manifest.checkpoint_sha256:
        logger.warning(
            "the reference %s is of another checkpoint than %s: the difference is not of precision alone", path, source
        )  # fmt: skip
    return path


def find_reference(source: Path, manifest: Manifest) -> Path:
    """The FP32 file of the same checkpoint: ``source`` itself, or one in its folder.

    A checkpoint (run with PyTorch, where that is installed) comes before an FP32 ONNX file. Raises
    :class:`UsageError` when there is none.
    """
    wanted = manifest.checkpoint_sha256
    if wanted is not None and importlib.util.find_spec("torch") is not None:
        for path in sorted(source.parent.glob("*.safetensors")):
            if sha256_of(path) == wanted:
                return path
    for path in [source, *sorted(source.parent.glob("*.onnx"))]:
        if path.suffix.lower() == ".onnx" and _is_reference(path, wanted):
            return path
    raise UsageError(
        f"no FP32 file of the same checkpoint lies beside {source}, to compare with; name the checkpoint or the "
        "FP32 ONNX file with --reference"
    )


def _is_reference(path: Path, checkpoint: str | None) -> bool:
    try:
        manifest = read_manifest(path)
    except UserError:
        return False  # a file of another program
    return manifest.precision == "fp32" and manifest.input is not None and manifest.checkpoint_sha256 == checkpoint


def _refusal(breaches: list[str], accuracy: Accuracy, source: str, manifest: Manifest, target: Path) -> str:
    worst = min(accuracy.class_ious, key=lambda name: accuracy.class_ious[name])
    how = ""
    advice = "convert again with more layers in FP32, or use the FP32 file"
    if manifest.calibration is not None:
        record = manifest.calibration
        how = f" It was calibrated on {record.images} image{'s' * (record.images != 1)} (method {record.method})."
        advice = (
            "calibrate on more and more varied micrographs or by another method, let `hpddrnet-trt choose-precision` "
            "find the layers to keep in FP16, or fine-tune with quantisation (train/README.md)"
        )
    if manifest.mixed is not None:
        how += f" {len(manifest.mixed.floating)} of {manifest.mixed.layers} layers are FP16, chosen on another split."
        advice = "allow more, choose on more micrographs or for a smaller loss than is allowed here, or use FP16"
    return (
        f"{str(manifest.precision).upper()} misses the budget on {source}: {'; '.join(breaches)} (masked mIoU "
        f"{100 * accuracy.masked_miou:.2f} % instead of {100 * accuracy.reference_masked_miou:.2f} %; class {worst!r} "
        f"changed most, IoU against FP32 {accuracy.class_ious[worst]:.3f}; {accuracy.runtime}).{how} "
        f"{target} was not written: {advice}"
    )
