"""The picture of an engine's graph: every layer once, what it reads above it, conversions marked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import EngineRecord
from hpddrnet_trt.report.engine_graph import draw_graph
from hpddrnet_trt.report.style import BLUE, GREEN, ORANGE

SVG = "{http://www.w3.org/2000/svg}"


def layer(name: str, inputs: str, outputs: str, precision: str = "fp16", conversion: bool = False) -> dict[str, Any]:
    return {"name": name, "type": "CONVOLUTION", "inputs": inputs.split(), "outputs": outputs.split(),
            "precision": precision, "conversion": conversion}  # fmt: skip


LAYERS = [
    layer("backbone.stem.0.conv/Conv", "image", "a"),
    layer("left & <right>", "a", "b", "int8"),
    layer("beside", "a", "c", "uint8"),
    layer("a name that is far too long to be written into its box", "b", "d", conversion=True),
    layer("sum", "d c a", "labels"),
]


def record(layers: list[dict[str, Any]]) -> EngineRecord:
    return EngineRecord(
        runtime="tensorrt", version="11.4", compute_capabilities=["8.9"], profiles=[], sha256="0", bytes=2_500_000,
        layer_precision={"source": "engine inspector", "graph": layers}, build_seconds=1.0,
    )  # fmt: skip


def test_every_layer_below_what_it_reads(tmp_path: Path) -> None:
    root = ElementTree.parse(draw_graph(record(LAYERS), tmp_path / "m.svg", "m.engine")).getroot()
    boxes: dict[str, Any] = {}
    for group in root.iter(f"{SVG}g"):
        if (title := group.find(f"{SVG}title")) is not None:
            boxes[str(title.text).split("\n")[0]] = group.find(f"{SVG}rect")
    assert list(boxes) == [entry["name"] for entry in LAYERS]
    x, y = ({name: int(box.get(side)) for name, box in boxes.items()} for side in "xy")
    first, left, beside, conversion, last = boxes
    assert y[first] < y[left] == y[beside] < y[conversion] < y[last]
    assert x[left] != x[beside]
    assert boxes[first].get("fill") == BLUE
    assert boxes[left].get("fill") == GREEN
    assert [name for name, box in boxes.items() if box.get("stroke") == ORANGE] == [conversion]
    assert len(list(root.iter(f"{SVG}path"))) == 6
    text = "\n".join(str(entry.text) for entry in root.iter(f"{SVG}text"))
    assert "tensorrt 11.4, 2.5 MB; 5 layers (engine inspector), 1 of them conversions" in text
    assert "stem.0" in text
    assert re.search("a name that is far too long.*…", text)
    width, height = (int(root.get(side, "0")) for side in ("width", "height"))
    assert width > max(x.values())
    assert height > max(y.values())


@pytest.mark.parametrize(
    ("layers", "target", "says"),
    [(LAYERS, "m.png", r"must end with \.svg; write .*m\.svg"), ([], "m.svg", "kept no graph; build it again")],
)
def test_refusals(tmp_path: Path, layers: list[dict[str, Any]], target: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        draw_graph(record(layers), tmp_path / target, "m.engine")
    assert not list(tmp_path.iterdir())
