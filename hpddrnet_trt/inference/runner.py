"""Equally sized 8-bit images through an engine: transforms, padding, filled batches, and the exact way back."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, UserError, require
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.metrics import arg_max, softmax
from hpddrnet_trt.data.preprocess import Mode, TtaTransform, network_input, plan_tta
from hpddrnet_trt.engines.base import Engine, Prediction, input_contract
from hpddrnet_trt.graph.check import load_checked, trust
from hpddrnet_trt.graph.scores import with_scores

Grey8 = npt.NDArray[np.uint8]
Real = npt.NDArray[np.float32]


class Found(NamedTuple):
    """What was found in each image, at the image's own size.

    ``labels`` uint8 ``[H, W]``; ``scores`` float32 ``[C, H, W]`` or None: logits of a single view,
    else mean probabilities; ``confidence`` float32 ``[H, W]`` or None: the probability of the label.
    """

    labels: Sequence[Grey8]
    scores: Sequence[Real] | None = None
    confidence: Sequence[Real] | None = None


class Inference:
    """An engine with the transforms that its scores are averaged over; holds nothing between two calls."""

    def __init__(self, engine: Engine, mode: Mode, resize: tuple[int, int] | None) -> None:
        self.engine, self.mode, self.resize = engine, mode, resize
        self.manifest = engine.manifest
        self.contract = input_contract(engine.manifest)
        output = engine.manifest.output
        self.gives_logits = output is not None and output.kind == "logits"
        self._takes_out = "out" in inspect.signature(engine.infer).parameters

    def transforms(self, height: int, width: int) -> list[TtaTransform]:
        return plan_tta(self.mode, height, width, self.resize)

    def labels(self, images: Sequence[Grey8], confidence: bool, out: Grey8 | None = None) -> Found:
        """Labels of ``images``, with ``confidence`` also the probability of the chosen class; no scores.

        ``out`` takes the labels of a single image.
        """
        height, width = images[0].shape[:2]
        (transform, *others) = self.transforms(height, width)
        resized = (transform.height, transform.width) != (height, width)
        if others or (self.gives_logits and (resized or confidence)):
            scores = self.probabilities(images)
            found = Found(list(arg_max(scores)), confidence=list(scores.max(axis=1)) if confidence else None)
        else:
            batch = self._input(images, transform)
            prediction = self._run(batch, len(images), out if batch.shape[2:] == (height, width) else None)
            found = Found(
                _restored(prediction.labels, transform, height, width),
                confidence=_restored(prediction.confidence, transform, height, width)
                if confidence and prediction.confidence is not None
                else None,
            )
        return found if out is None else _into(out, found)

    def as_it_is(self, batch: Any, confidence: bool, out: Grey8 | None, stream: Any) -> Found:
        """:meth:`labels` of a single view of one image ``[1, 1, H, W]`` on the engine's GPU."""
        engine: Any = self.engine  # one that takes such arrays
        into = out[None] if out is not None and out.flags.c_contiguous else None
        prediction: Prediction = engine.infer(batch, out=into, stream=stream)
        certain = prediction.confidence
        if confidence and certain is None and prediction.logits is not None:
            certain = self.checked(softmax(prediction.logits)).max(axis=1)
        found = Found(list(prediction.labels), confidence=list(certain) if confidence and certain is not None else None)
        return found if out is None else _into(out, found)

    def probabilities(self, images: Sequence[Grey8]) -> Real:
        """Class probabilities ``[N, C, H, W]``, averaged over the transforms.

        Raises :class:`ContractError` for a model without logits, :class:`UserError` for scores that are not numbers.
        """
        height, width = images[0].shape[:2]
        planned = self.transforms(height, width)
        total: Real | None = None
        for transform in planned:
            logits = self._run(self._input(images, transform), len(images)).logits
            if logits is None:
                raise ContractError(f"{self.engine.runtime} gave no logits; export the model again")
            scores = softmax(np.stack([transform.restore_scores(entry, height, width) for entry in logits]))
            total = scores if total is None else np.add(total, scores, out=total)
        assert total is not None  # there is always one
        total /= np.float32(len(planned))
        return self.checked(total)

    def each(self, images: Iterable[Grey8]) -> Generator[Found]:
        """Equally shaped ``images`` one by one, in order, with scores where the model has them. Without ``resize``.

        A single view goes through :meth:`Engine.infer_many`, which keeps as many in flight as suits the engine;
        several images make one inference only where the model's batch is fixed.
        """
        source = iter(images)
        batches = iter(lambda: list(islice(source, self.contract.batch.minimum)), [])
        if self.mode == "single":
            yield from self._each_once(batches)
            return
        for batch in batches:
            scores = self.probabilities(batch)
            for labels, entry in zip(arg_max(scores), scores, strict=True):
                yield Found([labels], [entry])

    def _each_once(self, batches: Iterator[list[Grey8]]) -> Generator[Found]:
        sizes: deque[tuple[int, int, int]] = deque()  # images, height and width of each batch in flight

        def inputs() -> Iterator[npt.NDArray[Any]]:
            for batch in batches:
                height, width = batch[0].shape[:2]
                sizes.append((len(batch), height, width))
                yield self._input(batch, TtaTransform(height, width))

        predictions = self.engine.infer_many(inputs())
        try:
            for prediction in predictions:
                count, height, width = sizes.popleft()
                for index in range(count):
                    here = (index, ..., slice(height), slice(width))
                    yield Found(
                        [prediction.labels[here]],
                        None if prediction.logits is None else [prediction.logits[here]],
                        None if prediction.confidence is None else [prediction.confidence[here]],
                    )
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
        found = self.engine.infer(batch)
        if len(found.labels) == count:
            return found
        return Prediction(
            found.labels[:count],
            None if found.confidence is None else found.confidence[:count],
            None if found.logits is None else found.logits[:count],
        )

    def _input(self, images: Sequence[Grey8], transform: TtaTransform) -> npt.NDArray[Any]:
        """The network's input. A model with a fixed batch gets its batch filled; what the filling gives is dropped."""
        rendered = [transform.apply(image) for image in images]
        filling = max(self.contract.batch.minimum - len(rendered), 0)
        return network_input(rendered + rendered[-1:] * filling, self.contract, self.manifest.normalization)


