"""The dock widget *Segment micrograph* for napari.

``Plugins > Segment micrograph (HPDDRNet-TRT)``; in a script ``viewer.window.add_dock_widget(segment_widget(viewer))``.
What it does lives in the modules beside this one, which need no display; here are the controls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.core.text import length as length_text
from hpddrnet_trt.engines import ENGINES, engine_status
from hpddrnet_trt.integrations.napari_job import End, Job, OpenModel, Request
from hpddrnet_trt.integrations.napari_layers import layer_planes, layer_shape, pixel_metres
from hpddrnet_trt.integrations.napari_results import ResultLayers, area_text, class_rows, find_layer, show_class
from hpddrnet_trt.weights import DEFAULT, shipped_models

MODEL_FILES = "Models (*.onnx *.engine *.safetensors *.pth)"
MODES = {"single view": "single", "with mirror image": "flip", "six sizes, mirrored": "multiscale"}
TILES: dict[str, str | int] = {
    "automatic": "auto", "whole picture": "whole", "512 pixels": 512, "1024 pixels": 1024, "2048 pixels": 2048
}  # fmt: skip
OWN_WINDOW, LAYER_WINDOW = "own", "layer"
WINDOWS = {"the picture's own": OWN_WINDOW, "layer's contrast limits": LAYER_WINDOW}
POLL_MS = 100
ERROR_STYLE = "color: #ff7b72"
COLUMNS = ("class", "fraction", "area / µm²")


def segment_widget(viewer: Any = None) -> Any:
    """The widget, a ``QWidget``, for a viewer; by default for napari's current one."""
    require("napari", "napari", "show results in napari")
    if viewer is None:
        import napari

        viewer = napari.current_viewer()
    panel = SegmentPanel(viewer)
    panel.widget.panel = panel  # lives as long as its widget
    return panel.widget


