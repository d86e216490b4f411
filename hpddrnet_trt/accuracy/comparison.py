"""What a comparison of two files of one model found: layers, labels, a text for people and a record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.graph.layers import short

# A quantiser that could hold values this many times larger than any seen wastes two bits; nasa-super1 in INT8
# (``max``) reaches 1.7 on 4 crops of 512x512 from val and test.
WIDE = 4.0
_CLIPPED = 0.7  # and one that holds less than this share of the largest value seen cuts much off
NEAR = 2  # pixels from a border between classes
_SHOWN = 10


@dataclass(frozen=True)
class LayerError:
    """One layer; errors are relative RMS (0.01: one percent), infinite where values are not finite.

    ``error`` is all of it, ``inherited`` the largest of the layers it reads, ``own`` what it makes on A's
    activations. Two parts of ``own``: ``input_rounding`` (its inputs, quantised and dequantised) and
    ``constants`` (kernel, bias). ``span``: what the quantiser of an input could hold over the largest
    value seen, farthest from 1; None without an integer quantiser. ``largest`` is the largest absolute
    difference, at index ``place`` of the tensor for ``image``.
    """

    name: str
    operator: str
    block: str
    tensor: str
    error: float
    inherited: float
    own: float
    sqnr_db: float
    cosine: float
    input_rounding: float
    constants: float
    span: float | None
    largest: float
    place: tuple[int, ...]
    image: str

    @property
    def growth(self) -> float:
        """Error over inherited error; 1 where there is none to inherit."""
        return self.error / self.inherited if self.inherited > 0 and math.isfinite(self.inherited) else 1.0

    def reason(self) -> str:
        """Where the error it makes comes from, in words."""
        if not math.isfinite(self.own) or not math.isfinite(self.error):
            return "its values are not finite"
        if self.span is not None and self.span > WIDE:
            return f"the quantiser of its input could hold values {self.span:.1f} times larger than any seen"
        if self.constants >= self.input_rounding and self.constants > 0:
            return f"its weights differ by {_percent(self.constants)}"
        if self.input_rounding > 0:
            clipped = (
                f"; the input's largest value is {1 / self.span:.1f} times what its quantiser can hold"
                if self.span is not None and self.span < _CLIPPED
                else ""
            )
            return f"its input is rounded by {_percent(self.input_rounding)}{clipped}"
        return "the operator computes something else"


@dataclass(frozen=True)
class LabelAgreement:
    """Labels of B against those of A. ``counts``: pixels, int64 ``[classes, classes + 1]`` of (A, B)."""

    class_names: list[str]
    counts: npt.NDArray[np.int64]
    worst_crop: float  # agreement, fraction
    near_borders: float  # share of the differing pixels within 2 pixels of a border between A's classes

    @property
    def agreement(self) -> float:
        """Share of equal labels."""
        return float(np.trace(self.counts) / max(self.counts.sum(), 1))

    def rows(self) -> list[dict[str, Any]]:
        """Per class of A: share of all pixels, share kept in B, IoU of the two, and what it becomes most often."""
        square = self.counts[:, : len(self.class_names)]
        rows = []
        for index, name in enumerate(self.class_names):
            pixels, hit = int(self.counts[index].sum()), int(square[index, index])
            union = pixels + int(square[:, index].sum()) - hit
            lost = self.counts[index].copy()
            lost[index] = 0
            to = int(lost.argmax())
            rows.append({
                "class": name,
                "share": pixels / max(int(self.counts.sum()), 1),
                "kept": hit / pixels if pixels else math.nan,
                "iou": hit / union if union else math.nan,
                "differing_pixels": int(lost.sum()),
                "mostly_becomes": [*self.class_names, "no class"][to] if lost[to] else None,
            })  # fmt: skip
        return rows


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``layers`` in the order of B's graph, empty where only labels could be compared."""

    a: str
    b: str
    layers: list[LayerError]
    scores: LayerError | None  # the class scores before the last resize and arg-max
    labels: LabelAgreement
    crops: str
    limit: float
    runtime: str
    remarks: list[str] = field(default_factory=list)

    @property
    def first(self) -> LayerError | None:
        """The first layer that diverges by itself: ``own`` above the limit, or a quantiser far too wide."""
        return next((layer for layer in self.layers if self.diverges(layer)), None)

    def diverges(self, layer: LayerError) -> bool:
        """Whether a layer's own error, or the width of its input's quantiser, is beyond its limit."""
        return layer.own > self.limit or (layer.own > 0 and layer.span is not None and layer.span > WIDE)

    def worst(self, count: int = _SHOWN) -> list[LayerError]:
        """Layers that make an error, largest first."""
        return sorted((layer for layer in self.layers if layer.own > 0), key=lambda layer: -layer.own)[:count]

    def amplifiers(self, count: int = 3) -> list[LayerError]:
        """Layers that at least double an error they inherit while making little themselves."""
        found = [layer for layer in self.layers if layer.growth > 2 and layer.own < layer.error / 2]
        return sorted(found, key=lambda layer: -layer.growth)[:count]

    def blocks(self) -> list[dict[str, Any]]:
        """Per block: layers, the largest own error, and the error of its last layer."""
        found: dict[str, list[LayerError]] = {}
        for layer in self.layers:
            found.setdefault(layer.block, []).append(layer)
        return [
            {
                "block": name,
                "layers": len(layers),
                "own": max(layer.own for layer in layers),
                "error": layers[-1].error,
            }
            for name, layers in found.items()
        ]

    def record(self) -> dict[str, Any]:
        """Everything, for JSON: fractions; null stands for a value that is not finite."""
        worst = self.worst(len(self.layers))
        whole = {
            "a": self.a,
            "b": self.b,
            "data": self.crops,
            "runtime": self.runtime,
            "limit": self.limit,
            "widest_span": WIDE,
            "first_divergence": self.first.name if self.first else None,
            "ranking": [layer.name for layer in worst],
            "scores": asdict(self.scores) if self.scores else None,
            "labels": {
                "agreement": self.labels.agreement,
                "worst_crop": self.labels.worst_crop,
                "differences_near_borders": self.labels.near_borders,
                "counts": self.labels.counts.tolist(),
                "classes": self.labels.rows(),
            },
            "blocks": self.blocks(),
            "layers": [asdict(layer) for layer in self.layers],
            "remarks": self.remarks,
        }
        finite: dict[str, Any] = _finite(whole)
        return finite

    def text(self) -> str:
        """What matters, for people."""
        parts = [f"A: {self.a}\nB: {self.b}\n{self.crops}; {self.runtime}", self._label_text()]
        if self.layers:
            parts += [self._verdict(), self._layer_text(), self._block_text()]
        parts += [f"note: {remark}" for remark in self.remarks]
        return "\n\n".join(parts)

    def _label_text(self) -> str:
        found = self.labels
        lines = [
            f"labels: {100 * found.agreement:.3f} % equal (worst crop {100 * found.worst_crop:.3f} %)"
            + (
                f"; {100 * found.near_borders:.0f} % of the differences lie within {NEAR} pixels of a border between "
                "classes" if found.agreement < 1 else ""
            )
        ]  # fmt: skip
        width = max(len(name) for name in [*found.class_names, "class in A"])
        lines.append(f"  {'class in A':<{width}}  share %  kept %  IoU %  mostly becomes")
        for row in found.rows():
            kept, iou = (f"{100 * row[key]:.2f}" if row[key] == row[key] else "-" for key in ("kept", "iou"))
            share, becomes = 100 * row["share"], row["mostly_becomes"] or "-"
            lines.append(f"  {row['class']:<{width}}  {share:7.2f}  {kept:>6}  {iou:>5}  {becomes}")
        if self.scores is not None:
            lines.append(
                f"class scores: error {_percent(self.scores.error)}, SQNR {_db(self.scores.sqnr_db)}, cosine "
                f"{self.scores.cosine:.6f}, largest difference {self.scores.largest:.3g}"
            )
        return "\n".join(lines)

    def _verdict(self) -> str:
        first = self.first
        if first is None:
            made = max((layer.own for layer in self.layers), default=0.0)
            found = "every activation is equal" if all(layer.error == 0 for layer in self.layers) else (
                f"the largest error that a layer makes by itself is {_percent(made)} (limit {_percent(self.limit)})"
            )  # fmt: skip
            lines = [f"no layer diverges: {found}"]
        else:
            others = sum(self.diverges(layer) for layer in self.layers) - 1
            lines = [
                f"first layer that diverges: {first.name} ({first.operator}, tensor {first.tensor})\n"
                f"  it makes {_percent(first.own)} by itself, on inputs that are off by {_percent(first.inherited)}: "
                f"{first.reason()}\n"
                f"  largest difference {first.largest:.3g} at {list(first.place)} for {first.image}"
                + (f"\n  {others} later layer{'s' * (others > 1)} diverge{'s' * (others == 1)} too" if others else "")
            ]
        for layer in self.amplifiers():
            lines.append(
                f"passed on, not made: {short(layer.name)} ({layer.operator}) turns {_percent(layer.inherited)} "
                f"into {_percent(layer.error)}"
            )
        return "\n".join(lines)

    def _layer_text(self) -> str:
        worst = self.worst()
        if not worst:
            return "no layer makes an error"
        width = max(len(short(layer.name)) for layer in worst)
        lines = [
            "layers that make the largest error by themselves, % of the values' RMS",
            f"  {'layer':<{width}}  {'operator':<10}     own     all  inputs  rounding  weights  span    SQNR  cosine",
        ]
        for layer in worst:
            span = "-" if layer.span is None else f"{layer.span:.2g}"
            lines.append(
                f"  {short(layer.name):<{width}}  {layer.operator[:10]:<10}  {_cell(layer.own)}  {_cell(layer.error)}  "
                f"{_cell(layer.inherited)}   {_cell(layer.input_rounding)}   {_cell(layer.constants)}  {span:>4}  "
                f"{_db(layer.sqnr_db):>6}  {layer.cosine:.4f}"
            )
        return "\n".join(lines)

    def _block_text(self) -> str:
        blocks = self.blocks()
        width = max(len(row["block"]) for row in blocks)
        lines = ["blocks: largest own error of a layer, and the error of the last layer, %"]
        lines += [
            f"  {row['block']:<{width}}  {row['layers']:3d} layers  {_cell(row['own'])}  {_cell(row['error'])}"
            for row in blocks
        ]
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %" if math.isfinite(error) else "infinite"


def _cell(error: float) -> str:
    """An error in percent, seven characters."""
    if not math.isfinite(error):
        return "    inf"
    return f"{100 * error:7.3f}" if 100 * error < 1000 else f"{100 * error:7.1e}"


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else ("exact" if value > 0 else "none")
