"""The runner inside another program: without PyTorch, and as docs/embedding.md says."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hpddrnet_trt
from tests.test_layers import HEAVY
from tests.toy import grey_image, manifest, write_toy_onnx

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "embedding.md"
EXAMPLE = REPOSITORY / "examples" / "embed_in_your_program.py"
# (mark, code) of each block; the mark is the comment on the line before it.
BLOCKS = re.findall(r"(?:<!-- (.*?) -->\n)?```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)

BLOCKED = """
import json, runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in blocked:
            raise ImportError('blocked: ' + name)

blocked, script, arguments = json.loads(sys.argv[1])
sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError:
    pass
else:
    raise AssertionError('torch is not blocked')
sys.argv = [script, *arguments]
runpy.run_path(script, run_name='__main__')
print(json.dumps(sorted({name.split('.')[0] for name in sys.modules} & set(blocked))))
"""


def _run(allowed: set[str], *arguments: str | Path) -> str:
    """Run the example where only the ``allowed`` ones of the heavy libraries can be imported."""
    blocked = [name for name in HEAVY if name not in allowed]
    job = json.dumps([blocked, str(EXAMPLE), [str(argument) for argument in arguments]])
    child = subprocess.run(
        [sys.executable, "-c", BLOCKED, job], capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    *printed, loaded = child.stdout.splitlines()
    assert json.loads(loaded) == []
    return "\n".join(printed)


RUNTIMES = {
    "onnxruntime": {"onnxruntime"},
    "openvino": {"openvino", "onnx"},  # and no ONNX Runtime
}


@pytest.mark.parametrize("engine", RUNTIMES)
def test_a_program_without_pytorch(tmp_path: Path, engine: str) -> None:
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    Image.fromarray(grey_image(40, 60)).save(tmp_path / "frame.png")
    model = write_toy_onnx(tmp_path / "m.onnx", manifest())
    printed = _run(RUNTIMES[engine], tmp_path / "frame.png", "--model", model, "--engine", engine)
    assert printed.startswith(f"by {engine} ")
    assert "PyTorch is not loaded" in printed
    assert "60 x 40 pixels, pixel size unknown, by toy" in printed
    assert {name for name in ("grain", "pore", "clay") if name in printed} == {"grain", "pore", "clay"}


def test_a_real_micrograph_with_the_shipped_model(sem_data: Path) -> None:
    picture = next(path for path in sorted((sem_data / "nasa-super1").rglob("*.png")) if "mask" not in path.name)
    printed = _run(RUNTIMES["onnxruntime"], picture)
    assert "PyTorch is not loaded" in printed
    assert re.search(r"512 x 512 pixels, .* by ", printed)
    assert sum(float(share) for share in re.findall(r" ([\d.]+) %", printed)) == pytest.approx(100, abs=0.1)


def test_every_block_of_the_document_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order and in one namespace, as a reader would; those that need a GPU are compiled only."""
    monkeypatch.chdir(tmp_path)
    has_openvino = importlib.util.find_spec("openvino") is not None
    names = {"frame": np.ascontiguousarray(grey_image(96, 128, seed=3))}
    ran = 0
    for mark, code in BLOCKS:
        block = compile(code, str(DOCUMENT), "exec")
        assert mark in ("", "needs a GPU")
        if mark or ("openvino" in code and not has_openvino):
            continue
        exec(block, names)
        ran += 1
    assert ran >= len(BLOCKS) - 2
    printed = capsys.readouterr().out
    assert "'secondary': " in printed  # area fractions
    assert "model_of_yesterday.engine does not exist" in printed
    assert "expected a grey image [height, width], got an array of shape (1, 96, 128)" in printed
    assert (tmp_path / "labels.png").is_file()


def test_the_document_names_what_exists() -> None:
    assert 0 < len([line for line in BLOCKS[0][1].splitlines() if line.strip()]) <= 6  # as its heading says
    text = DOCUMENT.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"`(hpddrnet_trt(?:\.\w+)+)`", text)):
        module, _, name = dotted.rpartition(".")
        found = importlib.util.find_spec(dotted) if module == "hpddrnet_trt" else None
        assert found is not None or hasattr(importlib.import_module(module), name), dotted
    for path in set(re.findall(r"`(hpddrnet_trt/[\w/]+\.py)`", text)):
        assert (REPOSITORY / path).is_file(), path
    for name in hpddrnet_trt.__all__:
        assert getattr(hpddrnet_trt, name) is not None
    assert (Path(hpddrnet_trt.__file__).parent / "py.typed").is_file()
