"""How an entry looks in every figure: colour by runtime, marker and line by precision, filling for what is left."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from hpddrnet_trt.benchmark.result import BenchmarkResult, Row

# Okabe and Ito's colours, told apart with any colour vision; the longest matching start of the label counts.
_COLOURS = {
    "PyTorch": "#555555", "torch.compile": "#B88600", "ONNX Runtime": "#0072B2",
    "OpenVINO": "#C0649B", "TensorRT": "#00875F", "TensorRT-RTX": "#D55E00",
}  # fmt: skip
_COMPILED = "compile"  # anywhere in the label of a PyTorch entry
_OTHERS = ("#8C6D1F", "#000000", "#6A51A3")
_MARKERS = {"FP32": "o", "FP16": "s", "BF16": "D", "INT8": "^", "FP8": "v"}
_LINES = {"FP16": "--", "BF16": "-.", "INT8": ":", "FP8": (0, (1, 2, 4, 2))}
_HATCHES = {"FP16": "//", "BF16": "\\\\", "INT8": "..", "FP8": "xx"}
_FILLINGS = ("full", "none", "left", "top", "right", "bottom")  # further entries of the same runtime and precision


class Look(NamedTuple):
    """Colour, matplotlib marker, line style, marker filling and hatch."""

    colour: str
    marker: str
    line: Any
    filling: str
    hatch: str | None

    def point(self) -> dict[str, Any]:
        """Arguments of ``plot`` for markers that stand on each other and still show."""
        return {
            "color": self.colour, "marker": self.marker, "fillstyle": self.filling, "markerfacecoloralt": "white",
            "markeredgecolor": self.colour,
        }  # fmt: skip


def looks(result: BenchmarkResult) -> dict[str, Look]:
    """The look of each entry by label; two are the same only when a runtime and precision has more than six."""
    found: dict[str, Look] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for place, row in enumerate(result.rows):
        precision = row.precision or ""
        colour, marker = _colour(row, place), _MARKERS.get(precision, "P")
        filling = _FILLINGS[seen[colour, marker] % len(_FILLINGS)]
        seen[colour, marker] += 1
        found[row.label] = Look(colour, marker, _LINES.get(precision, "-"), filling, _HATCHES.get(precision))
    return found


def _colour(row: Row, place: int) -> str:
    known = [name for name in _COLOURS if row.label.startswith(name)]
    if known == ["PyTorch"] and _COMPILED in row.label:
        return _COLOURS["torch.compile"]
    return _COLOURS[max(known, key=len)] if known else _OTHERS[place % len(_OTHERS)]
