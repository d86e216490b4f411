"""Does an exported graph compute what the unmodified PyTorch network computes?

ONNX Runtime runs the graph, several sizes where they are dynamic. Compared are the classifier's scores
at 1/8 of the input size, read inside the graph, and the graph's own outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.core.manifest import InputContract, Manifest, ValidationRecord
from hpddrnet_trt.data.intensity import range_of
from hpddrnet_trt.data.preprocess import network_input
from hpddrnet_trt.data.simulate import MIN_SIZE, simulate
from hpddrnet_trt.export.images import Crop, Grey, cut, read_grey
from hpddrnet_trt.graph.nodes import class_scores, copied

if TYPE_CHECKING:
    import onnx

    from hpddrnet_trt.models.network import HPDDRNet

logger = logging.getLogger(__name__)

# Of the scores' standard deviation. Two orders of one FP32 sum differ by about 2e-5 of it; an error in
# a rewrite moves scores by 1e-2 and more.
TOLERANCE = 1e-3
# Share of scores, and of pixels with a clear margin, that may differ: where position attention weighs
# two positions almost equally and their scores are large, FP32 rounding alone can turn the balance.
ALLOWED_SHARE = 1e-3
_PURPOSE = "check the exported file"
_NORMALISED = InputContract(dtype="float32", channels=3)
_DYNAMIC_SIZES = ((2, 128, 192), (1, 136, 200), (1, 256, 256))


@dataclass
class _Worst:
    """Running comparison over the inputs tried."""

    pixels: int = 0
    equal: int = 0
    clearly_wrong: int = 0  # pixels whose label differs although the reference's margin is clear
    scores: int = 0
    scores_off: int = 0  # scores that differ by more than the tolerance
    score_difference: float = 0.0
    score_std: float = 0.0
    confidence_difference: float = 0.0

    @property
    def passed(self) -> bool:
        return self.scores_off <= ALLOWED_SHARE * self.scores and self.clearly_wrong <= ALLOWED_SHARE * self.pixels


def compare_with_pytorch(
    model: onnx.ModelProto, network: HPDDRNet, manifest: Manifest, images: Sequence[Path] = ()
) -> ValidationRecord:
    """Run ``model`` on ONNX Runtime and ``network`` on PyTorch and compare.

    ``manifest`` describes the model (input and output contract, normalisation). ``images`` are
    micrographs, cut or mirrored to the sizes the model takes; without any, simulated ones are used.
    Raises :class:`UserError` when more than ``ALLOWED_SHARE`` of the scores differ by more than
    ``TOLERANCE`` of their standard deviation (or of 1, if that is more), or of the labels where the
    classes' margin is larger than twice that.
    """
    tapped, tap = _with_scores(model)
    session = runtimes.session(tapped, _PURPOSE)
    names = [entry.name for entry in session.get_outputs()]
    worst = _Worst()
    count = 0
    for batch in sample_batches(manifest, images):
        count += len(batch)
        got = dict(zip(names, session.run(names, feed_of(batch, manifest)), strict=True))
        given = network_input(list(batch), _NORMALISED, manifest.normalization)
        _compare(got, tap, network, given, worst, manifest.temperature or 1.0)
    evidence = ValidationRecord(
        what="export parity",
        runtime=runtime_name(),
        values={
            "agreement": worst.equal / worst.pixels,
            "max_abs_difference": worst.score_difference,
            "reference_std": worst.score_std,
            "clearly_wrong_pixels": float(worst.clearly_wrong),
            **({"max_confidence_difference": worst.confidence_difference} if "confidence" in names else {}),
        },
        images=count,
        source=source_name(images[:count]),
    )
    logger.info(
        "compared with PyTorch on %d images: labels agree on %.4f %% of the pixels, largest score difference %.2e "
        "(scores' standard deviation %.2f)",
        count, 100 * evidence.values["agreement"], worst.score_difference, worst.score_std,
    )  # fmt: skip
    if not worst.passed:
        raise UserError(
            f"the exported graph differs from PyTorch: {worst.scores_off / worst.scores:.2%} of the scores are off, by "
            f"up to {worst.score_difference:.3g} (their standard deviation is {worst.score_std:.3g}), and labels agree "
            f"on {evidence.values['agreement']:.4%} of the pixels; no file was written. Export with another "
            "attention form, and report this"
        )
    return evidence


def _with_scores(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """A copy of ``model`` that also gives the scores before they are enlarged, and their name."""
    onnx = require("onnx", "export", "check the exported file")
    scores = class_scores(model.graph)
    copy = copied(model)
    copy.graph.output.append(onnx.helper.make_tensor_value_info(scores, onnx.TensorProto.FLOAT, None))
    return copy, scores


def _compare(
    got: dict[str, Any],
    tap: str,
    network: HPDDRNet,
    image: npt.NDArray[np.float32],
    worst: _Worst,
    temperature: float,
) -> None:
    import torch

    from hpddrnet_trt.models.network import resize

    with torch.inference_mode():
        scores = network(torch.from_numpy(image))
        full = resize(scores, image.shape[2], image.shape[3])
        probabilities = torch.softmax(full / temperature, dim=1).numpy()
    low, logits = scores.numpy(), full.numpy()
    if got[tap].shape[1] == 1:  # two classes: their margin
        low = low[:, 1:] - low[:, :1]
    labels = logits.argmax(axis=1)
    guess = got["logits"].argmax(axis=1) if "logits" in got else got["labels"]
    std = float(low.std())
    tolerance = TOLERANCE * max(1.0, std)
    chosen = np.take_along_axis(logits, guess[:, None].astype(np.int64), axis=1)[:, 0]
    worst.pixels += labels.size
    worst.equal += int((guess == labels).sum())
    worst.clearly_wrong += int((logits.max(axis=1) - chosen > 2 * tolerance).sum())
    worst.score_std = max(worst.score_std, std)
    for ours, reference in [(got[tap], low), *([(got["logits"], logits)] if "logits" in got else [])]:
        difference = np.abs(ours - reference)
        worst.scores += difference.size
        worst.scores_off += int((~(difference <= tolerance)).sum())  # a NaN is off
        worst.score_difference = float(np.maximum(worst.score_difference, difference.max()))
    if "confidence" in got:
        of_guess = np.take_along_axis(probabilities, guess[:, None].astype(np.int64), axis=1)[:, 0]
        difference = np.abs(got["confidence"] - of_guess)
        worst.confidence_difference = float(np.maximum(worst.confidence_difference, difference.max()))


def sample_batches(manifest: Manifest, images: Sequence[Path]) -> Iterator[Grey]:
    """Grey images, uint8 ``[N, H, W]``, of sizes the model takes; of the first few micrographs, in order."""
    assert manifest.input is not None  # the exporter has written it
    batch, height, width = manifest.input.batch.fixed, manifest.input.height.fixed, manifest.input.width.fixed
    sizes = list(dict.fromkeys((batch or n, height or h, width or w) for n, h, w in _DYNAMIC_SIZES))
    if len(sizes) == 1:
        sizes *= 2  # another picture at the one size
    index = 0
    for count, rows, columns in sizes:
        yield np.stack([_frame(manifest, images, index + offset, rows, columns) for offset in range(count)])
        index += count


def _frame(manifest: Manifest, images: Sequence[Path], index: int, height: int, width: int) -> Grey:
    if images:
        path = images[index % len(images)]
        return cut(read_grey(path, range_of(manifest.intensity), manifest.read_at_m), Crop(path, 0, 0), height, width)
    picture, _ = simulate(max(height, MIN_SIZE), max(width, MIN_SIZE), seed=index)
    return picture[:height, :width]


def feed_of(batch: Grey, manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
    """What ONNX Runtime is given for a batch of :func:`sample_batches`."""
    assert manifest.input is not None
    return {"image": network_input(list(batch), manifest.input, manifest.normalization)}


def runtime_name() -> str:
    """Of the runtime that compares, for a validation record."""
    return f"onnxruntime {version('onnxruntime')} (CPU)"


def source_name(images: Sequence[Path]) -> str:
    """Of the inputs of a comparison, for a validation record."""
    shown = ", ".join(path.name for path in images[:3])
    return (shown + (", ..." if len(images) > 3 else "")) if images else "simulated micrographs"
