"""Any micrograph in, a label map of the same size out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt import views
from hpddrnet_trt.data.micrograph import Micrograph, to_grey8
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.engines.base import Engine, Prediction, input_contract
from hpddrnet_trt.errors import ContractError, UsageError, UserError
from hpddrnet_trt.manifest import Manifest
from hpddrnet_trt.scores import arg_max, softmax
from hpddrnet_trt.segmentation import Segmentation
from hpddrnet_trt.views import Mode, View

Image = npt.NDArray[Any] | Micrograph
PIXEL_KINDS = {1: "u", 2: "uf", 4: "f", 8: "f"}  # bytes per pixel: admitted kinds (unsigned, float)


class Segmenter:
    """Runs a model on images of any size from 1 x 1 pixel.

    Images are padded at the bottom and right by reflection to a size the model takes, and the
    result is cropped back exactly. Parameters:

    - ``engine``: a loaded model file; :meth:`close` closes it.
    - ``mode``: ``single``, or average the class probabilities of several views: ``flip`` (the image
      and its mirror image) or ``multiscale`` (both at six sizes, as mmsegmentation's
      ``SegTTAModel``). Averaging needs a model with logits output.
    - ``resize``: (long, short) edge; images are first brought to the largest size of the same
      aspect within it, as the authors' test pipeline does with (2048, 1024). A model with labels
      output returns by nearest neighbour, one with logits by bilinear interpolation.
    - ``confidence``: also give the probability of the chosen class.
    - ``window``: grey values that become black and white, the same for all images; default: 8-bit
      images as they are, others by their own percentiles (see ``to_grey8``).
    - ``batch_size``: images per inference in :meth:`segment_batch`.

    Raises :class:`ContractError` when the model cannot do what was asked.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        mode: Mode = "single",
        resize: tuple[int, int] | None = None,
        confidence: bool = False,
        window: tuple[float, float] | None = None,
        batch_size: int = 4,
    ) -> None:
        if mode not in views.MODES:
            raise UsageError(f"unknown mode {mode!r}; choose one of: {', '.join(views.MODES)}")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        if resize is not None and min(resize) < 1:
            raise UsageError(f"resize must be two positive numbers of pixels, got {resize}")
        self.engine, self.mode, self.resize, self.window = engine, mode, resize, window
        self.manifest = engine.manifest
        self._contract = input_contract(engine.manifest)
        output = engine.manifest.output
        self._has_logits = output is not None and output.kind == "logits"
        if mode != "single" and not self._has_logits:
            raise ContractError(
                f"mode {mode!r} averages class scores, but model {self.manifest.name!r} gives labels only; "
                "export it with logits output, or use mode 'single'"
            )
        if confidence and not self._has_logits and not (output is not None and output.confidence):
            raise ContractError(
                f"model {self.manifest.name!r} gives no confidence; export it with a confidence map or logits output"
            )
        self.confidence = confidence
        self.batch_size = min(batch_size, self._contract.batch.maximum or batch_size)

    def with_mode(self, mode: Mode) -> Segmenter:
        """A segmenter on the same engine with another mode."""
        return Segmenter(self.engine, mode=mode, resize=self.resize, confidence=self.confidence, window=self.window,
                         batch_size=self.batch_size)

    def segment(self, image: Image) -> Segmentation:
        """Segment one image: a :class:`Micrograph` or an array ``[H, W]`` of uint8, uint16 or float.

        A model with three float channels also takes RGB uint8 ``[H, W, 3]``.

        Raises :class:`ContractError` for any other array, an empty one, or one with NaN.
        """
        return self.segment_batch([image])[0]

    def segment_batch(self, images: Sequence[Image]) -> list[Segmentation]:
        """Segment several images, equally sized ones together; results in the order given."""
        frames = [_frame(image, self._contract.channels, self.window) for image in images]
        results: list[Segmentation | None] = [None] * len(frames)
        for indices in _groups(frames, self.batch_size):
            labels, confidences = self._labels([frames[index].pixels for index in indices])
            for position, index in enumerate(indices):
                confidence = None if confidences is None else confidences[position]
                results[index] = frames[index].result(labels[position], confidence, self.manifest)
        return [result for result in results if result is not None]

    def class_scores(self, image: Image) -> npt.NDArray[np.float32]:
        """Class probabilities ``[C, H, W]`` of one image, averaged over the mode's views; needs logits output.

        Raises :class:`ContractError` as :meth:`segment` does, :class:`UserError` for scores that are NaN.
        """
        if not self._has_logits:
            raise ContractError(f"model {self.manifest.name!r} gives labels only; export it with logits output")
        return self._mean_scores([_frame(image, self._contract.channels, self.window).pixels])[0]

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _labels(
        self, images: list[npt.NDArray[np.uint8]]
    ) -> tuple[Sequence[npt.NDArray[np.uint8]], Sequence[npt.NDArray[np.float32]] | None]:
        """Labels and confidences (or None) of equally sized uint8 images."""
        height, width = images[0].shape[:2]
        (view, *others) = views.plan_views(self.mode, height, width, self.resize)
        resized = (view.height, view.width) != (height, width)
        if others or (self._has_logits and (resized or self.confidence)):
            scores = self._mean_scores(images)
            return list(arg_max(scores)), list(scores.max(axis=1)) if self.confidence else None
        prediction = self._infer(images, view)
        labels = [views.restore_plane(plane, view, height, width) for plane in prediction.labels]
        if not self.confidence or prediction.confidence is None:
            return labels, None
        return labels, [views.restore_plane(plane, view, height, width) for plane in prediction.confidence]

    def _mean_scores(self, images: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Probabilities ``[N, C, H, W]`` of equally sized images, averaged over the views."""
        height, width = images[0].shape[:2]
        planned = views.plan_views(self.mode, height, width, self.resize)
        total: npt.NDArray[np.float32] | None = None
        for view in planned:
            logits = self._infer(images, view).logits
            if logits is None:
                raise ContractError(f"{self.engine.runtime} gave no logits; export the model again")
            scores = softmax(np.stack([views.restore_scores(entry, view, height, width) for entry in logits]))
            total = scores if total is None else np.add(total, scores, out=total)
        assert total is not None  # there is always a view
        total /= np.float32(len(planned))
        if not np.isfinite(total).all():
            raise UserError(
                f"model {self.manifest.name!r} gave scores that are not numbers (an overflow, usually of FP16); "
                "use the FP32 file, or convert and check it again"
            )
        return total

    def _infer(self, images: list[npt.NDArray[np.uint8]], view: View) -> Prediction:
        rendered = [views.render(image, view) for image in images]
        # A model with a fixed batch gets its batch filled; what the filling gives is dropped.
        filling = max(self._contract.batch.minimum - len(rendered), 0)
        batch = views.network_input(rendered + rendered[-1:] * filling, self._contract, self.manifest.normalisation)
        found = self.engine.infer(batch)
        if not filling:
            return found
        count = len(images)
        return Prediction(
            found.labels[:count],
            None if found.confidence is None else found.confidence[:count],
            None if found.logits is None else found.logits[:count],
        )


def load_segmenter(
    model_path: str | Path,
    *,
    engine: str = "auto",
    mode: Mode = "single",
    resize: tuple[int, int] | None = None,
    confidence: bool = False,
    window: tuple[float, float] | None = None,
    batch_size: int = 4,
    **options: Any,
) -> Segmenter:
    """Open a model (:func:`~hpddrnet_trt.engines.load_engine`) and wrap it as a :class:`Segmenter`.

    ``model_path`` is a file, or the name of a model that comes with the package, such as ``nasa-super1``.
    """
    loaded = load_engine(model_path, engine, **options)
    try:
        return Segmenter(
            loaded, mode=mode, resize=resize, confidence=confidence, window=window, batch_size=batch_size
        )
    except BaseException:
        loaded.close()
        raise


@dataclass(frozen=True)
class _Frame:
    """One image ready for the views, and where it came from."""

    pixels: npt.NDArray[np.uint8]
    window: tuple[float, float]
    origin: Micrograph | None

    def result(
        self, labels: npt.NDArray[np.uint8], confidence: npt.NDArray[np.float32] | None, manifest: Manifest
    ) -> Segmentation:
        return Segmentation(
            labels=np.ascontiguousarray(labels),
            manifest=manifest,
            confidence=None if confidence is None else np.ascontiguousarray(confidence),
            window=self.window,
            pixel_size_m=None if self.origin is None else self.origin.pixel_size_m,
            source=None if self.origin is None else self.origin.source,
        )


def _frame(image: Image, channels: int, window: tuple[float, float] | None) -> _Frame:
    origin = image if isinstance(image, Micrograph) else None
    pixels = _checked(image.pixels if isinstance(image, Micrograph) else image, channels)
    if pixels.ndim == 3:
        return _Frame(pixels, (0.0, 255.0), origin)
    return _Frame(*to_grey8(pixels, window), origin)


def _checked(pixels: Any, channels: int) -> npt.NDArray[Any]:
    """``pixels`` in native byte order, or a :class:`ContractError` in one sentence."""
    if not isinstance(pixels, np.ndarray):
        raise ContractError(f"expected an image as a numpy array [height, width], got {type(pixels).__name__}")
    colour = pixels.ndim == 3 and channels == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    if pixels.ndim != 2 and not colour:
        raise ContractError(
            f"expected a grey image [height, width], got an array of shape {pixels.shape}; "
            "give one image at a time, as grey levels"
        )
    if pixels.size == 0:
        raise ContractError(f"the image is empty (shape {pixels.shape})")
    if pixels.dtype.kind not in PIXEL_KINDS.get(pixels.dtype.itemsize, ""):
        raise ContractError(f"expected pixels of type uint8, uint16 or float32, got {pixels.dtype}; convert the image")
    if pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, and is reported
            pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ContractError("the image has pixels that are NaN or infinite; replace them first")
        return pixels
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _groups(frames: Sequence[_Frame], size: int) -> Iterator[list[int]]:
    """Indices of equally shaped frames, at most ``size`` at a time."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, frame in enumerate(frames):
        by_shape.setdefault(frame.pixels.shape, []).append(index)
    for indices in by_shape.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
