"""napari: the dock widget *Segment micrograph*, and a reader that opens micrographs with their pixel size.

``Plugins > Segment micrograph (HPDDRNet-TRT)``; in a script ``viewer.window.add_dock_widget(segment_widget(viewer))``.
How layers are read and results shown is in :mod:`hpddrnet_trt.integrations.napari_layers`.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tifffile

from hpddrnet_trt.core.domain import Domain
from hpddrnet_trt.core.errors import UserError, one_line, require
from hpddrnet_trt.core.text import length as length_text
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.engines import ENGINES, engine_status, is_address
from hpddrnet_trt.inference import Segmenter, load_segmenter
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.integrations.napari_layers import (
    METADATA_KEY,
    LayerPlanes,
    PlaneResult,
    ResultLayers,
    layer_planes,
    layer_shape,
    pixel_metres,
)
from hpddrnet_trt.integrations.napari_masks import next_picture, save_mask
from hpddrnet_trt.weights import DEFAULT, locate, shipped_models

LayerData = tuple[Any, dict[str, Any], str]  # as napari takes it: array, layer arguments, kind of layer
MODES = {"single view": "single", "with mirror image": "flip", "six sizes, mirrored": "multiscale"}
TILES: dict[str, str | int] = {
    "automatic": "auto", "whole picture": "whole", "512 pixels": 512, "1024 pixels": 1024, "2048 pixels": 2048
}  # fmt: skip
ERROR_STYLE, WARNING_STYLE = "color: #ff7b72", "color: #d9a038"


def napari_get_reader(path: str | list[str]) -> Callable[[str], list[LayerData]] | None:
    """:func:`read_layer` for one micrograph, None for what other readers do better: stacks, files that are no TIFF."""
    if not isinstance(path, str):
        return None  # several files, to be stacked
    if Path(path).suffix.lower() in (".tif", ".tiff") and not _is_one_picture(path):
        return None
    return read_layer


def read_layer(path: str) -> list[LayerData]:
    """One image layer; with ``scale`` in nanometres where the pixel size is known, in pixels where it is not.

    ``metadata["micrograph"]`` holds vendor, info-bar rows and remarks of :func:`~hpddrnet_trt.data.read_micrograph`.
    Raises :class:`~hpddrnet_trt.core.errors.BadInputFile`.
    """
    micrograph = read_micrograph(path)
    facts = {name: getattr(micrograph, name) for name in ("pixel_size_m", "info_bar_rows", "vendor")}
    metadata = {"micrograph": {**facts, "remarks": list(micrograph.remarks)}}
    arguments: dict[str, Any] = {"name": Path(path).stem, "metadata": metadata}
    if micrograph.pixel_size_m is not None:
        arguments |= {"scale": (micrograph.pixel_size_m * 1e9,) * 2, "units": ("nm", "nm")}
    return [(micrograph.pixels, arguments, "image")]


def _is_one_picture(path: str) -> bool:
    try:
        with tifffile.TiffFile(path) as tif:
            series = tif.series
            return len(series) == 1 and len(series[0].keyframe.shape) == len(series[0].shape)
    except Exception:  # a damaged file: napari tells the user what its own reader makes of it
        return False


def segment_widget(viewer: Any = None) -> Any:
    """The widget, a magicgui ``Container``, for a viewer; by default for napari's current one."""
    require("napari", "napari", "show results in napari")
    if viewer is None:
        import napari

        viewer = napari.current_viewer()
    panel = SegmentPanel(viewer)
    panel.widget.panel = panel  # lives as long as its widget
    return panel.widget


@dataclass(frozen=True)
class End:
    """How a run ended: ``text`` for people; ``error`` when it is one of theirs, ``bug`` when it is one of ours.

    ``warning``: whether the text says that results should be looked at.
    """

    text: str
    error: bool = False
    warning: bool = False
    bug: Exception | None = None


class _Cancelled(Exception):
    """Raised where a run stops because that was asked for."""


