"""Micro-Manager beside a model: frames of an MDA go to a :class:`~hpddrnet_trt.stream.Stream`.

Written for ``pymmcore-plus`` 0.18 (``pip install 'hpddrnet-trt[micromanager]'``)::

    with Stream(partial(load_segmenter, "nasa-super1"), on_result=show) as stream, MicroManagerFeed(core, stream):
        core.run_mda(sequence).join()

Not ours: fetching live frames. A live view (``startContinuousSequenceAcquisition``) fills Micro-Manager's circular
buffer and raises no event per frame; whoever shows it takes frames out with a timer, and a second reader would steal
them. That timer calls :meth:`MicroManagerFeed.submit` with the frame it has.

End of a program: call ``core.unloadAllDevices()`` and let go of the core (keep it inside a function, or ``del core``).
One that is still referenced when the interpreter ends can abort it: its event thread lives until the core is deleted.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, describe, require
from hpddrnet_trt.core.text import METRES, SQUARE_MEASURED, is_square, micrometres
from hpddrnet_trt.data.micrograph import Micrograph, luminance

if TYPE_CHECKING:
    from pymmcore_plus import CMMCorePlus

    from hpddrnet_trt.stream import Stream

LOG = logging.getLogger(__name__)

AGREES = 0.05  # a pixel size and its affine matrix that differ by more contradict each other
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # Micro-Manager's matrix when nobody calibrated one
_COLOUR_REMARK = "a colour frame: its luminance is used"


@dataclass(frozen=True)
class FrameTag:
    """Which frame of an acquisition a result belongs to.

    ``index``: position on each axis of the MDA, such as ``{"t": 3, "c": 0}`` (``"cam"`` with several cameras).
    ``time_s``: seconds from the start of the sequence to the frame, as Micro-Manager measured it; None when it did
    not. ``camera``: its label. ``event``: the ``useq.MDAEvent`` that asked for the frame.
    """

    index: Mapping[str, int]
    time_s: float | None
    camera: str | None
    event: Any


class MicroManagerFeed:
    """Hands every frame of ``core.mda`` to ``stream`` while connected; use it as a context manager.

    ``frameReady`` is emitted on the thread that acquires, which waits for its listeners: this one enqueues and
    returns. It never raises, because an error in one listener hides the frame from those after it. What it could not
    hand over is counted in ``errors`` and told by ``last_error``; what the stream drops or fails is in
    ``stream.statistics()``. Give the stream the policy ``latest`` or ``reject``: with ``block`` a full queue stops the
    MDA, and a camera that runs on meanwhile overflows Micro-Manager's buffer, which ends the sequence.

    Frames are uint8 or uint16 ``[H, W]``; RGB frames ``[H, W, 3]`` are sent as luminance. Others (32-bit cameras)
    come back as failed results that say so. Pixel size: see :func:`pixel_size_m`.
    """

    def __init__(self, core: CMMCorePlus, stream: Stream) -> None:
        self._core, self._stream = core, stream
        self._slot: Callable[..., None] | None = None
        self.errors = 0
        self.last_error: str | None = None

    def connect(self) -> MicroManagerFeed:
        """Start listening; does nothing when already connected. The signal keeps this object alive."""
        if self._slot is None:

            # A function, because psygnal refers weakly to bound methods: a feed that nobody keeps would fall silent.
            def slot(image: npt.NDArray[Any], event: Any, metadata: Mapping[str, Any]) -> None:
                self._hand_over(image, None, (event, metadata))

            on_emitting_thread(self._core.mda.events.frameReady, slot)
            self._slot = slot
        return self

    def disconnect(self) -> None:
        """Stop listening; does nothing when not connected. The stream stays open."""
        if self._slot is not None:
            slot, self._slot = self._slot, None
            self._core.mda.events.frameReady.disconnect(slot)

    def __enter__(self) -> MicroManagerFeed:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()

    def submit(self, image: npt.NDArray[Any], tag: Any = None) -> int | None:
        """Enqueue one frame that you took from the core yourself (a snap, a live view), with its pixel size.

        Returns the stream's frame number, None when the frame was not taken. Never raises.
        """
        return self._hand_over(image, tag, None)

    def _hand_over(
        self, image: npt.NDArray[Any], tag: Any, acquired: tuple[Any, Mapping[str, Any]] | None
    ) -> int | None:
        try:
            metadata = acquired[1] if acquired else None
            frame = _grey(image, pixel_size_m(self._core, metadata))
            # The luminance is an array of our own; the frame itself belongs to every listener.
            return self._stream.submit(frame, _tag(*acquired) if acquired else tag, copy=frame.pixels is image)
        except Exception as exc:  # whatever it is, it must not reach the acquisition
            self.errors += 1
            self.last_error = describe(exc)
            if self.errors == 1:
                LOG.exception("a Micro-Manager frame could not be handed to the stream; later ones are only counted")
            return None


def pixel_size_m(core: CMMCorePlus, metadata: Mapping[str, Any] | None = None) -> float | None:
    """Metres per pixel of the frames that ``core`` takes now, or None when Micro-Manager does not know.

    From the frame's ``metadata`` (``pixel_size_um``), or from the core without one. Binning and magnification are
    in it already. Micro-Manager says 0.0 for unknown. None as well when the affine matrix of the active pixel size
    configuration, where somebody calibrated one, has sides that differ by more than 1 percent (pixels that are not
    square have no single size) or contradicts the pixel size by more than 5 percent: a wrong scale is worse than none.
    """
    size_um = metadata.get("pixel_size_um") if metadata else None
    if size_um is None:
        size_um = core.getPixelSizeUm(True)
    if not (math.isfinite(size_um) and size_um > 0):
        return None
    # By its name: there matrix and size are the configuration's own, both without binning and magnification.
    configuration = core.getCurrentPixelSizeConfig(True)
    if configuration:
        affine = tuple(core.getPixelSizeAffineByID(configuration))
        if affine != _IDENTITY and not _fits(affine, core.getPixelSizeUmByID(configuration)):
            return None
    return float(size_um) * METRES["um"]


def _fits(affine: Sequence[float], size_um: float) -> bool:
    """Whether the matrix ``(a, b, tx, c, d, ty)``, pixels to micrometres of the stage, means squares of that size."""
    across, down = math.hypot(affine[0], affine[3]), math.hypot(affine[1], affine[4])
    return is_square(across, down, SQUARE_MEASURED) and math.isclose(across, size_um, rel_tol=AGREES)


def _grey(image: npt.NDArray[Any], size_m: float | None) -> Micrograph:
    """The frame as it is, or the luminance (ITU-R BT.601) of a colour one: grey stored as RGB comes back exactly."""
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype in (np.uint8, np.uint16):
        return Micrograph(luminance(image), pixel_size_m=size_m, remarks=(_COLOUR_REMARK,))
    return Micrograph(image, pixel_size_m=size_m)


def _tag(event: Any, metadata: Mapping[str, Any]) -> FrameTag:
    milliseconds = metadata.get("runner_time_ms")
    return FrameTag(
        index={str(getattr(axis, "value", axis)): int(place) for axis, place in event.index.items()},
        time_s=None if milliseconds is None else float(milliseconds) / 1e3,
        camera=metadata.get("camera_device"),
        event=event,
    )


def on_emitting_thread(signal: Any, slot: Any) -> None:
    """Connect so that ``slot`` runs on the emitting thread.

    In a Qt program pymmcore-plus emits Qt signals. Their default for a plain Python listener is the window's thread:
    frames would wait whenever the window is busy, and without limit.
    """
    if type(signal).__module__.startswith("psygnal"):
        signal.connect(slot)
        return
    qt = require("qtpy.QtCore", "micromanager", "listen to Micro-Manager inside a Qt program").Qt
    signal.connect(slot, qt.ConnectionType.DirectConnection)


def replay_core(
    frames: Sequence[npt.NDArray[Any]], *, exposure_ms: float = 1.0, pixel_size_m: float | None = None
) -> CMMCorePlus:
    """A core whose camera shows ``frames`` again and again: to try everything without a microscope.

    ``frames``: arrays of one shape and type, uint8 or uint16 ``[H, W]`` or uint8 ``[H, W, 3]``. ``exposure_ms``: how
    long one frame takes at least. ``pixel_size_m``: what the core reports; None leaves it unknown. Call
    ``unloadAllDevices()`` at the end. Raises :class:`~hpddrnet_trt.core.errors.UsageError` for frames that differ.
    """
    if not frames or any((frame.shape, frame.dtype) != (frames[0].shape, frames[0].dtype) for frame in frames):
        raise UsageError("a camera has frames of one size and type; give at least one, all of the same shape and dtype")
    unicore = require("pymmcore_plus.experimental.unicore", "micromanager", "replay frames through Micro-Manager")
    core = unicore.UniMMCore()
    core.setAutoShutter(False)  # there is no shutter, and closing one after each frame would end the MDA
    core.loadPyDevice("Camera", _replay_camera(unicore.SimpleCameraDevice, frames, exposure_ms))
    core.initializeDevice("Camera")
    core.setCameraDevice("Camera")
    if pixel_size_m is not None:
        core.definePixelSizeConfig("replay")  # no conditions: it cannot see properties of Python devices
        core.setPixelSizeUm("replay", micrometres(pixel_size_m))
    return core


def _replay_camera(base: Any, frames: Sequence[npt.NDArray[Any]], exposure_ms: float) -> Any:
    class ReplayCamera(base):  # in here, because its base is only there where pymmcore-plus is
        def __init__(self) -> None:
            super().__init__()
            self._exposure_ms = exposure_ms
            self._frames: Iterator[npt.NDArray[Any]] = itertools.cycle(frames)

        def get_exposure(self) -> float:
            return self._exposure_ms

        def set_exposure(self, exposure: float) -> None:
            self._exposure_ms = exposure

        def sensor_shape(self) -> tuple[int, ...]:
            return frames[0].shape

        def dtype(self) -> npt.DTypeLike:
            return frames[0].dtype

        def snap(self, buffer: npt.NDArray[Any]) -> Mapping[str, Any]:
            time.sleep(self._exposure_ms / 1e3)
            buffer[:] = next(self._frames)
            return {}

    return ReplayCamera()
