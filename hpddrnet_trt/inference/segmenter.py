"""The segmenter: what an embedder uses. One model, images of any size and kind."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import chain, groupby, islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

import hpddrnet_trt
from hpddrnet_trt import __version__
from hpddrnet_trt.core.domain import domain_of
from hpddrnet_trt.core.errors import ContractError, EngineDoesNotFit, ModelReplaced, UsageError, UserError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.magnification import Rescaling, in_words, rescaling
from hpddrnet_trt.data.intensity import FullScale, IntensityRange, range_of
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.data.preprocess import MODES, Mode
from hpddrnet_trt.engines import Arithmetic, is_address, opening_of
from hpddrnet_trt.engines.base import Engine, check_shape
from hpddrnet_trt.engines.cuda import on_device
from hpddrnet_trt.inference.frames import Frame, Image, check_out, device_batch, to_frame
from hpddrnet_trt.inference.result import Provenance, Segmentation
from hpddrnet_trt.inference.runner import (
    Inference,
    InferenceOutput,
    Progress,
    ScoresModel,
    Tile,
    check_tile,
    plan_for,
    scores_of_file,
)
from hpddrnet_trt.inference.tiled import Plane, scores_tiled, segment_tiled, tile_pictures
from hpddrnet_trt.inference.tiling import TilingReport

logger = logging.getLogger(__name__)
Done = TypeVar("Done")


class Segmenter:
    """Runs a model on images of any size from 1 x 1 pixel.

    Images are padded at the bottom and right by reflection to a size the model takes, and the
    result is cropped back exactly. Several threads may use one segmenter: it keeps nothing from one image to the
    next, and one grey window holds for a whole image. Parameters:

    - ``engine``: a loaded model file; :meth:`close` closes it.
    - ``mode``: ``single``, or average the class probabilities of several views: ``flip`` (the image
      and its mirror image) or ``multiscale`` (both at six sizes, as mmsegmentation's
      ``SegTTAModel``). Averaging needs an engine with logits output; :func:`load_segmenter` finds it in ONNX files.
    - ``resize``: (long, short) edge; images are first brought to the largest size of the same
      aspect within it, as the authors' test pipeline does with (2048, 1024). A model with labels
      output returns by nearest neighbour, one with logits by bilinear interpolation.
    - ``rescale``: a :class:`Micrograph` whose pixel size differs from those the model was trained at, by more than
      :data:`~hpddrnet_trt.core.magnification.TOLERANCE`, is brought to the nearest of them, and its labels and
      confidence back; not with ``resize``. Where either is unknown, nothing happens, which is logged once.
    - ``confidence``: also give the probability of the chosen class.
    - ``intervals``: also say how far area fractions may be off, from class scores, where the model's description
      has what that takes (docs/uncertainty.md).
    - ``window``: grey values that become black and white, the same for all images, or ``Percentiles`` of each
      image; default: as the model was trained, which usually is the full scale of the image's bit depth (see
      :func:`~hpddrnet_trt.data.intensity.to_grey8`).
    - ``batch_size``: images per inference in :meth:`segment_batch`.
    - ``tile``: ``whole``: an image runs in one piece, or not at all. ``auto``: so it does where the model admits
      its size and its largest view has at most 2048 x 2048 pixels; larger ones are cut into overlapping tiles of
      the size of the training crops (of 1024 x 1024 pixels where that is not known, of the model's own size where
      it has one). A number: larger images are cut into tiles of so many pixels. Tiles are an approximation; how
      they agree is in the result (:class:`~hpddrnet_trt.inference.tiling.TilingReport`).
    - ``model_sha256``: checksum of the model file, for the provenance. ``scores``: where the class scores of a
      model with labels output are found, to blend tiles. :func:`load_segmenter` gives both.

    Raises :class:`ContractError` when the model cannot do what was asked, :class:`UsageError` for options that
    make no sense.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        mode: Mode = "single",
        resize: tuple[int, int] | None = None,
        rescale: bool = True,
        confidence: bool = False,
        intervals: bool = False,
        window: IntensityRange = None,
        batch_size: int = 4,
        tile: Tile = "auto",
        model_sha256: str | None = None,
        scores: ScoresModel | None = None,
    ) -> None:
        if mode not in MODES:
            raise UsageError(f"unknown mode {mode!r}; choose one of: {', '.join(MODES)}")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        if resize is not None and min(resize) < 1:
            raise UsageError(f"resize must be two positive numbers of pixels, got {resize}")
        self.engine, self.mode, self.resize, self.window, self.tile = engine, mode, resize, window, tile
        self.manifest, self.rescale = engine.manifest, rescale
        self._trained_at = self.manifest.read_at_m if rescale and resize is None else None
        self._unknown_told = False
        self.intensity_range = range_of(self.manifest.intensity) if window is None else window
        self._inference = Inference(engine, mode, resize, intervals)
        self._contract = self._inference.contract
        check_tile(tile, self._contract, resize)
        has_logits, output = self._inference.gives_logits, engine.manifest.output
        if mode != "single" and not has_logits:
            raise ContractError(
                f"mode {mode!r} averages class scores, but model {self.manifest.name!r} gives labels only; "
                "export it with logits output, or use mode 'single'"
            )
        if confidence and not has_logits and not (output is not None and output.confidence):
            raise ContractError(
                f"model {self.manifest.name!r} gives no confidence; export it with a confidence map or logits output"
            )
        if intervals and not has_logits:
            raise ContractError(
                f"model {self.manifest.name!r} gives labels only: without class scores there is no interval of a "
                "fraction; use the ONNX file, or export it with logits output"
            )
        self.confidence, self.intervals = confidence, intervals
        self.batch_size = min(batch_size, self._contract.batch.maximum or batch_size)
        self.model_sha256, self._scores, self._runtime = model_sha256, scores, engine.runtime
        self._next: Segmenter | None = None  # on a newer version of the same model, which a service has

    @property
    def knows_its_domain(self) -> bool:
        """Whether results say how far a picture is from those of the training."""
        output = self.manifest.output
        return self.manifest.domain is not None and output is not None and output.domain

    def with_mode(self, mode: Mode) -> Segmenter:
        """A segmenter on the same engine with another mode."""
        return self._with(mode=mode)

    def taking_8_bits(self) -> Segmenter:
        """A segmenter on the same engine for images that are in the model's intensity range already."""
        return self._with(window=FullScale())

    @property
    def gives_scores(self) -> bool:
        """Whether labels come from class scores on the host, so that these cost nothing more."""
        return self._inference.gives_logits

    def with_intervals(self) -> Segmenter:
        """A segmenter on the same engine whose results have ``sampled_scores``; :class:`ContractError` without any."""
        return self._with(intervals=True)

    def _with(self, **changes: Any) -> Segmenter:
        same: dict[str, Any] = {
            "engine": self.engine, "mode": self.mode, "resize": self.resize, "rescale": self.rescale,
            "confidence": self.confidence, "intervals": self.intervals, "window": self.window,
            "batch_size": self.batch_size, "tile": self.tile, "model_sha256": self.model_sha256, "scores": self._scores,
        }  # fmt: skip
        return Segmenter(**{**same, **changes})

    def _now(self, *, at_once: bool = False) -> Segmenter:
        """This one, or one on the version that a service has of the model now: so each picture is of one version."""
        newest = getattr(self.engine, "newest", None)  # of engines that ask a service
        if newest is None:
            return self
        if (engine := newest(at_once=at_once)) is self.engine:
            return self
        if (now := self._next) is None or now.engine is not engine:
            now = self._next = self._with(engine=engine, model_sha256=engine.sha256, scores=_scores_of(engine))
        return now

    def _following(self, run: Callable[[Segmenter], Done]) -> Done:
        """What ``run`` does with :meth:`_now`, once more where its version has gone meanwhile."""
        try:
            return run(self._now())
        except ModelReplaced:
            return run(self._now(at_once=True))

    def segment(
        self,
        image: Image,
        out: npt.NDArray[np.uint8] | None = None,
        *,
        progress: Progress | None = None,
        stream: Any = None,
    ) -> Segmentation:
        """Segment one image: a :class:`Micrograph` or an array ``[H, W]`` of uint8, uint16 or float.

        A model with three float channels also takes RGB uint8 ``[H, W, 3]``. Arrays of any layout and byte
        order; those of other libraries in the host's memory through DLPack. A contiguous uint8 array of a size that the
        model takes reaches the engine without a copy. So does a uint8 array on a GPU (DLPack, CUDA array
        interface), where the engine is TensorRT's on that GPU.

        ``out``: uint8 ``[H, W]`` on the host that takes the labels; it is then the result's ``labels``. It must not
        share memory with the image. ``progress(done, of)`` is called in this thread after every tile, after
        a whole image once. What it raises ends the inference and comes through; ``out`` is then incomplete,
        and the segmenter stays usable. The same holds for Ctrl-C.

        Raises :class:`ContractError` for any other array, an empty one, or one with NaN.
        """
        result = self._following(lambda now: now._segment(image, out, progress, stream))
        if progress is not None and result.tiling is None:
            progress(1, 1)
        return result

    def _segment(
        self, image: Image, out: npt.NDArray[np.uint8] | None, progress: Progress | None, stream: Any
    ) -> Segmentation:
        micrograph = self._micrograph(image)
        if on_device(micrograph.pixels):
            return self._segment_on_device(micrograph, out, stream)
        if stream is not None:
            raise UsageError("stream goes with an image on a GPU, and this one is in the host's memory; leave it out")
        frame = to_frame(micrograph.pixels, self._contract.channels, self.intensity_range)
        if out is not None:
            check_out(out, frame.pixels.shape[:2], frame.pixels)
        return self._segment_frame(frame, micrograph, out, progress)

    def segment_batch(self, images: Sequence[Image]) -> list[Segmentation]:
        """Segment several images, equally sized whole ones together; results in the order given."""
        return self._following(lambda now: now._segment_batch(images))

    def _segment_batch(self, images: Sequence[Image]) -> list[Segmentation]:
        results: dict[int, Segmentation] = {}
        waiting: dict[int, Frame] = {}
        scales: dict[int, Rescaling] = {}
        micrographs = [self._micrograph(image) for image in images]
        for index, micrograph in enumerate(micrographs):
            if on_device(micrograph.pixels):
                results[index] = self._segment_on_device(micrograph, None, None)
            else:
                waiting[index] = to_frame(micrograph.pixels, self._contract.channels, self.intensity_range)
                scales[index] = self._rescaling(micrograph, waiting[index].pixels.shape)
        for indices in _groups(waiting, scales, self.batch_size):
            frames = [waiting[index].pixels for index in indices]
            inference = self._inference.enlarging(scales[indices[0]].factor)
            if len(frames) == 1 or plan_for(inference, self.tile, *frames[0].shape[:2]) is not None:
                for index in indices:
                    results[index] = self._segment_frame(waiting[index], micrographs[index], None, None)
            else:
                outputs = inference.labels(frames, self.confidence)
                for index, output in zip(indices, outputs, strict=True):
                    results[index] = self._result(output, waiting[index], micrographs[index], scales[index])
        return [results[index] for index in range(len(images))]

    def segment_many(
        self, images: Iterable[Image], *, progress: Progress | None = None
    ) -> Generator[Segmentation | UserError | MemoryError]:
        """Segment images as they come: results in the order given, and as :meth:`segment` gives them.

        As many are in flight as suits the engine, so ``images`` is asked for more before the first result is there.
        An image that cannot be segmented gives its error in place of a result, and the others go on.
        ``progress(done, of)`` is called after every tile of a large image.
        """
        prepared = map(self._prepared, images)
        for (together, factor), run in groupby(prepared, key=lambda one: (one.together, one.scale.factor)):
            if together:
                yield from self._segment_together(run, factor, progress)
            else:
                yield from (self._segment_prepared(one, progress) for one in run)

    def class_scores(self, image: Image, *, progress: Progress | None = None) -> npt.NDArray[np.float32]:
        """Class probabilities ``[C, H, W]`` of one image on the host, averaged over the mode's views.

        Needs logits output, or the shipped ONNX form of a model with labels output. All of them are held
        in memory, twice for a moment, 4 bytes per class and pixel: 0.8 GB for three classes at 8192 x 8192, for which
        :meth:`segment` needs a fraction.

        Raises :class:`ContractError` as :meth:`segment` does, :class:`UserError` for scores that are NaN.
        """
        return self._following(lambda now: now._class_scores(image, progress))

    def _class_scores(self, image: Image, progress: Progress | None) -> npt.NDArray[np.float32]:
        inference = self.of_tiles()
        if not inference.gives_logits:
            raise ContractError(f"model {self.manifest.name!r} gives labels only; export it with logits output")
        micrograph = self._micrograph(image)
        pixels = to_frame(micrograph.pixels, self._contract.channels, self.intensity_range).pixels
        enlarging = inference.enlarging(self._rescaling(micrograph, pixels.shape).factor)
        plan = plan_for(enlarging, self.tile, *pixels.shape[:2])
        if plan is None:
            return enlarging.probabilities([pixels])[0]
        return scores_tiled(inference, pixels, plan, progress)

    def close(self) -> None:
        """Close the engine; calling it again does nothing."""
        if self._scores is not None:
            self._scores.close()
        self.engine.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- parts -----------------------------------------------------------------------------------

    def _micrograph(self, image: Any) -> Micrograph:
        if not isinstance(image, Micrograph):
            return Micrograph(image)
        if image.pixel_size_m is None and self._trained_at is not None and not self._unknown_told:
            self._unknown_told = True
            logger.warning(
                "the model was trained at %s, and micrographs come without a pixel size: these are read as they are; "
                "give the pixel size, or mind what is said of their domain", in_words(self._trained_at),
            )  # fmt: skip
        return image

    def _rescaling(self, micrograph: Micrograph, shape: tuple[int, ...]) -> Rescaling:
        if self._trained_at is None:
            return Rescaling()
        return rescaling(micrograph.pixel_size_m, self._trained_at, (shape[0], shape[1]))

    def _prepared(self, image: Image) -> _Prepared:
        micrograph = self._micrograph(image)
        if on_device(micrograph.pixels):
            return _Prepared(micrograph)
        try:
            frame = to_frame(micrograph.pixels, self._contract.channels, self.intensity_range)
            scale = self._rescaling(micrograph, frame.pixels.shape)
            whole = plan_for(self._inference.enlarging(scale.factor), self.tile, *frame.pixels.shape[:2]) is None
        except (UserError, MemoryError) as exc:
            return _Prepared(micrograph, error=exc)
        return _Prepared(micrograph, frame, whole and self.mode == "single", scale=scale)

    def _segment_prepared(
        self, one: _Prepared, progress: Progress | None
    ) -> Segmentation | UserError | MemoryError:
        try:
            if one.frame is None:
                return one.error or self.segment(one.micrograph)
            frame, micrograph = one.frame, one.micrograph
            return self._following(lambda now: now._segment_frame(frame, micrograph, None, progress))
        except (UserError, MemoryError) as exc:
            return exc

    def _segment_together(
        self, run: Iterator[_Prepared], factor: float | None, progress: Progress | None
    ) -> Generator[Segmentation | UserError | MemoryError]:
        """Whole images, several in flight; where one fails, those in flight are done again one by one."""
        first = list(islice(run, 2))
        if len(first) == 1:  # nothing to run beside it
            yield self._segment_prepared(first[0], progress)
            return
        source = chain(first, run)
        in_flight: deque[_Prepared] = deque()
        broken = False  # whether the source is

        def pixels() -> Iterator[npt.NDArray[np.uint8]]:
            nonlocal broken
            broken = True
            for one in source:
                broken = False
                in_flight.append(one)
                assert one.frame is not None  # that of a whole image
                yield one.frame.pixels
                broken = True
            broken = False

        while True:
            try:
                now = self._now()
                inference = now._inference.enlarging(factor)
                with closing(inference.labels_of_each(pixels(), self.confidence)) as outputs:
                    for output in outputs:
                        one = in_flight.popleft()
                        assert one.frame is not None
                        yield now._result(output, one.frame, one.micrograph, one.scale)
                return
            except (UserError, MemoryError):
                if broken:
                    raise
                if not in_flight:  # a service has no such model any more: the next image says so
                    in_flight.extend(islice(source, 1))
                    if not in_flight:
                        return
            while in_flight:
                yield self._segment_prepared(in_flight.popleft(), progress)

    def _segment_frame(
        self, frame: Frame, micrograph: Micrograph, out: npt.NDArray[np.uint8] | None, progress: Progress | None
    ) -> Segmentation:
        shape = frame.pixels.shape[:2]
        scale = self._rescaling(micrograph, shape)
        inference = self._inference.enlarging(scale.factor)
        plan = plan_for(inference, self.tile, *shape)
        if plan is None:
            (output,) = inference.labels([frame.pixels], self.confidence, out)
            return self._result(output, frame, micrograph, scale)
        labels = np.empty(shape, dtype=np.uint8) if out is None else out
        confidence = np.empty(shape, dtype=np.float32) if self.confidence else None
        pictures = tile_pictures(frame.pixels, plan)
        certain = None if confidence is None else Plane(confidence, plan, shape)
        done = segment_tiled(self.of_tiles(), plan.whole, pictures, Plane(labels, plan, shape), certain, progress)
        output = InferenceOutput(labels, confidence=confidence, sampled=done.sampled)
        report = plan.report(done.method, done.seams)
        return self._result(output, frame, micrograph, scale, report, done.features)

    def of_tiles(self) -> Inference:
        """The model as tiles are run: with class scores, where it has them."""
        if self._inference.gives_logits or self._scores is None:
            return self._inference
        engine = self._scores.engine()
        return self._inference if engine is None else Inference(engine, self.mode, self.resize)

    def _segment_on_device(
        self, micrograph: Micrograph, out: npt.NDArray[np.uint8] | None, stream: Any
    ) -> Segmentation:
        """An image that is on the engine's GPU already and fits the model as it is."""
        kind = type(micrograph.pixels).__name__
        if not hasattr(self.engine, "infer_device"):
            raise ContractError(
                f"the image is a {kind} on a GPU, which {self._runtime} does not read; copy it to the host first"
            )
        as_it_is = isinstance(self.intensity_range, FullScale) and self.intensity_range.whole
        if self.mode != "single" or self.resize is not None or not as_it_is:
            raise ContractError(
                f"the image is a {kind} on a GPU, where it runs as it is: without mode, resize and window; "
                "copy it to the host for those"
            )
        batch, shape = device_batch(micrograph.pixels)
        check_shape((1, 1, *shape), self._contract)
        if out is not None:
            check_out(out, shape, None)
        output = self._inference.labels_on_device(batch, self.confidence, out, stream)
        scale = self._rescaling(micrograph, shape)
        if scale.factor not in (None, 1.0):
            assert self._trained_at is not None  # there is a factor
            about = f"the model was trained at {in_words(self._trained_at)}; copy the image to the host to rescale it"
            scale = Rescaling(None, f"an image on a GPU is read as it is, and {about}")
        return self._result(output, Frame(output.labels, (0.0, 255.0)), micrograph, scale)

    def _result(
        self,
        output: InferenceOutput,
        frame: Frame,
        micrograph: Micrograph,
        scale: Rescaling,
        tiling: TilingReport | None = None,
        features: Sequence[npt.NDArray[np.float32] | None] = (),
    ) -> Segmentation:
        """``features``: of the domain, of each tile; else those of ``output``."""
        provenance = Provenance(
            model=self.manifest.name,
            model_sha256=self.model_sha256,
            checkpoint_sha256=self.manifest.checkpoint_sha256,
            engine=self._runtime,
            precision=self.engine.arithmetic,
            version=__version__,
            mode=self.mode,
            window=frame.window,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        return Segmentation(
            labels=output.labels,
            manifest=self.manifest,
            confidence=output.confidence,
            window=frame.window,
            remarks=frame.remarks if scale.remark is None else (*frame.remarks, scale.remark),
            pixel_size_m=micrograph.pixel_size_m,
            rescale=scale.factor,
            source=micrograph.source,
            provenance=provenance,
            tiling=tiling,
            domain=domain_of(features or [output.domain_features], self.manifest.domain),
            sampled_scores=output.sampled,
        )


def load_segmenter(
    model_path: str | Path,
    *,
    engine: str = "auto",
    precision: Arithmetic = "auto",
    threads: int | None = None,
    device: str | int | None = None,
    mode: Mode = "single",
    resize: tuple[int, int] | None = None,
    rescale: bool = True,
    confidence: bool = False,
    intervals: bool | None = False,
    window: IntensityRange = None,
    batch_size: int = 4,
    tile: Tile = "auto",
    rebuild: bool = False,
    **options: Any,
) -> Segmenter:
    """Open a model (:func:`~hpddrnet_trt.engines.load_engine`) and wrap it as a :class:`Segmenter`.

    - ``model_path``: a file, the name of a model that comes with the package, such as ``nasa-super1``, or the address
      of one on a Triton server, ``triton://host:8001/model`` (docs/service.md).
    - ``engine``: a name in :data:`~hpddrnet_trt.engines.ENGINES`, or ``auto``.
    - ``precision``: what labels are computed in. ``auto``: of an ONNX file the fastest way that keeps the labels on
      this processor, as :mod:`hpddrnet_trt.engines.choice` finds it; ``file``: what the file is in; or one of them
      (``fp32``, ``bf16``, ``int8``). The result's provenance says what it was.
    - ``threads``: CPU threads of one inference (default: the engine's choice); not for TensorRT.
    - ``device``: ``cpu``, ``cuda``, ``cuda:1`` or a GPU's number, where the engine can choose.
    - ``rebuild``: an engine file for another version of TensorRT or another GPU, which else is an
      :class:`EngineDoesNotFit`, is built again first (:func:`hpddrnet_trt.rebuild_engine`), which takes minutes.
    - ``intervals``: None: where the model's description and the engine allow it.
    - ``options``: others of the engine's class.

    The rest is :class:`Segmenter`'s. An ONNX file with labels output is opened a second time with class scores as
    output when these are needed: for other modes than ``single``, for ``confidence`` and ``intervals``, and to blend
    the tiles of large images. Other models without logits (TensorRT engines with labels output) refuse the first three,
    and their tiles are cut.
    """
    opening = opening_of(model_path, engine, precision, {"threads": threads, "device": device, **options})
    try:
        loaded = opening.open()
    except EngineDoesNotFit:
        if not rebuild:
            raise
        logger.warning("%s does not fit this machine any more and is built again, which takes minutes", model_path)
        hpddrnet_trt.rebuild_engine(model_path)
        loaded = opening.open()
    try:
        record = loaded.manifest.engine
        if is_address(opening.path):
            checksum = getattr(loaded, "sha256", None)
        else:
            checksum = sha256_of(opening.path) if record is None else record.sha256
        output = loaded.manifest.output
        scores = _scores_of(loaded, opening.open)
        wanted = loaded.manifest.fraction_errors is not None if intervals is None else intervals
        if scores is not None:
            assert output is not None  # that of labels
            needed = mode != "single" or wanted or (confidence and not output.confidence)
            if needed and (with_scores := scores.engine()) is not None:
                if not is_address(opening.path):  # there both are closed together
                    loaded.close()
                loaded = with_scores
        output = loaded.manifest.output
        if intervals is None:
            wanted = wanted and output is not None and output.kind == "logits"
        return Segmenter(
            loaded, mode=mode, resize=resize, rescale=rescale, confidence=confidence, intervals=wanted, window=window,
            batch_size=batch_size, tile=tile, model_sha256=checksum, scores=scores,
        )  # fmt: skip
    except BaseException:
        loaded.close()
        raise


def _scores_of(engine: Engine, open_engine: Callable[[Path], Engine] | None = None) -> ScoresModel | None:
    """Where an engine that gives labels has class scores: beside it on its server, or in its ONNX file."""
    output = engine.manifest.output
    if output is None or output.kind != "labels":
        return None
    if (find := getattr(engine, "scores", None)) is not None:  # on its server
        return ScoresModel(lambda _: find())
    path = getattr(engine, "path", None)  # of the engines that run ONNX files
    return None if path is None or open_engine is None else scores_of_file(path, engine.manifest, open_engine)


class _Prepared(NamedTuple):
    """An image of :meth:`Segmenter.segment_many`: as a frame, or why it is none. ``together``: runs whole, in one view,
    beside others. On a GPU it has no frame."""

    micrograph: Micrograph
    frame: Frame | None = None
    together: bool = False
    error: UserError | MemoryError | None = None
    scale: Rescaling = Rescaling()


def _groups(frames: Mapping[int, Frame], scales: Mapping[int, Rescaling], size: int) -> Iterator[list[int]]:
    """Keys of frames of one shape and magnification, at most ``size`` at a time."""
    equal: dict[Any, list[int]] = {}
    for index, frame in frames.items():
        equal.setdefault((frame.pixels.shape, scales[index].factor), []).append(index)
    for indices in equal.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
