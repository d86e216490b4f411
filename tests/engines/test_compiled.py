"""Compiled graphs are kept for the next start: found again, bounded, and never trusted when damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.engines import compiled as module
from hpddrnet_trt.engines.openvino import OpenVINOEngine
from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HPDDRNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / module.FOLDER


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    done: list[object] = []
    real = OpenVINOEngine._read

    def read(self: OpenVINOEngine) -> object:
        done.append(self)
        return real(self)

    monkeypatch.setattr(OpenVINOEngine, "_read", read)
    return done


def labels(path: Path, size: int = 32, **options: object) -> np.ndarray:
    with OpenVINOEngine(path, threads=1, **options) as engine:  # type: ignore[arg-type]
        return engine.infer(grey_image(size, size)[None, None]).labels


def test_a_second_start_does_not_compile(tmp_path: Path, cache: Path, compilations: list[object]) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    first = labels(path)
    assert len(compilations) == 2  # to open, and to compile
    assert len(list(cache.glob("*.blob"))) == 1
    assert np.array_equal(labels(path), first)
    assert len(compilations) == 2
    labels(path, 40)
    labels(path, defaults=True)  # compared with, not kept
    labels(write_toy_onnx(tmp_path / "other.onnx", manifest(name="other")))
    assert len(list(cache.glob("*.blob"))) == 3


def test_a_changed_file_is_checked_again(tmp_path: Path, cache: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    labels(path)
    for note in cache.glob("*.json"):
        note.write_text('["other"')
    assert labels(path).shape == (1, 32, 32)
    model = onnx.load(str(path))
    model.graph.node[1].input[1] = "nothing"
    onnx.save(model, str(path))
    with pytest.raises(BadInputFile, match="is refused"):
        labels(path)


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "foreign"])
def test_a_damaged_graph_is_compiled_again(
    tmp_path: Path, cache: Path, compilations: list[object], damage: str
) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    first = labels(path)
    (kept,) = cache.glob("*.blob")
    content = bytearray(kept.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 1
    foreign = b"no graph"
    kept.write_bytes(
        {
            "empty": b"", "cut": content[:-10], "changed": bytes(content),
            "foreign": module.hashlib.sha256(foreign).digest() + foreign,
        }[damage]
    )  # fmt: skip
    assert np.array_equal(labels(path), first)
    assert len(compilations) == 3
    labels(path)
    assert len(compilations) == 3


def test_the_folder_is_bounded_and_need_not_be_writable(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    labels(path)
    monkeypatch.setattr(module, "LIMIT_BYTES", 1)
    labels(path, 40)
    assert list(cache.iterdir()) == []
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    assert labels(path).shape == (1, 32, 32)


def test_processes_share_the_folder(tmp_path: Path, cache: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    code = (
        "import sys; import numpy as np; from hpddrnet_trt.engines.openvino import OpenVINOEngine\n"
        "for size in (32, 40, 48):\n"
        "    with OpenVINOEngine(sys.argv[1], threads=1) as engine:\n"
        "        engine.infer(np.zeros((1, 1, size, size), np.uint8))\n"
    )
    ends: list[int] = []
    threads = [
        threading.Thread(target=lambda: ends.append(subprocess.run([sys.executable, "-c", code, path]).returncode))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == [0, 0, 0]
    assert sorted(file.suffix for file in cache.iterdir()) == [".blob"] * 3 + [".json"]
