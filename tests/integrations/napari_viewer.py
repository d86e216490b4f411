"""What napari's tests share: its imports, a viewer without a window, small models."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("NAPARI_CONFIG", "")  # no settings file is read or written
with warnings.catch_warnings():
    # napari and npe2 use what pydantic 2 has deprecated, all of it when they are imported.
    warnings.simplefilter("ignore")
    pytest.importorskip("napari")
    from napari.components import ViewerModel
    from napari.layers import Image, Labels

import numpy.typing as npt

from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.integrations import napari as plugin
from tests.toy import ToyEngine

__all__ = ["Image", "Labels", "Scripted", "ToyModel", "ViewerModel", "application"]


def application() -> Any:
    """Qt without a display, once per process; skips the test where there is no Qt, or one that crashes."""
    widgets = pytest.importorskip("qtpy.QtWidgets", exc_type=ImportError)
    from qtpy.QtCore import QObject

    thing, before = QObject(), sys.getrefcount(None)
    for _ in range(100):
        thing.setObjectName("x")
    if sys.getrefcount(None) < before - 50:
        pytest.skip("this PySide6 loses references to None and would end the process (6.12.0 on Python 3.11 does); "
                    "install pyside6-essentials<6.11")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QT_QPA_PLATFORM", "offscreen")
        return widgets.QApplication.instance() or widgets.QApplication([])


class ToyModel:
    """Stands in for ``load_segmenter``: the toy engine for every model's name, and what was asked for."""

    def __init__(self, patch: pytest.MonkeyPatch, engine: Any = None) -> None:
        self.engine = engine or ToyEngine()
        self.opened: list[tuple[str, str]] = []
        self.checksum = "a" * 64
        patch.setattr(plugin, "load_segmenter", self.load)
        patch.setattr(plugin, "locate", Path)

    def load(self, model_path: str, *, engine: str, **options: Any) -> Segmenter:
        self.opened.append((model_path, engine))
        return Segmenter(self.engine, model_sha256=self.checksum, **options)


class Scripted(ToyEngine):
    """Calls ``then(number)`` before inference ``number``."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.then = then

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        self.then(len(self.shapes))
        return super().infer(images)
