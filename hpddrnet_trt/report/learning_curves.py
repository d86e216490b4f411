"""The course of the training run that made a model: ``metrics.csv`` beside its file."""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

FILE_NAME = "metrics.csv"  # written by hpddrnet_trt.training.callbacks.Records
_NEEDED = {"step", "lr", "train/loss", "val/loss", "val/miou"}
_CLASS = "val/iou/"


@dataclass(frozen=True)
class Curves:
    """``columns``: (step, value) pairs of each column of the file, gaps left out."""

    source: Path
    columns: dict[str, list[tuple[int, float]]]

    @property
    def classes(self) -> dict[str, list[tuple[int, float]]]:
        """Validation IoU of each class."""
        return {name.removeprefix(_CLASS): values for name, values in self.columns.items() if name.startswith(_CLASS)}


def curves_beside(model: str | Path) -> Curves | None:
    """Learning curves of the run in whose folder ``model`` lies, or None when there are none.

    A ``metrics.csv`` that another program wrote is passed over, with a log message.
    """
    source = Path(model).parent / FILE_NAME
    if not source.is_file():
        return None
    try:
        with source.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            columns = list(reader.fieldnames or [])
            rows = [row for row in reader if None not in row.values()]  # the last one may be half written
        if not set(columns) >= _NEEDED:
            raise ValueError(f"it has no column {sorted(_NEEDED - set(columns))[0]}")
        found = {name: _pairs(rows, name) for name in columns if name != "step"}
    except (OSError, ValueError) as exc:
        log.warning("%s is not the record of a training run (%s): no learning curves", source, exc)
        return None
    return Curves(source, found) if rows else None


def _pairs(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in rows if row[name]]
