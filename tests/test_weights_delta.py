"""The checkpoint of a shipped model: kept as a delta, given bit for bit, or refused in a sentence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.weights import CHECKPOINT, DEFAULT, FOLDER, delta, locate


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HPDDRNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_shipped_checkpoint_is_the_one_that_the_files_were_made_from(cache: Path) -> None:
    path = locate(DEFAULT, CHECKPOINT)
    assert path.name == f"{DEFAULT}.safetensors"
    assert path.is_relative_to(cache)
    assert digest(path) == read_manifest(FOLDER / f"{DEFAULT}.onnx").checkpoint_sha256
    assert digest(path) == read_manifest(FOLDER / f"{DEFAULT}.int8.onnx").checkpoint_sha256
    written = path.stat().st_mtime_ns
    assert locate(DEFAULT, CHECKPOINT).stat().st_mtime_ns == written  # once
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # damaged in the cache
    assert digest(locate(DEFAULT, CHECKPOINT)) == delta.checksum(FOLDER / f"{DEFAULT}.delta")


def test_without_a_folder_to_keep_it(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    path = locate(DEFAULT, CHECKPOINT)
    assert not path.is_relative_to(cache)
    assert digest(path) == delta.checksum(FOLDER / f"{DEFAULT}.delta")
    assert locate(DEFAULT, CHECKPOINT) == path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with every kind of tensor, and an ONNX file with some of its kernels, folded."""
    random = np.random.default_rng(0)
    kernel = random.normal(size=(4, 3, 3, 3)).astype(np.float16)
    kernel[0] = 0
    kernel[1, 0, 0, :2] = [np.float16(-0.0), np.float16(6e-8)]
    odd = random.normal(size=(4, 3, 3, 3)).astype(np.float16)
    save_file(
        {"kernel": kernel, "odd": odd, "vector": np.ones(5, np.float16), "bias": random.normal(size=4),
         "steps": np.array(7, np.int64), "empty": np.zeros((0, 2), np.float16),
         "infinite": np.array([[np.inf, np.nan, 65504, -np.inf]], np.float16)},
        tmp_path / "a.safetensors", {"note": "kept"},
    )  # fmt: skip
    folded = (kernel * random.uniform(-2, 2, (4, 1, 1, 1))).astype(np.float16)
    initializers = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in {"k": folded, "far": odd[::-1].copy(), "i": np.ones((1, 4), np.float16)}.items()
    ]
    graph = onnx.helper.make_graph([], "g", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "a.onnx"))
    return tmp_path / "a.safetensors", tmp_path / "a.onnx"


def test_any_checkpoint_comes_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, graph = pair
    target = tmp_path / "a.delta"
    target.write_bytes(delta.make(checkpoint, graph))
    assert b'"predicted": {"kernel": "k"}' in target.read_bytes()
    assert delta.restore(target, graph) == checkpoint.read_bytes()


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "no stream", "other format", "other graph", "bomb"])
def test_a_damaged_delta_is_refused_in_a_sentence(pair: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    checkpoint, graph = pair
    target = tmp_path / "a.delta"
    content = delta.make(checkpoint, graph)
    line = content[: content.index(b"\n")]
    changed = bytearray(content)
    changed[-20] ^= 0x55
    target.write_bytes(
        {
            "empty": b"", "cut": content[:-40], "changed": bytes(changed), "no stream": line,
            "other format": content.replace(b"delta 1", b"delta 9"), "other graph": content,
            "bomb": line + b"\n" + delta.zlib.compress(bytes(1 << 20)),
        }[damage]
    )  # fmt: skip
    if damage == "other graph":
        graph = FOLDER / f"{DEFAULT}.onnx"
    with pytest.raises(BadInputFile, match=r"a\.delta .*damaged.*; install hpddrnet-trt again$"):
        delta.restore(target, graph)
