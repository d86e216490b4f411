"""8-bit images through an engine: transforms, padding, filled batches, and the exact way back.

When an image is tiled and with which tiles is decided here; how tiles become one picture: :mod:`.tiled`.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, UsageError, UserError, require
from hpddrnet_trt.core.manifest import AxisRange, InputContract, Manifest
from hpddrnet_trt.core.metrics import arg_max, softmax
from hpddrnet_trt.core.uncertainty import STEP, calibrated
from hpddrnet_trt.data.preprocess import (
    Mode,
    Resize,
    TtaTransform,
    admitted_size,
    network_input,
    plan_tta,
    scaled_size,
)
from hpddrnet_trt.engines.base import Engine, Prediction, input_contract
from hpddrnet_trt.graph.check import load_checked, trust
from hpddrnet_trt.graph.scores import with_scores
from hpddrnet_trt.inference.tiling import TilePlan, plan_tiles

Grey8 = npt.NDArray[np.uint8]
Real = npt.NDArray[np.float32]
Tile = Literal["auto", "whole"] | int
Progress = Callable[[int, int], None]

# "auto" runs an image whole up to this size of its largest view: about 0.7 GiB with the CPU engines, and more than
# the usual live frame. Larger ones need memory and see far more at once than a training crop.
WHOLE_PIXELS = 2048 * 2048
DEFAULT_TILE = 1024  # where the description does not say what crops the model was trained on


class InferenceOutput(NamedTuple):
    """What the network says of one image, at the image's own size.

    ``labels`` uint8 ``[H, W]``; ``scores`` float32 ``[C, H, W]`` or None: logits of a single transform, else mean
    probabilities; ``confidence`` float32 ``[H, W]`` or None: the probability of the label. ``domain_features`` float32
    ``[F, rows, columns]`` or None: of the cells that the image reaches the middle of, of its first plain view.
    ``sampled`` float32 ``[C, h, w]``, where it is asked for: probabilities of every :data:`STEP`-th pixel, which are
    not calibrated.
    """

    labels: Grey8
    scores: Real | None = None
    confidence: Real | None = None
    domain_features: Real | None = None
    sampled: Real | None = None


class Inference:
    """An engine with the transforms that its scores are averaged over; holds nothing between two calls.

    ``sampling``: whether class scores come along with labels, where the model has them.
    """

    def __init__(self, engine: Engine, mode: Mode, resize: Resize, sampling: bool = False) -> None:
        self.engine, self.mode, self.resize, self.sampling = engine, mode, resize, sampling
        self.manifest = engine.manifest
        self.contract = input_contract(engine.manifest)
        output = engine.manifest.output
        self.gives_logits = output is not None and output.kind == "logits"
        self._takes_out = "out" in inspect.signature(engine.infer).parameters

    def enlarging(self, factor: float | None) -> Inference:
        """The same for images that the network is to see ``factor`` times enlarged; as they are where it is None."""
        if factor is None or factor == 1:
            return self
        other = copy.copy(self)
        other.resize = factor
        return other

    def transforms(self, height: int, width: int) -> list[TtaTransform]:
        return plan_tta(self.mode, height, width, self.resize)

    def labels(
        self, images: Sequence[Grey8], confidence: bool, out: Grey8 | None = None
    ) -> list[InferenceOutput]:
        """Labels of equally sized ``images``, with ``confidence`` also the probability of the chosen class; no scores.

        ``out`` takes the labels of a single image.
        """
        height, width = images[0].shape[:2]
        (transform, *others) = self.transforms(height, width)
        resized = (transform.height, transform.width) != (height, width)
        if others or (self.gives_logits and (resized or confidence)):
            scores, features = self._averaged(images)
            certain = self._calibrated(scores).max(axis=1) if confidence else None
            return _outputs(arg_max(scores), certain, out, features, self._sampled(scores))

        def restored(planes: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
            return [np.ascontiguousarray(transform.restore_plane(plane, height, width)) for plane in planes]

        batch = self._input(images, transform)
        prediction = self._run(batch, len(images), out if batch.shape[2:] == (height, width) else None)
        planes = restored(prediction.confidence) if confidence and prediction.confidence is not None else None
        sampled = self._sampled(prediction.logits, height, width)
        return _outputs(restored(prediction.labels), planes, out, _cells(prediction, transform, batch.shape), sampled)

    def labels_on_device(self, batch: Any, confidence: bool, out: Grey8 | None, stream: Any) -> InferenceOutput:
        """:meth:`labels` of one image ``[1, 1, H, W]`` on the engine's GPU, which runs as it is."""
        engine: Any = self.engine  # one that takes such arrays
        into = out[None] if out is not None and out.flags.c_contiguous else None
        prediction: Prediction = engine.infer(batch, out=into, stream=stream)
        certain = prediction.confidence
        if confidence and certain is None and prediction.logits is not None:
            certain = self._calibrated(self.checked(softmax(prediction.logits))).max(axis=1)
        certain = certain if confidence else None
        sampled = self._sampled(prediction.logits, *prediction.labels.shape[1:])
        return _outputs(prediction.labels, certain, out, prediction.domain_features, sampled)[0]

    def probabilities(self, images: Sequence[Grey8]) -> Real:
        """Class probabilities ``[N, C, H, W]``, averaged over the transforms and calibrated.

        Raises :class:`ContractError` for a model without logits, :class:`UserError` for scores that are not numbers.
        """
        return self._calibrated(self._averaged(images)[0])

    def _calibrated(self, scores: Real) -> Real:
        """Averaged probabilities ``[N, C, H, W]`` as people see them. Labels are taken of those before: rounding
        makes some equal."""
        return calibrated(scores, self.manifest.temperature)

    def _sampled(self, scores: Real | None, height: int | None = None, width: int | None = None) -> Real | None:
        """:attr:`InferenceOutput.sampled` of ``[N, C, H, W]``, of logits where ``height`` and ``width`` of the image
        are given."""
        if scores is None or not self.sampling:
            return None
        taken = scores[:, :, :height:STEP, :width:STEP]
        return np.ascontiguousarray(taken) if height is None else self.checked(softmax(taken))

    def _averaged(self, images: Sequence[Grey8]) -> tuple[Real, Real | None]:
        """Probabilities before they are calibrated, and the features of the view that a single one would be: what the
        model's statistics are of."""
        height, width = images[0].shape[:2]
        planned = self.transforms(height, width)
        (plain,) = plan_tta("single", height, width, self.resize)
        total: Real | None = None
        features: Real | None = None
        for transform in planned:
            batch = self._input(images, transform)
            prediction = self._run(batch, len(images))
            if prediction.logits is None:
                raise ContractError(f"{self.engine.runtime} gave no logits; export the model again")
            if transform == plain:
                features = _cells(prediction, transform, batch.shape)
            scores = softmax(np.stack([transform.restore_scores(entry, height, width) for entry in prediction.logits]))
            total = scores if total is None else np.add(total, scores, out=total)
        assert total is not None  # there is always one
        total /= np.float32(len(planned))
        return self.checked(total), features

    def each(self, images: Iterable[Grey8]) -> Generator[InferenceOutput]:
        """``images`` one by one, in order, with scores where the model has them.

        A single view goes through :meth:`Engine.infer_many`, which keeps as many in flight as suits the engine;
        several images make one inference only where the model's batch is fixed, and they are equally sized.
        """
        batches = self._batches(images)
        if self.mode == "single":
            yield from self._each_once(batches)
            return
        for batch in batches:
            scores, features = self._averaged(batch)
            for index, labels in enumerate(arg_max(scores)):
                yield InferenceOutput(
                    labels, scores[index], domain_features=None if features is None else features[index]
                )

    def _batches(self, images: Iterable[Grey8]) -> Iterator[list[Grey8]]:
        for _, equal in groupby(images, key=np.shape):
            while batch := list(islice(equal, self.contract.batch.minimum)):
                yield batch

    def labels_of_each(self, images: Iterable[Grey8], confidence: bool) -> Generator[InferenceOutput]:
        """:meth:`labels` of each of ``images``, several in flight. For a single view."""
        with closing(self.each(images)) as outputs:
            for labels, logits, certain, features, _ in outputs:
                sampled = None if logits is None else self._sampled(logits[None], *labels.shape)
                if confidence and logits is not None:
                    scores = self.checked(softmax(logits[None]))
                    labels, certain = arg_max(scores)[0], self._calibrated(scores).max(axis=1)[0]
                certain = None if certain is None or not confidence else np.ascontiguousarray(certain)
                yield InferenceOutput(
                    np.ascontiguousarray(labels), confidence=certain, domain_features=features,
                    sampled=None if sampled is None else sampled[0],
                )  # fmt: skip

    def _each_once(self, batches: Iterator[list[Grey8]]) -> Generator[InferenceOutput]:
        # Images, their own height and width, how they were brought to another, and the input's shape, of each batch.
        in_flight: deque[tuple[int, int, int, TtaTransform, tuple[int, ...]]] = deque()

        def inputs() -> Iterator[npt.NDArray[Any]]:
            for batch in batches:
                height, width = batch[0].shape[:2]
                (transform,) = self.transforms(height, width)
                given = self._input(batch, transform)
                in_flight.append((len(batch), height, width, transform, given.shape))
                yield given

        predictions = self.engine.infer_many(inputs())
        try:
            for prediction in predictions:
                count, height, width, transform, shape = in_flight.popleft()
                features = _cells(prediction, transform, shape)
                for index in range(count):
                    labels = transform.restore_plane(prediction.labels[index], height, width)
                    logits, certain = prediction.logits, prediction.confidence
                    if logits is None:
                        scores = None
                    else:
                        scores = transform.restore_scores(logits[index], height, width)
                        if (transform.height, transform.width) != (height, width):
                            labels = arg_max(self.checked(scores)[None])[0]
                    if certain is not None:
                        certain = transform.restore_plane(certain[index], height, width)
                    yield InferenceOutput(labels, scores, certain, None if features is None else features[index])
        finally:
            if isinstance(predictions, Generator):
                predictions.close()  # nothing is left running when the caller stops early

    def checked(self, scores: Real) -> Real:
        """``scores``, or :class:`UserError` when one is not a number."""
        if not np.isfinite(scores).all():
            raise UserError(
                f"model {self.manifest.name!r} gave scores that are not numbers (an overflow, usually of FP16); "
                "use the FP32 file, or convert and check it again"
            )
        return scores

    def _run(self, batch: Any, count: int, out: Grey8 | None = None) -> Prediction:
        """The first ``count`` results; ``out``: may take the labels of the first, of the batch's own size."""
        if out is not None and self._takes_out and out.flags.c_contiguous and self.contract.batch.minimum == 1:
            return self.engine.infer(batch, out=out[None])  # type: ignore[call-arg]
        filled = self.engine.infer(batch)
        if len(filled.labels) == count:
            return filled
        kept: dict[str, Any] = {name: None if part is None else part[:count] for name, part in vars(filled).items()}
        return replace(filled, **kept)

    def _input(self, images: Sequence[Grey8], transform: TtaTransform) -> npt.NDArray[Any]:
        """The network's input. A model with a fixed batch gets its batch filled; what the filling gives is dropped."""
        rendered = [transform.apply(image) for image in images]
        filling = max(self.contract.batch.minimum - len(rendered), 0)
        return network_input(rendered + rendered[-1:] * filling, self.contract, self.manifest.normalization)


