"""Learning curves from the record of a training run, whole, cut off, or somebody else's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hpddrnet_trt.report.learning_curves import curves_beside

HEADER = "step,epoch,lr,train/loss,train/loss_main,train/loss_auxiliary,val/loss,val/miou,val/mean_accuracy,"
HEADER += "val/pixel_accuracy,val/iou/grain,val/iou/pore,val/iou/clay\n"
ROWS = ["10,1,0.001,1.5,1.0,0.5,,,,,,,\n", "20,2,0.002,1.2,0.8,0.4,,,,,,,\n", "20,2,,,,,0.9,0.5,0.6,0.7,0.4,0.6,nan\n"]


def test_columns_without_their_gaps(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(HEADER + "".join(ROWS))
    curves = curves_beside(tmp_path / "model.safetensors")
    assert curves is not None
    assert curves.columns["train/loss"] == [(10, 1.5), (20, 1.2)]
    assert curves.columns["val/miou"] == [(20, 0.5)]
    assert list(curves.classes) == ["grain", "pore", "clay"]
    assert curves.classes["pore"] == [(20, 0.6)]


def test_a_line_cut_off_by_a_running_training_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(HEADER + ROWS[0] + ROWS[1][:9])
    curves = curves_beside(tmp_path / "model.safetensors")
    assert curves is not None
    assert curves.columns["train/loss"] == [(10, 1.5)]


@pytest.mark.parametrize("content", ["time,speed\n1,2\n", "", HEADER + ROWS[0].replace("10,", "ten,"), "\x00\x01\n"])
def test_a_foreign_file_is_passed_over_with_a_word(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert curves_beside(tmp_path / "model.safetensors") is None
    assert "not the record of a training run" in caplog.text


def test_no_file_or_no_row_means_no_curves(tmp_path: Path) -> None:
    assert curves_beside(tmp_path / "model.onnx") is None
    (tmp_path / "metrics.csv").write_text(HEADER)
    assert curves_beside(tmp_path / "model.onnx") is None
