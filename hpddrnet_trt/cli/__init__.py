"""The command line: `hpddrnet-trt <command>`. A command is one documented function.

The recipes (`train/train.py`, `export/build_engine.py`, ...) run these same functions.
"""

# ruff: noqa: I001 - the order of these lines is the order of the commands in --help
from hpddrnet_trt.cli.program import app, main, run
from hpddrnet_trt.cli.inference import segment, watch
from hpddrnet_trt.cli.mosaic import mosaic
from hpddrnet_trt.cli.data import datasets, evaluate, recipes, train
from hpddrnet_trt.cli.model import build, calibrate, choose_precision, convert_checkpoint, export, inspect, refit
from hpddrnet_trt.cli.packages import adopt, package
from hpddrnet_trt.cli.measure import benchmark, compare, engines

__all__ = [
    "adopt", "app", "benchmark", "build", "calibrate", "choose_precision", "compare", "convert_checkpoint", "datasets",
    "engines", "evaluate", "export", "inspect", "main", "mosaic", "package", "recipes", "refit", "run", "segment",
    "train", "watch",
]  # fmt: skip
