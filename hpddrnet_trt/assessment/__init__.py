"""How good a model is, and where it fails: figures of a split and of each image, robustness, the report."""

from __future__ import annotations

from hpddrnet_trt.assessment.collect import assess
from hpddrnet_trt.assessment.learning_curves import Curves, curves_beside
from hpddrnet_trt.assessment.report import check_target, write_report
from hpddrnet_trt.assessment.results import Assessment
from hpddrnet_trt.assessment.robustness import Robustness, measure_robustness

__all__ = [
    "Assessment",
    "Curves",
    "Robustness",
    "assess",
    "check_target",
    "curves_beside",
    "measure_robustness",
    "write_report",
]
