"""The fixtures of what is reported on."""

from __future__ import annotations

from tests.accuracy.small_dataset import dataset, segmenter
from tests.benchmark.conftest import measured, models

__all__ = ["dataset", "measured", "models", "segmenter"]