class SegmentPanel:
    """The controls and what they do; ``widget`` is the ``QWidget`` to show.

    ``viewer``: a napari ``Viewer``, or a ``ViewerModel`` without a window.
    """

    def __init__(self, viewer: Any) -> None:
        from qtpy.QtCore import QTimer
        from qtpy.QtWidgets import QApplication

        self.viewer = viewer
        self._opened = OpenModel()
        self._job: Job | None = None
        self._results: ResultLayers | None = None
        self._added = 0
        self._listed: list[Any] = []
        self._closed = False
        self._build()
        self._timer = QTimer(self.widget)
        self._timer.setInterval(POLL_MS)
        self._timer.timeout.connect(self._poll)
        for event in self._layer_events():
            event.connect(self._list_layers)
        self.widget.destroyed.connect(self.close)
        application: Any = QApplication.instance()
        application.aboutToQuit.connect(self.close)
        self._list_layers()

    @property
    def running(self) -> bool:
        return self._job is not None

    @property
    def layer(self) -> Any | None:
        """The chosen image layer."""
        return self.layers.currentData()

    def request(self) -> Request:
        """What the controls say."""
        layer = self.layer
        limits = None
        if self.window.currentData() == LAYER_WINDOW and layer is not None and not layer.rgb:
            limits = (float(layer.contrast_limits[0]), float(layer.contrast_limits[1]))
        return Request(
            model=self.model.currentData(),
            engine=self.engine.currentData(),
            mode=self.mode.currentData(),
            tile=self.tile.currentData(),
            confidence=self.confidence.isChecked(),
            window=limits,
        )

    def choose_layer(self, layer: Any) -> None:
        """Choose an image layer of the viewer."""
        self.layers.setCurrentIndex(_place(self.layers, layer))

    def choose_model(self, model: str) -> None:
        """Choose a model: a file, which joins the list, or the name of one that comes with the package."""
        if _place(self.model, model) < 0:
            self.model.addItem(Path(model).name, model)
        self.model.setCurrentIndex(_place(self.model, model))
        self.model.setToolTip(model)

    def choose_engine(self, engine: str) -> None:
        """Choose an engine by its name; one that cannot be used here joins the list, to say why when it runs."""
        if _place(self.engine, engine) < 0:
            self.engine.addItem(engine, engine)
        self.engine.setCurrentIndex(_place(self.engine, engine))

    def run(self) -> None:
        """Segment in the background; the controls wait until it ends."""
        if self.layer is None:
            self._say("open a micrograph first: there is no image layer", error=True)
            return
        try:
            planes = layer_planes(self.layer, self.viewer.dims, all_planes=self.planes.currentData())
        except UserError as exc:
            self._say(str(exc), error=True)
            return
        self._job = Job(planes, self.request(), self._opened)
        self._results, self._added = ResultLayers(self.viewer, self.layer, planes), 0
        self._enable(running=True)
        self._say("")
        self._job.start()
        self._timer.start()
        self._poll()

    def cancel(self) -> None:
        """Stop at the next tile or plane."""
        if self._job is not None:
            self._job.progress.cancel()
            self.cancel_button.setEnabled(False)
            self._bar("stopping after this inference", None)

    def close(self, *_: Any) -> None:
        """The widget is gone: stop the job, let go of the viewer and of the model."""
        if self._closed:
            return
        self._closed = True
        if self._job is not None:
            self._job.progress.cancel()
        for event in self._layer_events():
            event.disconnect(self._list_layers)
        for layer in self._listed:
            layer.events.name.disconnect(self._rename)
        self._listed = []
        self._opened.close()

    def _poll(self) -> None:
        job, results = self._job, self._results
        if job is None or results is None:
            return
        end = job.end
        try:
            for result in job.take():
                results.add(result)
                self._added += 1
        except UserError as exc:
            job.progress.cancel()
            end = End(str(exc), error=True)
        if end is None:
            if not job.progress.cancelled:
                self._bar(job.progress.text, job.progress.fraction)
            return
        if job.progress.cancelled and not end.error:
            end = End(f"cancelled; {self._added} of {len(job.planes.indices)} done")
        self._job = self._results = None
        self._timer.stop()
        self._enable(running=False)
        self._say(end.text, error=end.error)
        self._show_table()
        if end.bug is not None:
            from napari.utils.notifications import notification_manager

            notification_manager.receive_error(type(end.bug), end.bug, end.bug.__traceback__)

    def _layer_events(self) -> list[Any]:
        events = self.viewer.layers.events
        return [events.inserted, events.removed, events.reordered]

    def _list_layers(self, *_: Any) -> None:
        """List the viewer's image layers, and keep the chosen one; at first the active one."""
        from napari.layers import Image

        images = [
            layer for layer in self.viewer.layers if type(layer) is Image and "hpddrnet_trt" not in layer.metadata
        ]
        for layer in self._listed:
            layer.events.name.disconnect(self._rename)
        self._listed = images
        before, active = self.layer, self.viewer.layers.selection.active
        self.layers.blockSignals(True)
        self.layers.clear()
        for layer in images:
            self.layers.addItem(layer.name, layer)
            layer.events.name.connect(self._rename)
        chosen = next((layer for layer in (before, active, *reversed(images)) if any(layer is i for i in images)), None)
        self.layers.setCurrentIndex(-1 if chosen is None else _place(self.layers, chosen))
        self.layers.blockSignals(False)
        if chosen is not before or chosen is None:
            self._show_layer()

    def _rename(self, event: Any) -> None:
        place = -1 if self._closed else _place(self.layers, event.source)
        if place >= 0:
            self.layers.setItemText(place, event.source.name)

    def _show_layer(self, *_: Any) -> None:
        """Say what the chosen layer is, and show the result it may already have."""
        layer = self.layer
        self.run_button.setEnabled(layer is not None and not self.running)
        if layer is None:
            self.facts.setText("no image layer: open a micrograph")
        else:
            pixel = pixel_metres(layer)
            if pixel is None:
                size = "pixel size unknown"
            else:
                sizes = dict.fromkeys(length_text(length) for length in pixel)  # one when pixels are square
                size = f"pixel {' × '.join(sizes)}"
            self.facts.setText(f"{' × '.join(map(str, layer_shape(layer)))}, {layer.dtype}, {size}")
        for part in (self.planes, self.form.labelForField(self.planes)):
            part.setVisible(layer is not None and layer.ndim > 2)
        self._show_table()

    def _show_table(self) -> None:
        """The result of the chosen layer, empty while it has none."""
        from qtpy.QtCore import Qt
        from qtpy.QtGui import QColor, QPixmap
        from qtpy.QtWidgets import QTableWidgetItem

        labels = None if self.layer is None else find_layer(self.viewer, self.layer, "labels")
        rows = [] if labels is None else class_rows(labels)
        self.table.blockSignals(True)
        self.table.setRowCount(len(rows))
        for row in rows:
            swatch = QPixmap(12, 12)
            swatch.fill(QColor(*row.info.color))
            name = QTableWidgetItem(row.info.name)
            name.setData(Qt.ItemDataRole.DecorationRole, swatch)
            name.setFlags(Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsUserCheckable)
            name.setCheckState(Qt.CheckState.Checked if row.visible else Qt.CheckState.Unchecked)
            name.setToolTip(f"label {row.index}; tick to draw this class")
            self.table.setItem(row.index, 0, name)
            for column, text in ((1, f"{row.fraction:.2%}"), (2, area_text(row.area_m2))):
                cell = QTableWidgetItem(text)
                cell.setFlags(Qt.ItemFlag.ItemIsEnabled)
                cell.setTextAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
                self.table.setItem(row.index, column, cell)
        self.table.setVisible(bool(rows))
        heights = [self.table.rowHeight(index) for index in range(len(rows))]
        self.table.setFixedHeight(sum(heights) + self.table.horizontalHeader().sizeHint().height() + 4)
        self.table.blockSignals(False)

    def _tick(self, item: Any) -> None:
        from qtpy.QtCore import Qt

        labels = None if self.layer is None else find_layer(self.viewer, self.layer, "labels")
        if labels is not None and item.column() == 0:
            show_class(labels, item.row(), item.checkState() == Qt.CheckState.Checked)

    def _browse(self) -> None:
        from qtpy.QtWidgets import QFileDialog

        chosen, _ = QFileDialog.getOpenFileName(self.widget, "Model file", "", MODEL_FILES)
        if chosen:
            self.choose_model(chosen)

    def _enable(self, *, running: bool) -> None:
        self.controls.setEnabled(not running)
        self.run_button.setEnabled(not running and self.layer is not None)
        self.cancel_button.setEnabled(running)
        self.bar.setVisible(running)

    def _bar(self, text: str, fraction: float | None) -> None:
        self.bar.setRange(0, 0 if fraction is None else 1000)
        self.bar.setValue(-1 if fraction is None else round(1000 * fraction))
        self.message.setStyleSheet("")
        self.message.setText(text)

    def _say(self, text: str, *, error: bool = False) -> None:
        self.message.setStyleSheet(ERROR_STYLE if error else "")
        self.message.setText(text)

    def _build(self) -> None:
        """Lay out the controls."""
        from qtpy import QtWidgets
        from qtpy.QtCore import QEvent

        panel = self

        class Content(QtWidgets.QWidget):  # type: ignore[misc, unused-ignore]
            def changeEvent(self, event: Any) -> None:
                # A dock that is removed gives its content back and does not delete it.
                if event.type() == QEvent.Type.ParentChange and self.parent() is None:
                    panel.close()
                super().changeEvent(event)

        def choices(entries: dict[str, Any], hint: str) -> Any:
            box = QtWidgets.QComboBox()
            for text, data in entries.items():
                box.addItem(text, data)
            box.setToolTip(hint)
            box.setSizeAdjustPolicy(QtWidgets.QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
            box.setMinimumContentsLength(14)
            box.setSizePolicy(QtWidgets.QSizePolicy.Policy.Expanding, QtWidgets.QSizePolicy.Policy.Fixed)
            return box

        self.widget: Any = Content()
        self.controls = QtWidgets.QWidget()
        self.layers = choices({}, "the image layer to segment")
        self.layers.currentIndexChanged.connect(self._show_layer)
        self.facts = QtWidgets.QLabel()
        self.facts.setWordWrap(True)
        shipped = {name: name for name in shipped_models()}
        self.model = choices(shipped, "a model that comes with the package, or a file")
        self.model.setCurrentIndex(_place(self.model, DEFAULT))
        browse = QtWidgets.QToolButton()
        browse.setText("…")
        browse.setToolTip("open a model file")
        browse.clicked.connect(self._browse)
        model_row = QtWidgets.QHBoxLayout()
        model_row.addWidget(self.model)
        model_row.addWidget(browse)
        self.engine = choices(
            {"automatic": "auto", **{name: name for name in _usable_engines()}}, "the library that runs the model"
        )
        self.mode = choices(MODES, "average the class scores of several views; TensorRT engines need logits output")
        self.tile = choices(TILES, "segment large pictures in overlapping tiles of this size")
        self.window = choices(
            WINDOWS,
            "which grey values become black and white. The picture's own: 8-bit as it is, others from their 0.1 to "
            "their 99.9 percentile, plane by plane. Contrast limits: the layer's, the same for all planes",
        )
        self.planes = choices({"the current one": False, "all": True}, "which planes of the stack")
        self.confidence = QtWidgets.QCheckBox("confidence layer")
        self.confidence.setToolTip("also add the probability of each pixel's class, as a hidden image layer")

        self.form = QtWidgets.QFormLayout(self.controls)
        self.form.setContentsMargins(0, 0, 0, 0)
        self.form.setFieldGrowthPolicy(QtWidgets.QFormLayout.FieldGrowthPolicy.ExpandingFieldsGrow)
        self.form.addRow("image", self.layers)
        self.form.addRow("", self.facts)
        self.form.addRow("planes", self.planes)
        self.form.addRow("model", model_row)
        self.form.addRow("engine", self.engine)
        self.form.addRow("views", self.mode)
        self.form.addRow("tiles", self.tile)
        self.form.addRow("grey levels", self.window)
        self.form.addRow("", self.confidence)

        self.run_button, self.cancel_button = QtWidgets.QPushButton("Run"), QtWidgets.QPushButton("Cancel")
        self.run_button.clicked.connect(self.run)
        self.cancel_button.clicked.connect(self.cancel)
        buttons = QtWidgets.QHBoxLayout()
        buttons.addWidget(self.run_button)
        buttons.addWidget(self.cancel_button)
        self.bar = QtWidgets.QProgressBar()
        self.bar.setTextVisible(False)
        space = self.bar.sizePolicy()
        space.setRetainSizeWhenHidden(True)  # what is below stays where it is
        self.bar.setSizePolicy(space)
        self.message = QtWidgets.QLabel()
        self.message.setWordWrap(True)
        self.table = QtWidgets.QTableWidget(0, len(COLUMNS))
        self.table.setHorizontalHeaderLabels(COLUMNS)
        self.table.verticalHeader().hide()
        self.table.setSelectionMode(QtWidgets.QAbstractItemView.SelectionMode.NoSelection)
        self.table.horizontalHeader().setSectionResizeMode(QtWidgets.QHeaderView.ResizeMode.ResizeToContents)
        self.table.horizontalHeader().setSectionResizeMode(0, QtWidgets.QHeaderView.ResizeMode.Stretch)
        self.table.itemChanged.connect(self._tick)

        column = QtWidgets.QVBoxLayout(self.widget)
        column.addWidget(self.controls)
        column.addLayout(buttons)
        column.addWidget(self.bar)
        column.addWidget(self.message)
        column.addWidget(self.table)
        column.addStretch(1)
        self._enable(running=False)


def _usable_engines() -> list[str]:
    return [name for name in ENGINES if engine_status(name).usable]


def _place(box: Any, data: Any) -> int:
    """Where ``data`` is in a combo box, by identity for layers; -1 when it is not there."""
    return next(
        (place for place in range(box.count()) if box.itemData(place) is data or box.itemData(place) == data), -1
    )
