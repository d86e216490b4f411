"""The command line: `hpddrnet-trt <command>`. A command is one documented function.

The recipes (`train/train.py`, `export/build_engine.py`, ...) run these same functions.
"""

# ruff: noqa: I001 - the order of these lines is the order of the commands in --help
from hpddrnet_trt.cli.program import app, main, run
from hpddrnet_trt.cli.training import train, evaluate, measure_training
from hpddrnet_trt.cli.model import build, calibrate, convert_checkpoint, export, inspect, ship
from hpddrnet_trt.cli.precision import (
    convert_precision, compare_precisions, sensitivity, choose_precision, calibration_curve, compare,
)  # fmt: skip
from hpddrnet_trt.cli.inference import segment, watch
from hpddrnet_trt.cli.measure import benchmark, report, profile, engines
from hpddrnet_trt.cli.data import check_dataset, simulate

__all__ = [
    "app", "benchmark", "build", "calibrate", "calibration_curve", "check_dataset", "choose_precision",
    "compare", "compare_precisions", "convert_checkpoint", "convert_precision", "engines", "evaluate", "export",
    "inspect", "main", "measure_training", "profile", "report", "run", "segment", "sensitivity", "ship", "simulate",
    "train", "watch",
]  # fmt: skip
