"""Figures of a result as words, one way for the terminal, the page and the pictures."""

from __future__ import annotations

from hpddrnet_trt.benchmark.result import Accuracy, BenchmarkResult, Ratio, Row
from hpddrnet_trt.core.text import number


def ratio_text(ratio: Ratio | None) -> str:
    """E.g. ``2.46× [2.41, 2.52]``; says so when the interval is wide or missing, or the rows were not interleaved."""
    return "–" if ratio is None else f"{number(ratio.value)}× {interval_text(ratio)}"


def interval_text(ratio: Ratio) -> str:
    """E.g. ``[2.41, 2.52] (wide, not interleaved)``."""
    if ratio.low is None or ratio.high is None:
        return "(too few rounds for an interval)"
    doubts = [word for word, said in (("wide", ratio.wide), ("not interleaved", not ratio.paired)) if said]
    text = f"[{number(ratio.low)}, {number(ratio.high)}]"
    return f"{text} ({', '.join(doubts)})" if doubts else text


def miou_change(result: BenchmarkResult, row: Row) -> float | None:
    """mIoU minus the reference's, in points (hundredths); None for the reference and without masks."""
    own, reference = miou(row.accuracy), miou(accuracy_of_reference(result))
    if row.label == result.reference or own is None or reference is None:
        return None
    return 100 * (own - reference)


def accuracy_of_reference(result: BenchmarkResult) -> Accuracy | None:
    return next((row.accuracy for row in result.rows if row.label == result.reference), None)


def miou(accuracy: Accuracy | None) -> float | None:
    return None if accuracy is None else accuracy.miou


def points(change: float) -> str:
    """E.g. ``−0.12`` or ``+0.03``, with a real minus sign; ``±0.00`` for what rounds to nothing."""
    text = f"{change:+.2f}"
    return "±0.00" if text[1:] == "0.00" else text.replace("-", "−")


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".")
