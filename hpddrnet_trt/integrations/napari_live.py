"""A live picture in napari: what a :class:`~hpddrnet_trt.stream.Stream` finds, as an image and a labels layer.

``submit`` is for the acquisition's thread and only enqueues; layers change in the GUI's thread alone, which polls.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.integrations.napari_results import OPACITY, class_colormap
from hpddrnet_trt.stream import State, Stream, StreamResult, StreamStatistics
from hpddrnet_trt.stream.stream import accept_frame

POLL_MS = 40
OLD_S = 2.0  # a picture older than this is said to be old
TEXT_COLOURS = {True: "#9fe08d", False: "#ff7b72"}  # well or not


class LiveLayer:
    """Shows the newest result of a stream, its own picture under its labels, and how the stream is.

    ``viewer``: a napari ``Viewer``, or a ``ViewerModel`` without a window. ``stream``: opened by the caller, who also
    closes it; nobody else may take its :meth:`~hpddrnet_trt.stream.Stream.latest`. Give it frames by :meth:`submit`.
    """

    def __init__(self, viewer: Any, stream: Stream, *, name: str = "live") -> None:
        self.viewer, self.stream, self.name = viewer, stream, name
        self._image: Any = None
        self._labels: Any = None
        self._shown: StreamResult | None = None
        self._place: dict[str, Any] | None = None
        self._timer: Any = None

    def submit(self, frame: npt.NDArray[Any] | Micrograph) -> int | None:
        """Hand a frame ``[H, W]`` to the stream; from any thread. The frame's id, None when it was not taken.

        Never raises, as :meth:`~hpddrnet_trt.stream.Stream.submit`.
        """
        # One copy serves the engine and the screen: the camera may write into its buffer again.
        taken, error = accept_frame(frame, copy=True)
        if error is not None:
            return self.stream.submit(frame)  # says so in its result
        picture = taken if isinstance(taken, Micrograph) else Micrograph(taken)
        return self.stream.submit(picture, tag=picture, copy=False)

    def start(self, poll_ms: int = POLL_MS) -> None:
        """Update from now on, in the thread that calls this: the GUI's."""
        from qtpy.QtCore import QTimer

        self._timer = QTimer()
        self._timer.timeout.connect(self.update)
        self._timer.start(poll_ms)

    def stop(self) -> None:
        """Update no more; the layers stay."""
        if self._timer is not None:
            self._timer.stop()
            self._timer = None

    def update(self) -> None:
        """Show what is new; called by the timer."""
        result = self.stream.latest()
        if result is not None and result.segmentation is not None:
            self._show(result)
            self._shown = result
        statistics = self.stream.statistics()
        # Where napari 0.9 moved its overlays; before, the viewer had them itself.
        text = self.viewer.canvas.overlays.text if hasattr(self.viewer, "canvas") else self.viewer.text_overlay
        text.text = status_text(statistics, self._shown)
        text.color = TEXT_COLOURS[statistics.state in (State.STARTING, State.READY)]
        text.visible = True

    def _show(self, result: StreamResult) -> None:
        from napari.layers import Image, Labels

        found, picture = result.segmentation, result.tag
        assert found is not None  # by the caller
        size = picture.pixel_size_m
        place: dict[str, Any] = {"scale": (1.0, 1.0), "units": ("pixel", "pixel")}
        if size is not None:
            place = {"scale": (size * 1e9, size * 1e9), "units": ("nm", "nm")}
        if self._image is None or self._image not in self.viewer.layers:
            self._image = Image(picture.pixels, name=self.name, contrast_limits=found.window, **place)
            self.viewer.add_layer(self._image)
        if self._labels is None or self._labels not in self.viewer.layers:
            self._labels = Labels(
                found.labels, name=f"{self.name} classes", opacity=OPACITY, **place,
                colormap=class_colormap(found.classes, hidden={0}),
            )  # fmt: skip
            self.viewer.add_layer(self._labels)
        self._image.data, self._labels.data = picture.pixels, found.labels
        if tuple(self._image.contrast_limits) != found.window:
            self._image.contrast_limits = found.window
        if place != self._place:  # another magnification, or a pixel size that became known
            self._place = place
            for layer in (self._image, self._labels):
                layer.scale, layer.units = place["scale"], place["units"]


def status_text(statistics: StreamStatistics, shown: StreamResult | None) -> str:
    """The stream's state for people: how it is, what it has done, how old the picture is."""
    lines = [statistics.state.value if statistics.reason is None else f"{statistics.state.value}: {statistics.reason}"]
    if shown is not None:
        line = f"frame {shown.frame_id}, {1000 * shown.latency_s:.0f} ms from frame to result"
        age = shown.age_s()
        lines.append(line if age < OLD_S else f"{line}; this picture is {age:.0f} s old")
    counts = f"{statistics.processed} processed, {statistics.dropped} dropped, {statistics.failed} failed"
    lines.append(counts if statistics.last_error is None else f"{counts} ({statistics.last_error})")
    return "\n".join(lines)
