"""What `auto` takes: by file, installation, processor and a check that is remembered; never by the picture."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.engines import choice as module
from hpddrnet_trt.engines import load_engine, opening_of
from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.engines.choice import check_pictures, fastest
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def on_this_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HPDDRNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("hpddrnet_trt.engines.openvino.fast_bf16", lambda: True)


class Tried(list[str]):
    """The precisions in which OpenVINO was opened, and in which it loses what share of the labels (None: fails)."""

    def __init__(self, **lost: float | None) -> None:
        super().__init__()
        self.lost = lost

    def open(self, path: Path, *, precision: str, keep: bool) -> OnnxRuntimeEngine:
        self.append(precision)
        assert not keep  # a size that nobody asks for again
        lost = self.lost.get(precision, 0.0)
        if lost is None:
            raise UserError("no such operator")

        class Losing(OnnxRuntimeEngine):
            def infer(self, images: Any) -> Prediction:
                labels = super().infer(images).labels
                wrong = round(lost * labels.size)
                labels.reshape(-1)[:wrong] = (labels.reshape(-1)[:wrong] + 1) % 3
                return Prediction(labels)

        return Losing(path)


def taken(monkeypatch: pytest.MonkeyPatch, path: Path, tried: Tried) -> tuple[str, dict[str, str]]:
    monkeypatch.setattr("hpddrnet_trt.engines.openvino.OpenVINOEngine", tried.open)
    found = fastest(path)
    return found.engine, found.options


@pytest.mark.parametrize(
    ("lost", "engine", "precision", "opened"),
    [
        ({}, "openvino", "bf16", ["bf16"]),
        ({"bf16": 0.009}, "openvino", "bf16", ["bf16"]),
        ({"bf16": 0.011}, "openvino", "fp32", ["bf16", "fp32"]),
        ({"bf16": None}, "openvino", "fp32", ["bf16", "fp32"]),
        ({"bf16": 0.5, "fp32": 0.002}, "onnxruntime", None, ["bf16", "fp32"]),
        ({"bf16": None, "fp32": None}, "onnxruntime", None, ["bf16", "fp32"]),
    ],
)
def test_the_fastest_that_keeps_the_labels_and_the_verdict_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: Any, engine: str, precision: Any, opened: list[str]
) -> None:
    path, tried = write_toy_onnx(tmp_path / "m.onnx", manifest()), Tried(**lost)
    expected = (engine, {} if precision is None else {"precision": precision})
    assert taken(monkeypatch, path, tried) == expected
    assert tried == opened
    assert taken(monkeypatch, path, tried) == expected
    assert tried == opened  # not tried again
    (kept,) = (tmp_path / "cache" / module.FOLDER).iterdir()
    for damaged in ("", "{}", "[1]", '{"precision": "int4", "share": 1}', '{"precision": "bf16", "share": []}'):
        kept.write_text(damaged)
        assert taken(monkeypatch, path, tried) == expected
    assert len(tried) == 6 * len(opened)
    assert json.loads(kept.read_text())["precision"] == precision


def test_another_file_is_tried_anew_and_a_folder_that_is_only_read_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Tried()
    (tmp_path / "cache").write_text("a file where the folder should be")
    for name in ("first", "second"):
        path = write_toy_onnx(tmp_path / f"{name}.onnx", manifest(name=name))
        assert taken(monkeypatch, path, tried) == ("openvino", {"precision": "bf16"})
    assert tried == ["bf16"] * 2


def test_without_a_border_between_classes_bf16_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tried = write_toy_onnx(tmp_path / "m.onnx", manifest()), Tried()
    monkeypatch.setattr(module, "check_pictures", lambda manifest: [np.zeros((1, 1, 64, 64), np.uint8)])
    assert taken(monkeypatch, path, tried) == ("openvino", {"precision": "fp32"})
    assert tried == ["fp32"]


def test_what_the_processor_the_installation_and_the_file_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tried = write_toy_onnx(tmp_path / "m.onnx", manifest()), Tried()
    cpu_form = write_toy_onnx(tmp_path / "i.onnx", manifest(precision="int8", quantized_for="onnxruntime"))
    trt_form = write_toy_onnx(tmp_path / "t.onnx", manifest(precision="int8", quantized_for="tensorrt"))
    assert taken(monkeypatch, cpu_form, tried)[0] == "onnxruntime"
    assert fastest(path, on_gpu=True).engine == "onnxruntime"
    assert fastest(path, only_fp32=True).options == {"precision": "fp32"}
    assert fastest(trt_form).options == {"precision": "bf16"}
    assert "INT8 and BF16" in fastest(trt_form).why
    assert "calibrate" in fastest(path).why
    monkeypatch.setattr("hpddrnet_trt.engines.openvino.fast_bf16", lambda: False)  # no AMX
    assert fastest(path).options == {"precision": "fp32"}
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert fastest(path).engine == "onnxruntime"
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    assert fastest(path).engine == "onnxruntime"
    assert fastest(path).why == "ONNX Runtime in FP32; OpenVINO is faster: pip install openvino"


GREY = {"data": {"name": "x", "grey_mean": 50.0, "grey_std": 10.0}}


@pytest.mark.parametrize("changes", [{}, GREY, {"input": {"dtype": "float32", "channels": 3, "batch": {"minimum": 2}}}])
def test_check_pictures_follow_the_contract(changes: Any) -> None:
    described = Manifest.model_validate({**manifest(size=48).model_dump(), **changes})
    pictures = check_pictures(described)
    assert described.input is not None
    assert len(pictures) == (8 if described.data else 4)
    assert described.data is None or pictures[-1].mean() == pytest.approx(50, abs=1)
    for picture in pictures:
        assert picture.dtype == described.input.dtype
        assert picture.shape[:2] == (described.input.batch.minimum, described.input.channels)
        assert all(axis.admits(size) for axis, size in
                   zip((described.input.height, described.input.width), picture.shape[2:], strict=True))  # fmt: skip


# --- precision, threads and device, as the command line and load_segmenter give them


def test_a_precision_is_the_files_own_or_openvinos_bf16(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    int8 = write_toy_onnx(tmp_path / "t.onnx", manifest(precision="int8", quantized_for="tensorrt"))
    assert opening_of(path).engine == opening_of(path, "auto", "file").engine == "onnxruntime"
    assert opening_of(path, "auto", "bf16").options == {"precision": "bf16"}
    assert opening_of(path, "onnxruntime", "fp32").options == {}
    assert opening_of(int8, "auto", "int8").engine == "openvino"
    with pytest.raises(UsageError, match=r"onnxruntime engine computes .* in FP32; OpenVINO can do it in BF16"):
        opening_of(path, "onnxruntime", "bf16")
    with pytest.raises(UsageError, match="is FP32, and its engine does not compute it in INT8; make another with"):
        opening_of(path, "auto", "int8")
    with pytest.raises(UsageError, match=r"is INT8, .* in FP32; give the file it was made from"):
        opening_of(int8, "auto", "fp32")
    with pytest.raises(UsageError, match="unknown precision 'int4'; choose one of: file, auto, fp32"):
        opening_of(path, "auto", "int4")  # type: ignore[arg-type]


def test_threads_and_device_reach_the_engine_that_has_them(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    assert opening_of(path, "openvino", "file", {"device": "cpu", "threads": 1}).options == {"threads": 1}
    assert opening_of(path, "auto", "auto", {"device": "cuda:1"}).options == {"device": "cuda:1"}
    assert opening_of(path, "onnxruntime", "file", {"device": 0}).options == {"device": "cuda:0"}
    assert opening_of(path, "onnxruntime", "file", {"device": "1"}).options == {"device": "cuda:1"}
    assert opening_of(Path("m.engine"), "tensorrt", "auto", {"device": "cuda:1"}).options == {"device": 1}
    with pytest.raises(UsageError, match="tensorrt engine runs on a GPU: give the device as cuda or cuda:1, not 'cpu'"):
        opening_of(Path("m.engine"), "tensorrt", "auto", {"device": "cpu"})
    with pytest.raises(UsageError, match="openvino engine has no option device"):
        opening_of(path, "openvino", "file", {"device": "cuda"})
    with pytest.raises(UsageError, match="tensorrt engine has no option threads"):
        opening_of(Path("m.engine"), "tensorrt", "auto", {"threads": 1})


def test_results_say_what_computed_them(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    image = grey_image(32, 40)
    with load_segmenter(path) as fast, load_engine(path) as exact:
        provenance = fast.segment(image).provenance
        assert provenance is not None
        assert (provenance.engine, provenance.precision) == (fast.engine.runtime, fast.engine.arithmetic)
        assert exact.arithmetic == "fp32"
        assert exact.runtime.startswith("onnxruntime")
        assert provenance.engine.startswith("openvino")
