"""A network whose accuracy and cost are known by formula: each layer has its harm and its time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from hpddrnet_trt.accuracy.evaluator import Accuracy

REFERENCE = 0.9


def accuracy(lost: float, **changes: Any) -> Accuracy:
    """An accuracy that lost this fraction of everything."""
    fields: dict[str, Any] = {
        "miou": REFERENCE - lost, "masked_miou": REFERENCE - lost, "reference_miou": REFERENCE,
        "reference_masked_miou": REFERENCE, "agreement": 1 - lost,
        "class_ious": {"matrix": 1.0, "pore": 1 - 2 * lost}, "images": 2, "runtime": "formula",
    }  # fmt: skip
    return Accuracy(**{**fields, **changes})


class FakeCache:
    """Stands in for :class:`~hpddrnet_trt.accuracy.candidates.CandidateCache`; counts what is measured."""

    def __init__(self, harms: Mapping[str, float], rounding: float = 0.0) -> None:
        self.harms, self.rounding = harms, rounding
        self.config = SimpleNamespace(layers=tuple(harms), precision="int8")
        self.evaluator = SimpleNamespace(source="formula/val")
        self.measured: list[frozenset[str]] = []

    def measure(self, layers: Collection[str], *, half: bool = False) -> Accuracy:
        self.measured.append(frozenset(layers))
        return accuracy(sum(self.harms[name] for name in layers) + (self.rounding if half else 0.0))


@dataclass(frozen=True)
class FakeCost:
    """A millisecond for each layer, and more for one left in floating point."""

    slower: Mapping[str, float]
    source: str = "formula"

    def __call__(self, quantized: Collection[str]) -> float:
        return sum(1.0 if name in quantized else 1.0 + more for name, more in self.slower.items())