class SegmentPanel:
    """The controls and what they do; ``widget`` is the magicgui ``Container`` to show.

    ``viewer``: a napari ``Viewer``, or a ``ViewerModel`` without a window. One run at a time, in a worker of napari's;
    the last used model stays open from run to run.
    """

    def __init__(self, viewer: Any) -> None:
        from magicgui import widgets
        from magicgui.types import FileDialogMode
        from qtpy.QtWidgets import QApplication

        self.viewer = viewer
        self._worker: Any = None
        self._end, self._shown, self._count = End(""), 0, 0
        self._segmenter: Segmenter | None = None
        self._key: object = None
        self._closed = False
        self._opened: set[Path] = set()  # of the order
        engines = [("automatic", "auto"), *((name, name) for name in ENGINES if engine_status(name).usable)]
        self.layers = widgets.ComboBox(label="image", choices=self._images, nullable=True)
        self.facts = widgets.Label(label=" ")
        self.all_planes = widgets.CheckBox(text="all planes of the stack")
        self.model = widgets.ComboBox(label="model", choices=list(shipped_models()), value=DEFAULT)
        self.model_file = widgets.FileEdit(
            label="or a file", filter="*.onnx *.engine *.safetensors *.pth", nullable=True,
            tooltip="a model file, or one on a server, triton://host:8001/model; empty: the model above",
        )  # fmt: skip
        self.engine = widgets.ComboBox(label="engine", choices=engines, tooltip="the library that runs the model")
        self.mode = widgets.ComboBox(
            label="views", choices=list(MODES.items()),
            tooltip="average the class scores of several views; TensorRT engines need logits output",
        )  # fmt: skip
        self.tile = widgets.ComboBox(
            label="tiles", choices=list(TILES.items()), tooltip="segment large pictures in overlapping tiles"
        )
        self.layer_range = widgets.CheckBox(
            text="the layer's contrast limits",
            tooltip="which grey values become black and white. Without: 8-bit as it is, others from their 0.1 to "
            "their 99.9 percentile, plane by plane",
        )
        self.confidence = widgets.CheckBox(
            text="confidence layer", tooltip="also add the probability of each pixel's class, as a hidden image layer"
        )
        self.first_class = widgets.CheckBox(text="draw the first class, too")
        self.run_button, self.cancel_button = widgets.PushButton(text="Run"), widgets.PushButton(text="Cancel")
        self.bar = widgets.ProgressBar(max=1000, visible=False)
        self.message = widgets.Label()
        self.dataset = widgets.FileEdit(
            label="dataset", mode=FileDialogMode.EXISTING_DIRECTORY, nullable=True,
            tooltip="folder of pictures and masks to train on; made when it does not exist",
        )  # fmt: skip
        self.split = widgets.ComboBox(
            label="split", choices=["auto", "train", "val", "test"],
            tooltip="which part of the dataset a new picture belongs to; auto: every fifth to val",
        )  # fmt: skip
        self.save_button = widgets.PushButton(
            text="Save as mask", tooltip="add the shown plane and its corrected labels to the dataset"
        )
        self.order = widgets.FileEdit(
            label="order", filter="*.csv", nullable=True,
            tooltip="what `hpddrnet-trt rank` wrote: pictures, those that teach the model most first",
        )  # fmt: skip
        self.next_button = widgets.PushButton(
            text="Next picture", tooltip="open the next picture of the order that the dataset does not have yet"
        )
        self._controls = (
            self.layers, self.all_planes, self.model, self.model_file, self.engine, self.mode, self.tile,
            self.layer_range, self.confidence, self.first_class, self.dataset, self.split,
        )  # fmt: skip
        buttons = widgets.Container(widgets=[self.run_button, self.cancel_button], layout="horizontal", labels=False)
        last = (self.dataset, self.split, self.save_button, self.order, self.next_button, self.bar, self.message)
        self.widget: Any = widgets.Container(
            widgets=[self.layers, self.facts, *self._controls[1:-2], buttons, *last]
        )
        for label in (self.facts, self.message):
            label.native.setWordWrap(True)
        self.layers.changed.connect(self._show_layer)
        self.run_button.clicked.connect(self.run)
        self.cancel_button.clicked.connect(self.cancel)
        self.save_button.clicked.connect(self.save)
        self.next_button.clicked.connect(self.open_next)
        events = viewer.layers.events  # a dock of napari's connects these, too, and lets go of them
        for event in (events.inserted, events.removed, events.reordered):
            event.connect(self._list_layers)
        self.widget.native.destroyed.connect(self.close)
        application: Any = QApplication.instance()
        application.aboutToQuit.connect(self.close)
        self._list_layers()
        self._enable(running=False)

    @property
    def running(self) -> bool:
        return self._worker is not None

    @property
    def layer(self) -> Any | None:
        """The chosen image layer."""
        return self.layers.value

    def options(self) -> dict[str, Any]:
        """What the controls say, as :func:`~hpddrnet_trt.inference.load_segmenter` takes it."""
        limits = None
        if self.layer_range.value and self.layer is not None and not self.layer.rgb:
            limits = (float(self.layer.contrast_limits[0]), float(self.layer.contrast_limits[1]))
        return {
            "model_path": str(self.model_file.value or self.model.value), "engine": self.engine.value,
            "mode": self.mode.value, "tile": self.tile.value, "confidence": self.confidence.value, "window": limits,
        }  # fmt: skip

    def choose_model(self, model: str) -> None:
        """Choose a model: a file, the name of one that comes with the package, or the address of one on a server."""
        if model in self.model.choices:
            self.model.value, self.model_file.value = model, None
        elif is_address(model):
            self.model_file.line_edit.value = model  # no path to be made whole
        else:
            self.model_file.value = Path(model)

    def choose_engine(self, engine: str) -> None:
        """Choose an engine by its name; one that cannot be used here joins the list, to say why when it runs."""
        if engine not in self.engine.choices:
            self.engine.set_choice(engine, engine)
        self.engine.value = engine

    def run(self) -> None:
        """Segment in the background; the controls wait until it ends."""
        from napari.qt.threading import create_worker

        if self.layer is None:
            self._say("open a micrograph first: there is no image layer", error=True)
            return
        try:
            planes = layer_planes(self.layer, self.viewer.dims, all_planes=self.all_planes.value)
        except UserError as exc:
            self._say(str(exc), error=True)
            return
        self._count = len(planes.indices)
        results = ResultLayers(self.viewer, self.layer, planes, first_class=self.first_class.value)
        self._end, self._shown = End(""), 0  # the end when it is cancelled
        self._enable(running=True)
        self._say("")
        self._worker = create_worker(self._segment, planes, self.options())
        self._worker.yielded.connect(lambda result: self._show(results, result))
        self._worker.finished.connect(self._finish)
        self._worker.start()

    def cancel(self) -> None:
        """Stop at the next tile or plane; an inference that has begun is not interrupted, its result is dropped."""
        if self._worker is not None:
            self._worker.quit()
            self.cancel_button.enabled = False
            self._say("stopping after this inference")

    def save(self) -> None:
        """Add the shown plane and its labels, as they are now, to the dataset; says how to train on it."""
        try:
            if self.layer is None or self.dataset.value is None:
                raise UserError("choose the image, and the folder of a dataset to save the mask in")
            saved = save_mask(str(self.dataset.value), self.viewer, self.layer, self.split.value)
        except (UserError, OSError) as exc:
            self._say(one_line(exc), error=True)
            return
        parts = ", ".join(f"{count} {split}" for split, count in saved.counts.items() if count)
        both = all(saved.counts[split] for split in ("train", "val"))
        then = f"train on it: {_command(str(self.dataset.value), str(self.model_file.value or self.model.value))}"
        self._say(f"saved {saved.mask} ({parts}); {then if both else 'training needs pictures in train and in val'}")

    def open_next(self) -> None:
        """Open the next picture of the order, and choose it; one that was opened before is passed over."""
        order, dataset = (None if one.value is None else Path(str(one.value)) for one in (self.order, self.dataset))
        if order is None:
            self._say("choose the file of an order; `hpddrnet-trt rank` writes one", error=True)
            return
        try:
            path = next_picture(order, dataset, self._opened)
            if path is None:
                self._say(f"no picture is left of {order.name}")
                return
            self._opened.add(path)
            ((pixels, arguments, _),) = read_layer(str(path))
        except (UserError, OSError) as exc:
            self._say(one_line(exc), error=True)
            return
        self.layers.value = self.viewer.add_image(pixels, **arguments)
        self._say(f"opened {path}")

    def close(self, *_: Any) -> None:
        """The widget is gone: stop the run, let go of the viewer and of the model."""
        if self._closed:
            return
        self._closed = True
        events = self.viewer.layers.events
        for event in (events.inserted, events.removed, events.reordered):
            event.disconnect(self._list_layers)
        if self._worker is None:
            self._close_model()
        else:
            self._worker.quit()  # and the run closes the model when it ends

    def _segment(self, planes: LayerPlanes, options: dict[str, Any]) -> Generator[PlaneResult]:
        """The work, in the worker's thread: it ends without an exception, and says how in ``_end``.

        (napari's workers end without a word after a RuntimeError, which is what runtimes raise.)
        """
        started, worker, count, segmentation = time.monotonic(), self._worker, self._count, None
        domains: list[Domain] = []

        def report(text: str, fraction: float | None) -> None:
            if worker.abort_requested:
                raise _Cancelled
            self._progress(text, fraction)

        try:
            report(f"opening {Path(options['model_path']).name}", None)
            segmenter = self._open(options)
            for number, index in enumerate(planes.indices):
                text = "segmenting" if count == 1 else f"plane {number + 1} of {count}"

                def tile_done(done: int, tiles: int, number: int = number, text: str = text) -> None:
                    text = text if tiles == 1 else f"{text}, tile {done} of {tiles}"
                    report(text, (number + done / tiles) / count)

                report(text, None if count == 1 else number / count)
                segmentation = segmenter.segment(planes.read(index), progress=tile_done)
                domains.append(segmentation.domain)
                yield PlaneResult(index, segmentation)
        except _Cancelled:
            pass
        except UserError as exc:
            self._end = End(str(exc), error=True)
        except MemoryError:
            self._end = End("there is not enough memory for this; choose smaller tiles", error=True)
        except Exception as exc:  # a run must not end without a word
            self._end = End(f"unexpected {type(exc).__name__}: {one_line(exc)}", error=True, bug=exc)
        else:
            notice = _domain_notice(domains)
            text = _summary(count, segmentation, time.monotonic() - started)
            self._end = End("; ".join([text, notice] if notice else [text]), warning=bool(notice))
        finally:
            if self._closed:
                self._close_model()

    def _open(self, options: dict[str, Any]) -> Segmenter:
        """The segmenter that is open already, unless options or the file have changed."""
        path = locate(options["model_path"])
        state = path.stat() if path.is_file() else None
        key = (options, None if state is None else (state.st_mtime_ns, state.st_size))
        if self._segmenter is None or key != self._key:
            self._close_model()
            self._segmenter, self._key = load_segmenter(**options), key
        return self._segmenter

    def _close_model(self) -> None:
        segmenter, self._segmenter = self._segmenter, None
        if segmenter is not None:
            segmenter.close()

    def _progress(self, text: str, fraction: float | None) -> None:
        from superqt.utils import ensure_main_thread

        @ensure_main_thread
        def show() -> None:
            if self.running and not self._closed and not self._worker.abort_requested:
                self.bar.max, self.bar.value = (0, 0) if fraction is None else (1000, round(1000 * fraction))
                self._say(text)

        show()

    def _show(self, results: ResultLayers, result: PlaneResult) -> None:
        if self._closed or self._worker is None or self._worker.abort_requested:
            return
        try:
            results.add(result)
            self._shown += 1
        except UserError as exc:
            self._worker.quit()
            self._say(str(exc), error=True)

    def _finish(self) -> None:
        if self._closed:
            return
        end, said = self._end, self.message.native.styleSheet() == ERROR_STYLE
        self._worker = None
        self._enable(running=False)
        if not (end.text or said):
            self._say(f"cancelled; {self._shown} of {self._count} done")
        elif not said:  # else a result could not be shown, and that stands there
            self._say(end.text, error=end.error, warning=end.warning)
        if end.bug is not None:
            from napari.utils.notifications import notification_manager

            notification_manager.receive_error(type(end.bug), end.bug, end.bug.__traceback__)

    def _images(self, _: Any = None) -> list[tuple[str, Any]]:
        from napari.layers import Image

        layers = [one for one in self.viewer.layers if type(one) is Image and METADATA_KEY not in one.metadata]
        return [(layer.name, layer) for layer in layers]

    def _list_layers(self, *_: Any) -> None:
        """List the viewer's image layers, and keep the chosen one; at first the active one."""
        images = [layer for _, layer in self._images()]
        wanted = (self.layer, self.viewer.layers.selection.active, *reversed(images))
        self.layers.reset_choices()
        self.layers.value = next((layer for layer in wanted if any(layer is image for image in images)), None)
        self._show_layer()

    def _show_layer(self, *_: Any) -> None:
        """Say what the chosen layer is."""
        layer = self.layer
        self.run_button.enabled = layer is not None and not self.running
        self.all_planes.visible = layer is not None and layer.ndim > 2
        if layer is None:
            self.facts.value = "no image layer: open a micrograph"
            return
        pixel = pixel_metres(layer)
        sizes = dict.fromkeys(map(length_text, pixel or ()))  # one when pixels are square
        size = f"pixel {' × '.join(sizes)}" if sizes else "pixel size unknown"
        self.facts.value = f"{' × '.join(map(str, layer_shape(layer)))}, {layer.dtype}, {size}"

    def _enable(self, *, running: bool) -> None:
        for control in self._controls:
            control.enabled = not running
        self.run_button.enabled = not running and self.layer is not None
        self.save_button.enabled = self.next_button.enabled = not running
        self.cancel_button.enabled = self.bar.visible = running

    def _say(self, text: str, *, error: bool = False, warning: bool = False) -> None:
        self.message.native.setStyleSheet(ERROR_STYLE if error else WARNING_STYLE if warning else "")
        self.message.value = text