def _cells(prediction: Prediction, size: TtaTransform, shape: Sequence[int]) -> Real | None:
    """The features ``[N, F, rows, columns]`` of cells whose middle is in the image of ``size``, not in what pads it.

    Padding mirrors the image, which changes little of a cell; but a small image in an input of a fixed size would be
    judged by its mirror images alone. ``shape``: of that input; the last cells of it may be halves
    (:func:`~hpddrnet_trt.graph.domain.with_domain`).
    """
    features = prediction.domain_features
    if features is None:
        return None
    rows, columns = (
        int((cells - 0.5) * here / whole) + 1
        for cells, here, whole in zip(features.shape[2:], (size.height, size.width), shape[2:], strict=True)
    )
    return features[:, :, :rows, :columns]


def _outputs(
    labels: Sequence[Grey8] | Grey8,
    confidence: Sequence[Real] | Real | None,
    out: Grey8 | None,
    features: Real | None,
    sampled: Real | None,
) -> list[InferenceOutput]:
    """One output an image; that of a single one has its labels in ``out``, where an engine may have put them."""
    if out is not None:
        if not np.may_share_memory(labels[0], out):
            out[...] = labels[0]
        labels = [out]
    return [
        InferenceOutput(
            plane,
            confidence=None if confidence is None else confidence[index],
            domain_features=None if features is None else features[index],
            sampled=None if sampled is None else sampled[index],
        )
        for index, plane in enumerate(labels)
    ]


