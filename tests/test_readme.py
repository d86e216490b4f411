"""The README's embedding example runs as printed, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hpddrnet_trt
from hpddrnet_trt.export.onnx import ExportOptions, export_network
from tests.tiny_network import tiny_manifest, tiny_network

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_embedding_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    monkeypatch.chdir(tmp_path)
    network = tiny_network()
    export_network(network, tiny_manifest(network), "model.onnx", ExportOptions(1, 104, 152), verify=False)
    frame = np.random.default_rng(0).integers(0, 256, (99, 147), dtype=np.uint8)
    exec(compile(code, "README.md", "exec"), {"frame": frame})
    assert "phase 0" in capsys.readouterr().out
    with Image.open("labels.png") as labels:
        assert labels.size == (147, 99)


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (REPOSITORY / target).exists()] == []


def test_public_names() -> None:
    for name in hpddrnet_trt.__all__:
        assert getattr(hpddrnet_trt, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        hpddrnet_trt.nonsense  # noqa: B018
