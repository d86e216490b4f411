"""The graph of an engine as a picture: layers from top to bottom, colored by precision, conversions marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.files import write_bytes
from hpddrnet_trt.core.manifest import EngineRecord
from hpddrnet_trt.core.text import megabytes
from hpddrnet_trt.graph.layers import short
from hpddrnet_trt.report.style import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PINK, SKY

_PRECISIONS = {"fp32": GREY, "fp16": BLUE, "bf16": SKY, "int8": GREEN, "fp8": PINK}
_OTHER = PALE  # of layers on whole numbers, such as sizes and labels
_WIDTH, _HEIGHT = 236, 34  # of a layer, in pixels
_RIGHT, _DOWN = 256, 58  # from layer to layer
_MARGIN, _TOP = 24, 96
_LONGEST = 34  # characters of a name

Layer = Mapping[str, Any]


def draw_graph(record: EngineRecord, target: str | Path, title: str) -> Path:
    """Write an SVG of the layers that :mod:`~hpddrnet_trt.export.layer_precision` keeps in an engine's description.

    Pointing at a layer shows its full name and type. Raises :class:`UsageError` for an engine without them and for a
    file that is none.
    """
    path = Path(target)
    if path.suffix.lower() != ".svg":
        raise UsageError(f"the picture {path} must end with .svg; write {path.with_suffix('.svg')}")
    layers: list[Layer] = record.layer_precision.get("graph", [])
    if not layers:
        raise UsageError(f"{title} was built by an older version, which kept no graph; build it again")
    places = _places(layers)
    width = max(x for x, _ in places) + _WIDTH + 2 * _MARGIN
    height = max(y for _, y in places) + _HEIGHT + _TOP + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_head(record, layers, title),
        f'<g transform="translate({_MARGIN} {_TOP})">',
        *(_edge(places[start], places[end]) for start, end in _edges(layers)),
        *(_box(layer, *place) for layer, place in zip(layers, places, strict=True)),
        "</g></svg>",
    ]
    return write_bytes(path, "\n".join(parts).encode())


def _edges(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """(maker, reader) by place in ``layers``."""
    made = {name: index for index, layer in enumerate(layers) for name in layer["outputs"]}
    return [
        (made[name], index)
        for index, layer in enumerate(layers)
        for name in dict.fromkeys(layer["inputs"])
        if name in made and made[name] != index
    ]


def _places(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """Top-left corners: each layer below all that it reads, beside others of its row in the order of what they read."""
    makers: dict[int, list[int]] = {}
    for start, end in _edges(layers):
        makers.setdefault(end, []).append(start)
    rows: list[int] = []
    for index in range(len(layers)):  # a layer is listed behind those that it reads
        rows.append(1 + max((rows[maker] for maker in makers.get(index, []) if maker < index), default=-1))
    columns = [0.0] * len(layers)
    for row in range(max(rows) + 1):
        members = [index for index, own in enumerate(rows) if own == row]
        above = {index: [columns[maker] for maker in makers.get(index, []) if maker < index] for index in members}
        members.sort(key=lambda index: sum(above[index]) / max(len(above[index]), 1))
        taken = -1.0
        for index in members:
            wanted = round(sum(above[index]) / max(len(above[index]), 1))
            columns[index] = taken = max(wanted, taken + 1)
    return [(int(column) * _RIGHT, row * _DOWN) for column, row in zip(columns, rows, strict=True)]


def _head(record: EngineRecord, layers: Sequence[Layer], title: str) -> list[str]:
    source = record.layer_precision["source"]
    conversions = sum(layer["conversion"] for layer in layers)
    lines = [
        f'<text x="{_MARGIN}" y="30" font-size="17" font-weight="bold">{escape(title)}</text>',
        f'<text x="{_MARGIN}" y="50" fill="{GREY}">{record.runtime} {record.version}, {megabytes(record.bytes)}; '
        f"{len(layers)} layers ({source}), {conversions} of them conversions</text>",
    ]
    counts = Counter(layer["precision"] for layer in layers)
    x = _MARGIN
    for kind in [*filter(counts.get, _PRECISIONS), "conversion"]:
        fill, stroke, dash = _look(kind, kind == "conversion")
        lines.append(f'<rect x="{x}" y="62" width="22" height="14" rx="3" fill="{fill}" stroke="{stroke}"{dash}/>')
        shown = kind.upper() if kind in _PRECISIONS else kind
        lines.append(f'<text x="{x + 28}" y="73">{shown}</text>')
        x += 90
    return lines


def _look(precision: str, conversion: bool) -> tuple[str, str, str]:
    """Fill, outline and dashes of a layer."""
    if conversion:
        return "white", ORANGE, ' stroke-width="2.5" stroke-dasharray="5 3"'
    return _PRECISIONS.get(precision, _OTHER), AMBER if precision not in _PRECISIONS else BLACK, ""


def _box(layer: Layer, x: int, y: int) -> str:
    conversion = layer["conversion"]
    fill, stroke, dash = _look(layer["precision"], conversion)
    dark = not conversion and layer["precision"] in ("fp32", "fp16", "int8")
    color = "white" if dark else BLACK
    name = short(layer["name"]) or layer["type"]
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    about = f"{layer['name']}\n{layer['type']}, {layer['precision']}"
    return (
        f"<g><title>{escape(about)}</title>"
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5" fill="{fill}" stroke="{stroke}"{dash}/>'
        f'<text x="{x + 8}" y="{y + 14}" fill="{color}">{escape(name)}</text>'
        f'<text x="{x + 8}" y="{y + 27}" fill="{color}" font-size="9.5">'
        f"{escape(str(layer['type']).lower())}, {escape(str(layer['precision']))}</text></g>"
    )


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    """To the next row directly; past other rows through the gap beside the column, so that no layer hides it."""
    x1, y1, x2, y2 = start[0] + _WIDTH // 2, start[1] + _HEIGHT, end[0] + _WIDTH // 2, end[1]
    half = (_DOWN - _HEIGHT) // 2
    path = f"M{x1} {y1}C{x1} {y1 + half} {x2} {y2 - half} {x2} {y2}"
    if end[1] - start[1] > _DOWN:
        gap = (x2 if x2 < x1 else x1) + _RIGHT // 2
        path = f"M{x1} {y1}Q{gap} {y1} {gap} {y1 + half}V{y2 - half}Q{gap} {y2} {x2} {y2}"
    return f'<path d="{path}" fill="none" stroke="{GREY}"/>'