def check_tile(tile: Tile, contract: InputContract, resize: tuple[int, int] | None) -> None:
    """Raise :class:`UsageError` or :class:`ContractError` for a ``tile`` that cannot be used."""
    if tile in ("auto", "whole"):
        return
    if isinstance(tile, (str, bool)) or tile < 1 or tile % contract.multiple:
        raise UsageError(
            f"tile is 'auto', 'whole' or a tile's edge in pixels, a multiple of {contract.multiple}; got {tile!r}"
        )
    if resize is not None:
        raise UsageError("resize brings the whole image to another size; use it with tile='auto' or 'whole'")
    for name, axis in (("height", contract.height), ("width", contract.width)):
        if not axis.admits(tile):
            raise ContractError(f"a tile of {tile} pixels does not fit this model's {name}, {axis}; use tile='auto'")


def plan_for(inference: Inference, tile: Tile, height: int, width: int) -> TilePlan | None:
    """The tiles of an image of ``height`` x ``width``, as large as the network sees it; None when it runs whole.

    Raises :class:`ContractError` when the model admits no tile that all views of the mode fit.
    """
    if tile == "whole" or (tile == "auto" and _runs_whole(inference, height, width)):
        return None
    if isinstance(inference.resize, float):
        height, width = scaled_size(height, width, inference.resize)
    plan = plan_tiles(height, width, tile_size(inference.manifest, inference.mode, tile))
    return plan if len(plan.whole) > 1 else None


