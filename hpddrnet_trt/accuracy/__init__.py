"""How good a model is and how much precision it needs: against masks, against FP32, within a budget."""

from __future__ import annotations

from hpddrnet_trt.accuracy.evaluate import Assessment, assess
from hpddrnet_trt.accuracy.robustness import Robustness, measure_robustness

__all__ = [
    "Assessment",
    "Robustness",
    "assess",
    "measure_robustness",
]