def _command(dataset: str, model: str) -> str:
    """What trains on a dataset and goes on from a model: from its checkpoint, where the file itself only runs."""
    checkpoint, remark = model, ""
    if is_address(model) or Path(model).suffix.lower() in (".onnx", ".engine"):
        beside = Path(model).with_suffix(".safetensors")  # where training leaves it
        if beside.is_file():
            checkpoint = str(beside)
        else:
            checkpoint, remark = "CHECKPOINT", f" (the .safetensors file that {Path(model).name} was made from)"
    return shlex.join(["hpddrnet-trt", "train", dataset, "--from", checkpoint]) + remark


def _domain_notice(domains: Sequence[Domain]) -> str:
    """What people should know of a picture, or of how many planes."""
    notices = [domain.notice for domain in domains if domain.notice is not None]
    if len(domains) == 1 or not notices:
        return "".join(notices)
    counts = {what: sum(notice.startswith(what) for notice in notices) for what in ("foreign", "unusual")}
    return f"of the planes {counts['foreign']} are foreign to the model and {counts['unusual']} unusual for it"


def _summary(count: int, last: Segmentation | None, seconds: float) -> str:
    text = f"{'1 picture' if count == 1 else f'{count} planes'} in {seconds:.1f} s"
    if last is not None and last.provenance is not None:
        text += f" with {last.provenance.engine}"
    if last is not None and last.rescale not in (None, 1.0):
        text += f"; {'enlarged' if last.rescale > 1 else 'shrunk'} by {max(last.rescale, 1 / last.rescale):.3g} to "
        text += "the model's pixel size"
    if last is not None and last.tiling is not None:
        text += f"; {last.tiling.tiles} tiles, which disagree on {last.tiling.seam_disagreement:.1%} of their overlaps"
    return "; ".join([text, *(() if last is None else last.remarks)])