def _runs_whole(inference: Inference, height: int, width: int) -> bool:
    if isinstance(inference.resize, tuple):
        return True
    contract = inference.contract
    return all(
        admitted_size(transform.height, contract.height, contract.multiple)
        and admitted_size(transform.width, contract.width, contract.multiple)
        and transform.height * transform.width <= WHOLE_PIXELS
        for transform in inference.transforms(height, width)
    )


def tile_size(manifest: Manifest, mode: Mode, tile: Tile) -> tuple[int, int]:
    """Height and width of tiles: ``tile``, or those of the training crops where known, as near as the model admits."""
    if isinstance(tile, int):
        return tile, tile
    contract = input_contract(manifest)
    crop = None if manifest.data is None else manifest.data.crop
    height, width = crop or (DEFAULT_TILE, DEFAULT_TILE)
    multiple = contract.multiple
    return _edge(height, contract.height, multiple, mode), _edge(width, contract.width, multiple, mode)


def _edge(wanted: int, axis: AxisRange, multiple: int, mode: Mode) -> int:
    largest = max(wanted, axis.minimum)
    largest = largest if axis.maximum is None else min(largest, axis.maximum)
    for edge in range(largest - largest % multiple, 0, -multiple):
        if all(admitted_size(transform.height, axis, multiple) for transform in plan_tta(mode, edge, edge)):
            return edge
    raise ContractError(f"mode {mode!r} needs several sizes of each tile, and this model takes {axis} only")


class ScoresModel:
    """The logits form of a model with labels output, opened when it is first asked for. Usable from several threads.

    ``find`` opens it, or gives None where no scores are found; what it leaves on the stack is undone at the end.
    """

    def __init__(self, find: Callable[[ExitStack], Engine | None]) -> None:
        self._find, self._held = find, ExitStack()
        self._lock = threading.Lock()
        self._asked = False
        self._engine: Engine | None = None
        self._undo = weakref.finalize(self, self._held.close)

    def engine(self) -> Engine | None:
        """None where the model has no scores that we find."""
        with self._lock:
            if not self._asked:
                self._engine = self._find(self._held)
                self._asked = True
            return self._engine

    def close(self) -> None:
        """Close the engine; calling it again does nothing."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
            self._undo()


def scores_of_file(path: Path, manifest: Manifest, open_engine: Callable[[Path], Engine]) -> ScoresModel:
    """That of an ONNX file; ``open_engine`` opens a file with the engine and options of this one."""

    def find(held: ExitStack) -> Engine | None:
        onnx = require("onnx", "export", "read ONNX files")
        model = with_scores(load_checked(path), manifest)
        if model is None:
            return None
        # Engines read their file again for other input sizes: it stays as long as the engine.
        folder = Path(tempfile.mkdtemp(prefix="hpddrnet-"))
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        target = folder / path.name
        onnx.save(model, str(target))
        trust(target)
        return open_engine(target)

    return ScoresModel(find)