def _restored(planes: npt.NDArray[Any], transform: TtaTransform, height: int, width: int) -> list[npt.NDArray[Any]]:
    return [np.ascontiguousarray(transform.restore_plane(plane, height, width)) for plane in planes]


def _into(out: Grey8, found: Found) -> Found:
    """``found`` of one image with its labels in ``out``, where an engine may have put them."""
    if not np.may_share_memory(found.labels[0], out):
        out[...] = found.labels[0]
    return found._replace(labels=[out])


class ScoresModel:
    """The logits form of a labels file, opened when it is first asked for. Usable from several threads.

    ``open_engine`` opens a file with the engine and options of the labels file.
    """

    def __init__(self, path: Path, manifest: Manifest, open_engine: Callable[[Path], Engine]) -> None:
        self._path, self._manifest, self._open = path, manifest, open_engine
        self._lock = threading.Lock()
        self._asked = False
        self._engine: Engine | None = None
        self._remove: Callable[[], object] = lambda: None

    def engine(self) -> Engine | None:
        """None where the file holds no scores that we find."""
        onnx = require("onnx", "export", "read ONNX files")
        with self._lock:
            if not self._asked:
                folder = Path(tempfile.mkdtemp(prefix="hpddrnet-"))
                # Engines read their file again for other input sizes: it stays as long as the engine.
                self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                target = folder / self._path.name
                model = with_scores(load_checked(self._path), self._manifest)
                if model is not None:
                    onnx.save(model, str(target))
                    trust(target)
                    self._engine = self._open(target)
                self._asked = True
            return self._engine

    def close(self) -> None:
        """Close the engine; calling it again does nothing."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
            self._remove()
