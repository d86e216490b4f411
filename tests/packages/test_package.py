"""Packages for other programs: what is in them, that it belongs together, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from PIL import Image

from hpddrnet_trt.cli.packages import PackageForm
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import AxisRange, DataRecord, DomainRecord, InputContract
from hpddrnet_trt.packages import FORMATS, PackageSettings, package_model
from hpddrnet_trt.weights import CHECKPOINT, locate
from tests.toy import manifest, write_toy_onnx

NAMED = PackageSettings(size=(32, 40), authors=("M. Curie",), license="MIT")
DATA = DataRecord(name="nasa-super1", license="MIT", train_images=10, pixel_size_m=(4e-9, 4e-9))


def written(
    folder: Path, form: str, settings: PackageSettings = NAMED, *, output: str = "labels", **description: Any
) -> dict[str, bytes]:
    """Files of a package of the toy model, a labels file with confidence."""
    model = write_toy_onnx(folder / "toy.onnx", manifest(output, output == "labels").replace(**description))
    return contents(package_model(model, folder / f"toy{FORMATS[form].ending}", form, settings))


def contents(package: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(package) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def array(content: bytes) -> Any:
    return np.load(io.BytesIO(content))


def run(model: bytes, batch: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})


def test_every_format_is_an_option() -> None:
    assert get_args(PackageForm) == tuple(FORMATS)


@pytest.mark.parametrize("output", ["labels", "logits"])
def test_a_bioimageio_package_holds_the_file_and_what_it_gives(output: str, tmp_path: Path) -> None:
    files = written(tmp_path, "bioimageio", output=output, data=DATA)
    description = yaml.safe_load(files["rdf.yaml"])
    weights = description["weights"]["onnx"]
    assert files[weights["source"]] == (tmp_path / "toy.onnx").read_bytes()
    assert weights["sha256"] == hashlib.sha256(files["model.onnx"]).hexdigest()
    assert weights["opset_version"] == 20
    test_input = array(files[description["inputs"][0]["test_tensor"]["source"]])
    assert test_input.shape == (1, 1, 32, 40)
    names = [entry["id"] for entry in description["outputs"]]
    assert names == (["labels", "confidence"] if output == "labels" else ["logits"])
    for entry, got in zip(description["outputs"], run(files["model.onnx"], test_input), strict=True):
        expected = array(files[entry["test_tensor"]["source"]])
        np.testing.assert_array_equal(got, expected)
        assert entry["data"]["type"] == str(expected.dtype)
        assert len(entry["axes"]) == expected.ndim
    classes = description["outputs"][0]
    assert (classes["data"]["values"] if output == "labels" else classes["axes"][1]["channel_names"]) == [
        "grain", "pore", "clay",
    ]  # fmt: skip


def test_a_bioimageio_package_says_what_the_model_says(tmp_path: Path) -> None:
    domain = DomainRecord(
        mean=[0.5] * 64, scale=[1.0] * 64, components=[[0.1] * 64] * 2, variances=[1.0, 2.0], residual=1.0,
        unusual=1.5, foreign=3.0, crops=7, pictures=2,
    )  # fmt: skip
    files = written(tmp_path, "bioimageio", data=DATA, metrics={"val/miou": 0.8, "val/iou/clay": float("nan")},
                    domain=domain)  # fmt: skip
    description = yaml.safe_load(files["rdf.yaml"])
    assert description["format_version"] == "0.5.4"
    assert [author["name"] for author in description["authors"]] == ["M. Curie"]
    assert description["license"] == "MIT"
    assert "10.1038/s41524-022-00878-5" in [entry["doi"] for entry in description["cite"]]
    own = description["config"]["hpddrnet_trt"]["description"]
    assert own["metrics"] == {"val/miou": 0.8, "val/iou/clay": "NaN"}
    assert own["data"]["pixel_size_m"] == [4e-9, 4e-9]
    assert {name: own["domain"].get(name) for name in ("foreign", "crops", "mean", "components")} == {
        "foreign": 3.0, "crops": 7, "mean": None, "components": None,
    }  # fmt: skip
    height = description["inputs"][0]["axes"][2]
    assert height == {"type": "space", "id": "y", "size": {"min": 8, "step": 8}, "unit": "nanometer", "scale": 4.0}
    assert description["outputs"][0]["axes"][1] == {**height, "size": {"tensor_id": "image", "axis_id": "y"}}
    assert "## Validation" in files["README.md"].decode()
    with Image.open(io.BytesIO(files["cover.png"])) as cover:
        assert cover.size == (64, 32)


def test_a_license_in_words_is_a_file_and_a_checkpoint_is_added(tmp_path: Path) -> None:
    (tmp_path / "own.safetensors").write_bytes(b"weights")
    settings = PackageSettings((8, 8), ("A", "B"), "for the members of X", tmp_path / "own.safetensors")
    files = written(tmp_path, "bioimageio", settings)
    description = yaml.safe_load(files["rdf.yaml"])
    assert files[description["license"]["source"]] == b"for the members of X\n"
    (added,) = description["attachments"]
    assert files[added["source"]] == b"weights"


def test_the_same_model_gives_the_same_package(tmp_path: Path) -> None:
    first, second = (written(tmp_path, "czann", output="logits") for _ in range(2))
    assert first == second


def test_a_float_model_is_given_its_normalization(tmp_path: Path) -> None:
    """Three normalized channels: the other program subtracts mean and divides, as the description says."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18]>
        g (float[n, 3, h, w] image) => (float[n, 3, h, w] logits) { logits = Identity(image) }
    """)
    told = manifest("logits", input=InputContract(dtype="float32", channels=3))
    onnx.helper.set_model_props(model, {"hpddrnet_trt": told.to_json()})
    onnx.save(model, tmp_path / "float.onnx")
    files = contents(package_model(tmp_path / "float.onnx", tmp_path / "a.zip", "bioimageio", NAMED))
    (entry,) = yaml.safe_load(files["rdf.yaml"])["inputs"]
    assert [step["id"] for step in entry["preprocessing"]] == ["ensure_dtype", "fixed_zero_mean_unit_variance"]
    step = entry["preprocessing"][1]["kwargs"]
    grey = array(files["test_input.npy"])
    mean, std = (np.array(step[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    np.testing.assert_allclose(array(files["test_logits.npy"]), (grey - mean) / std, atol=1e-5)
    czann = contents(package_model(tmp_path / "float.onnx", tmp_path / "a.czann", "czann", NAMED))
    shares = run(czann["model.model"], np.moveaxis(grey, 1, -1) / np.float32(255))[0]
    np.testing.assert_array_equal(shares.argmax(-1), array(files["test_logits.npy"]).argmax(1))


def test_a_czann_file_takes_and_gives_what_zen_does(tmp_path: Path) -> None:
    """The shipped model gives labels: the class scores behind them are found."""
    model = locate("nasa-super1")
    files = contents(package_model(model, tmp_path / "a.czann", "czann", PackageSettings((64, 72))))
    described = json.loads(files["model.json"])
    assert described["Classes"] == ["matrix", "secondary", "tertiary"]
    assert described["InputShape"] == [64, 72, 1]
    assert described["OutputShape"] == [64, 72, 3]
    assert described["MinOverlap"] == [16, 16]
    assert files["license.txt"] == b"MIT\n"
    graph = onnx.load_from_string(files["model.model"])
    assert [entry.version for entry in graph.opset_import] == [18]
    assert [tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim[1:])
            for entry in (*graph.graph.input, *graph.graph.output)] == [(64, 72, 1), (64, 72, 3)]  # fmt: skip
    grey = np.random.default_rng(0).integers(0, 256, (1, 1, 64, 72), dtype=np.uint8)
    shares = run(files["model.model"], grey.reshape(1, 64, 72, 1) / np.float32(255))[0]
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    assert (shares.argmax(-1) == run(model.read_bytes(), grey)[0]).mean() > 0.999


def test_a_czann_file_knows_pixel_size_and_temperature(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).random((1, 32, 40, 1), dtype=np.float32)
    plain, hot = (written(tmp_path, "czann", output="logits", data=DATA, temperature=t) for t in (None, 4.0))
    assert json.loads(plain["model.json"])["Scaling"] == [4e-9, 4e-9]
    shares = run(plain["model.model"], grey)[0] ** 0.25
    np.testing.assert_allclose(run(hot["model.model"], grey)[0], shares / shares.sum(-1, keepdims=True), rtol=1e-4)


REFUSED: dict[str, tuple[str, str, PackageSettings, dict[str, Any]]] = {
    "no author": ("bioimageio", "names an author", PackageSettings(license="MIT"), {}),
    "no license": ("bioimageio", "names a license", PackageSettings(authors=("A",)), {}),
    "a size that does not fit": ("bioimageio", "give 32x40 instead", PackageSettings((33, 41), ("A",), "MIT"), {}),
    "labels without scores": ("czann", "export it with --output logits", NAMED, {}),
    "for TensorRT": ("czann", "quantized for TensorRT", NAMED, {"precision": "int8", "quantized_for": "tensorrt"}),
    "a batch": ("bioimageio", "export it with --batch 1", NAMED,
                {"input": InputContract(batch=AxisRange(minimum=4, maximum=4))}),
    "a lost checkpoint": ("bioimageio", "gone.safetensors does not exist",
                          PackageSettings(authors=("A",), license="MIT", checkpoint=Path("gone.safetensors")), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_packed_is_said_and_nothing_written(case: str, tmp_path: Path) -> None:
    form, said, settings, description = REFUSED[case]
    with pytest.raises(UserError, match=said):
        written(tmp_path, form, settings, **description)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.onnx"]


def test_another_ending_and_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must end with \.czann; write .*model\.czann"):
        package_model("nowhere.onnx", tmp_path / "model.zip", "czann")
    with pytest.raises(UserError, match="is no ONNX file"):
        package_model(locate("nasa-super1", CHECKPOINT), tmp_path / "a.zip", "bioimageio")


def test_the_official_tool_passes_a_package(tmp_path: Path) -> None:
    """In an environment of its own: HPDDRNET_BIOIMAGEIO names its executable."""
    tool = os.environ.get("HPDDRNET_BIOIMAGEIO") or shutil.which("bioimageio")
    if tool is None:
        pytest.skip("the tool bioimageio is not installed; HPDDRNET_BIOIMAGEIO may name it (docs/packages.md)")
    package = package_model(locate("nasa-super1"), tmp_path / "a.zip", "bioimageio")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run([tool, "test", str(package), "--weight_format", "onnx"], capture_output=True, text=True,
                          env={**environment, "NO_COLOR": "1"}, timeout=300, check=False)  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    assert "Reproduce test outputs from test inputs" in told.stdout + told.stderr
