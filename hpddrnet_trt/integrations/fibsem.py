"""OpenFIBSEM (``fibsem`` 0.5): live segmentation of acquired images, and a model for its feature detection.

https://github.com/DeMarcoLab/fibsem (MIT). :class:`LiveSegmentation` needs nothing but a microscope
object and never imports fibsem; :class:`FibsemSegmentationModel` imports it when it draws a mask.

What was read in fibsem 0.5.3, and why the code here looks as it does:

- ``sem_acquisition_signal`` and ``fib_acquisition_signal`` are psygnal signals. Slots run one after
  another on the thread that emits: the acquisition thread of ``start_acquisition``, or the one that mills
  (``acquire_image`` alone emits nothing). The driver for Thermo Fisher emits while it holds the lock that
  guards every other call to the microscope, so a slow slot stalls more than the image. A slot that raises
  ends the acquisition, with no more than a line in the log.
- psygnal holds bound methods weakly: a :class:`LiveSegmentation` that nobody keeps is disconnected.
- ``detect_features`` takes the feature's pixel as found where there is none: (0, 0), or the centre of the
  image for the lamella. A model that lacks a class therefore answers wrongly without a word, and the
  stage may be moved by it: see :meth:`FibsemSegmentationModel.check_features`.
- ``detect_features`` never reads the pixel size of the image it is given: without its argument
  ``pixelsize`` distances are in units of 25 nm pixels, whatever the image's metadata say.
- ``fibsem.segmentation.model`` and ``.utils`` import PyTorch; ``fibsem.detection.detection`` does without,
  if masks have three dimensions.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import tifffile

from hpddrnet_trt.core.errors import ContractError, UsageError, describe, require
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.core.text import is_square
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.inference import Segmenter, load_segmenter

if TYPE_CHECKING:
    from hpddrnet_trt.stream import Stream

log = logging.getLogger(__name__)

Beam = Literal["electron", "ion"]
SIGNALS: Mapping[str, str] = {"electron": "sem_acquisition_signal", "ion": "fib_acquisition_signal"}

# The class that each feature of fibsem.detection.detection looks for, by its place in fibsem's
# segmentation_config.yaml: 1 lamella, 2 manipulator, 3 landing post, 4 copper adaptor, 5 volume block.
FEATURE_CLASSES: Mapping[str, int | None] = {
    "ImageCentre": None,
    "NeedleTip": 2, "NeedleTipBottom": 2, "AdaptiveLamellaCentre": 2,
    "LamellaCentre": 1, "LamellaLeftEdge": 1, "LamellaRightEdge": 1, "LamellaTopEdge": 1, "LamellaBottomEdge": 1,
    "CoreFeature": 1,
    "LandingPost": 3, "LandingGridCentre": 3, "LandingGridLeftEdge": 3, "LandingGridRightEdge": 3,
    "CopperAdapterCentre": 4, "CopperAdapterTopEdge": 4, "CopperAdapterBottomEdge": 4,
    "VolumeBlockCentre": 5, "VolumeBlockTopEdge": 5, "VolumeBlockBottomEdge": 5, "VolumeBlockTopLeftCorner": 5,
    "VolumeBlockTopRightCorner": 5, "VolumeBlockBottomLeftCorner": 5, "VolumeBlockBottomRightCorner": 5,
}  # fmt: skip


def pixel_size_m(image: Any) -> float | None:
    """Metres per pixel of a ``FibsemImage``, or None when unknown.

    Unknown is: no metadata, not a positive finite number, or pixels that are not square
    (one number cannot say it, and areas would be wrong).
    """
    size = getattr(getattr(image, "metadata", None), "pixel_size", None)
    if size is None:
        return None
    try:
        x, y = float(size.x), float(size.y)
    except (AttributeError, TypeError, ValueError):
        return None
    if not (math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0 and is_square(x, y)):
        return None
    return x


@dataclass(frozen=True)
class FrameTag:
    """Comes back with the result as its ``tag``: where a frame is from.

    ``beam``: "electron" or "ion", by the signal that brought it. ``acquired_s``: POSIX seconds at which the
    microscope's state was read for this frame, None when its metadata do not say.
    """

    beam: Beam
    acquired_s: float | None


class LiveSegmentation:
    """Feeds every image that an OpenFIBSEM microscope emits to a :class:`~hpddrnet_trt.stream.Stream`.

    ``microscope``: any ``FibsemMicroscope``. ``beams``: whose images. ``copy=False`` saves a copy of each
    frame, 0.01 ms at 512 x 512, where no other slot writes into it (fibsem makes a new array for every image).

    The slot only enqueues and never raises, whatever arrives and whatever state the stream is in; use the
    stream's policy ``latest`` or ``reject``, since ``block`` would hold the microscope. ``errors``
    counts what was no image, ``last_error`` says why; all else is in the stream's statistics. The stream
    is the caller's: disconnecting does not close it. Keep a reference, or use it as a context manager.

    Raises :class:`UsageError` for an unknown beam, or a microscope without that signal.
    """

    def __init__(
        self, stream: Stream, microscope: Any, *, beams: Iterable[Beam] = ("electron",), copy: bool = True
    ) -> None:
        self._stream, self._copy = stream, copy
        self._signals: dict[Beam, Any] = {}
        for beam in beams:
            if beam not in SIGNALS:
                raise UsageError(f"unknown beam {beam!r}; choose from: {', '.join(SIGNALS)}")
            signal = getattr(microscope, SIGNALS[beam], None)
            if signal is None:
                raise UsageError(
                    f"{type(microscope).__name__} has no {SIGNALS[beam]}; give a microscope of OpenFIBSEM 0.5"
                )
            self._signals[beam] = signal
        self._lock = threading.Lock()  # both beams may emit at a time
        self.errors = 0
        self.last_error: str | None = None

    def connect(self) -> None:
        """Take every image from now on; calling it again does nothing."""
        for beam, signal in self._signals.items():
            signal.connect(self._slot(beam), unique=True)

    def disconnect(self) -> None:
        """Take no more images. Calling it again does nothing; an emission under way ends first."""
        for beam, signal in self._signals.items():
            signal.disconnect(self._slot(beam), missing_ok=True)

    def __enter__(self) -> LiveSegmentation:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()

    def _slot(self, beam: Beam) -> Callable[[Any], None]:
        return self._electron if beam == "electron" else self._ion

    def _electron(self, image: Any) -> None:
        self._take(image, "electron")

    def _ion(self, image: Any) -> None:
        self._take(image, "ion")

    def _take(self, image: Any, beam: Beam) -> None:
        try:
            size = pixel_size_m(image)
            frame = Micrograph(
                image.data,
                pixel_size_m=size,
                pixel_size_source=None if size is None else "OpenFIBSEM",
                vendor=_vendor(image),
            )
            self._stream.submit(frame, FrameTag(beam, _acquired(image)), copy=self._copy)
        except Exception as exc:  # whatever it is, it must not end the acquisition
            with self._lock:
                self.errors += 1
                first = self.errors == 1
                self.last_error = describe(exc)
            if first:
                log.exception("an image of the %s beam could not be taken; more of them are only counted", beam)


def _acquired(image: Any) -> float | None:
    stamp = getattr(getattr(getattr(image, "metadata", None), "microscope_state", None), "timestamp", None)
    return float(stamp) if isinstance(stamp, int | float) and math.isfinite(stamp) else None


def _vendor(image: Any) -> str | None:
    maker = getattr(getattr(getattr(image, "metadata", None), "system_info", None), "manufacturer", None)
    return maker if isinstance(maker, str) and maker else None


def replay_microscope(pictures: Sequence[npt.NDArray[Any]], folder: str | Path, *, pixel_size_m: float = 1e-8) -> Any:
    """OpenFIBSEM's simulated microscope, connected, showing ``pictures`` by turns on both beams.

    ``pictures``: uint8 ``[H, W]`` of one size, which becomes the resolution of both beams; ``pixel_size_m``
    sets their fields of view. The simulation reads TIFF files for each frame anew: they are written to
    ``folder``, which must stay as long as the microscope is used, and hold no other TIFF files. The frame rate is
    that of the simulated dwell time; with ``FIBSEM_SIM_NO_DELAY=1`` in the environment, what the processor can do.

    Raises :class:`UsageError` for pictures that differ in size or are not uint8.
    """
    if not pictures or any(each.shape != pictures[0].shape or each.dtype != np.uint8 for each in pictures):
        raise UsageError("the simulated microscope shows 8-bit pictures of one size; give at least one, all alike")
    simulator = require("fibsem.microscopes.simulator", "fibsem", "simulate a microscope")
    from fibsem import utils
    from fibsem.structures import BeamType

    for number, picture in enumerate(pictures):
        tifffile.imwrite(Path(folder) / f"{number:04}.tif", picture)
    settings = utils.load_microscope_configuration()
    settings.system.sim = {**(settings.system.sim or {}), "sem": str(folder), "fib": str(folder), "use_cycle": True}
    microscope = simulator.DemoMicroscope(settings.system)
    microscope.connect_to_microscope("localhost")
    height, width = pictures[0].shape
    for beam in (BeamType.ELECTRON, BeamType.ION):
        microscope.set_resolution((width, height), beam)
        microscope.set_field_of_view(width * pixel_size_m, beam)
    return microscope


class FibsemSegmentationModel:
    """A model of ours in the place of fibsem's ``SegmentationModel``, for ``detect_features``.

    ``checkpoint``: a model file or the name of a shipped model, see :func:`~hpddrnet_trt.load_segmenter`,
    which also takes ``engine`` and ``options``. ``class_map``: for **each** class of the model by name, the
    number of the class in fibsem (0 background, 1 lamella, 2 manipulator, 3 landing post, 4 copper adaptor,
    5 volume block, unless the installation's ``segmentation_config.yaml`` says otherwise). Several classes
    may share a number.

    Grey levels are treated as in training, by the model itself. Not so in fibsem's own loader of ONNX files,
    which divides by 255 or standardises locally and takes a file of ours without complaint: hand this
    object to ``detect_features`` instead. ``take_image_and_detect_features`` loads its model by name and
    cannot take it.

    Raises :class:`UsageError` when ``class_map`` does not fit the model or fibsem's numbers.
    """

    def __init__(
        self, checkpoint: str | Path, class_map: Mapping[str, int], *, engine: str = "auto", **options: Any
    ) -> None:
        self.class_map = dict(class_map)
        self._engine, self._options = engine, options
        self._segmenter: Segmenter | None = None
        self.load_model(checkpoint)

    def load_model(self, checkpoint: str | Path) -> Segmenter:
        """Open a model in place of the present one, which is kept when the new one does not fit."""
        segmenter = load_segmenter(checkpoint, engine=self._engine, **self._options)
        try:
            table = _class_table(segmenter.manifest.classes, self.class_map)
        except BaseException:
            segmenter.close()
            raise
        self.close()
        self._segmenter, self._table = segmenter, table
        self.checkpoint = str(checkpoint)
        return segmenter

    @property
    def segmenter(self) -> Segmenter:
        """The open model; raises :class:`UsageError` when it is closed."""
        if self._segmenter is None:
            raise UsageError(f"model {self.checkpoint} is closed; call load_model first")
        return self._segmenter

    @property
    def num_classes(self) -> int:
        """One more than the highest number that masks hold."""
        return int(self._table.max()) + 1

    @property
    def device(self) -> str:
        """Runtime and device, for people; fibsem prints it."""
        return self.segmenter.engine.runtime

    def inference(self, img: npt.NDArray[Any], rgb: bool = True) -> npt.NDArray[np.uint8]:
        """Segment a grey image ``[H, W]``, or several ``[N, H, W]``, uint8 or uint16.

        Returns fibsem's class numbers, uint8 ``[N, H, W]`` with N = 1 for one image, as fibsem's own model
        does; with ``rgb`` what :meth:`postprocess` makes of them. Raises :class:`ContractError` otherwise.
        """
        images = [img] if np.ndim(img) == 2 else list(img) if np.ndim(img) == 3 else []
        if not images:
            raise ContractError(f"expected a grey image [H, W] or several [N, H, W], got shape {np.shape(img)}")
        found = self.segmenter.segment_batch(images)
        masks = np.stack([self._table[result.labels] for result in found])
        return self.postprocess(masks, self.num_classes) if rgb else masks

    def postprocess(self, masks: npt.NDArray[Any], nc: int | None = None) -> npt.NDArray[np.uint8]:
        """Masks ``[N, H, W]`` or ``[H, W]`` in fibsem's class colours: RGB ``[H, W, 3]``, ``[N, H, W, 3]`` for N > 1.

        ``nc`` is what fibsem passes along, ``num_classes``; the colours do not depend on it.
        """
        coloured = np.asarray(_colours(), np.uint8)[np.asarray(masks)]
        return coloured[0] if coloured.ndim == 4 and len(coloured) == 1 else coloured

    def check_features(self, features: Iterable[Any]) -> None:
        """Raise :class:`UsageError` unless the model can find each of fibsem's ``features``.

        ``detect_features`` itself does not notice: it then says that a feature is at (0, 0).
        """
        given = set(self._table.tolist())
        for feature in features:
            name = type(feature).__name__
            if name not in FEATURE_CLASSES:
                raise UsageError(f"{name} is not a feature of fibsem 0.5; known are: {', '.join(FEATURE_CLASSES)}")
            needed = FEATURE_CLASSES[name]
            if needed is not None and needed not in given:
                raise UsageError(
                    f"{name} is found by class {needed} of fibsem, and no class of model {self.checkpoint} is mapped "
                    f"to it (class_map = {self.class_map}); map one, or use a model that was trained for it"
                )

    def close(self) -> None:
        """Close the model; calling it again does nothing."""
        if self._segmenter is not None:
            self._segmenter.close()
            self._segmenter = None

    def __enter__(self) -> FibsemSegmentationModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _class_table(classes: list[ClassInfo], class_map: Mapping[str, int]) -> npt.NDArray[np.uint8]:
    """fibsem's number of each class of the model, uint8 ``[C]``."""
    names = [entry.name for entry in classes]
    unknown = [name for name in class_map if name not in names]
    missing = [name for name in names if name not in class_map]
    if unknown or missing:
        wrong = [f"it has no class {name!r}" for name in unknown]
        wrong += [f"its class {name!r} has no number (0 is fibsem's background)" for name in missing]
        raise UsageError(f"class_map does not fit the model, whose classes are {', '.join(names)}: {'; '.join(wrong)}")
    known = len(_colours())
    for name, number in class_map.items():
        if not isinstance(number, int) or not 0 <= number < known:
            raise UsageError(f"class_map maps {name!r} to {number!r}; fibsem's classes are numbered 0 to {known - 1}")
    return np.asarray([class_map[name] for name in names], np.uint8)


def _colours() -> list[tuple[int, int, int]]:
    """fibsem's colour of each class, RGB 0..255 (a module that needs no PyTorch)."""
    config = require("fibsem.segmentation.config", "fibsem", "number and colour classes as OpenFIBSEM does")
    return list(config.CLASS_COLORS_RGB)
