"""bioimage.io packages of others: taken in with the labels that they give elsewhere, or refused in a sentence."""

from __future__ import annotations

import copy
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import ClassInfo, IntensityRecord, Normalization, read_manifest
from hpddrnet_trt.packages import PackageSettings, adopt_package, bioimageio_reader, package_model
from tests.toy import grey_image, manifest, write_toy_onnx

Record = dict[str, Any]

# Three classes of three grey channels in 0..1: dark, middle, bright.
STRANGER = """
    <ir_version: 8, opset_import: ["": 18]>
    g (float[n, 3, h, w] image) => (float[n, 3, h, w] scores)
    <float[3, 3, 1, 1] slope = {-4, -4, -4, 0, 0, 0, 4, 4, 4}, float[3] offset = {4, 0, -8}>
    { scores = Conv(image, slope, offset) }
"""
SPACE = [
    {"type": "space", "id": name, "size": {"min": 32, "step": 16}, "unit": "nanometer", "scale": 5.0} for name in "yx"
]
DEPTH = {"type": "space", "id": "z", "size": 8}
NEW: Record = {
    "format_version": "0.5.3", "type": "model", "name": "stranger", "license": "CC-BY-4.0",
    "inputs": [{
        "id": "raw", "axes": [{"type": "batch"}, {"type": "channel", "channel_names": ["a", "b", "c"]}, *SPACE],
        "data": {"type": "uint8"}, "preprocessing": [
            {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
            {"id": "scale_linear", "kwargs": {"gain": 1 / 255}},
            {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
        ],
    }],
    "outputs": [{
        "id": "out", "axes": [{"type": "batch"}, {"type": "channel", "channel_names": ["dark", "middle", "bright"]},
                              *SPACE],
        "data": {"type": "float32"},
    }],
    "weights": {"onnx": {"source": "net.onnx", "opset_version": 18}},
}  # fmt: skip
OLD: Record = {
    "format_version": "0.4.10", "type": "model", "name": "old stranger", "license": "MIT",
    "inputs": [{
        "name": "raw", "axes": "bcyx", "shape": {"min": [1, 3, 32, 32], "step": [0, 0, 32, 32]}, "data_type": "uint8",
        "preprocessing": [{"name": "zero_mean_unit_variance", "kwargs": {
            "mode": "fixed", "axes": "xy", "mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0],
        }}],
    }],
    "outputs": [{
        "name": "out", "axes": "bcyx", "shape": [1, 3, 32, 32], "data_type": "float32",
        "postprocessing": [{"name": "softmax"}],
    }],
    "weights": {"onnx": {"source": "./net.onnx"}},
}  # fmt: skip
Change = Callable[[Record], Any]


def packed(folder: Path, description: Record | bytes = NEW, change: Change | None = None, **files: bytes) -> Path:
    """A package of the stranger's network; ``change`` alters what its description says."""
    if not isinstance(description, bytes):
        description = copy.deepcopy(description)
        if change is not None:
            change(description)
        description = yaml.safe_dump(description).encode()
    content = onnx.parser.parse_model(STRANGER).SerializeToString()
    with zipfile.ZipFile(folder / "package.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {"rdf.yaml": description, "net.onnx": content, **files}.items():
            archive.writestr(name, text)
    return folder / "package.zip"


def labels(model: Path, grey: Any) -> Any:
    session = onnxruntime.InferenceSession(model.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: grey[None, None]})[0]


def stranger_labels(levels: Any) -> Any:
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(STRANGER).SerializeToString())
    return session.run(None, {"image": np.repeat(levels[None, None].astype(np.float32), 3, axis=1)})[0].argmax(1)


@pytest.mark.parametrize("output", ["labels", "logits"])
def test_our_own_package_comes_back_as_it_was(output: str, tmp_path: Path) -> None:
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest(output).replace(remarks=["kept"]))
    package = package_model(model, tmp_path / "a.zip", "bioimageio", PackageSettings((32, 32), ("A",), "MIT"))
    told = adopt_package(package, tmp_path / "back.onnx", {})
    assert (tmp_path / "back.onnx").read_bytes() == model.read_bytes()
    assert told == read_manifest(model) == read_manifest(tmp_path / "back.onnx")
    with pytest.raises(UsageError, match="describes itself; leave classes out"):
        adopt_package(package, tmp_path / "other.onnx", {"classes": []})
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize(("description", "names", "multiple"), [
    (NEW, ["dark", "middle", "bright"], 16), (OLD, ["class 0", "class 1", "class 2"], 32),
])  # fmt: skip
def test_a_package_of_another_program(description: Record, names: list[str], multiple: int, tmp_path: Path) -> None:
    told = adopt_package(packed(tmp_path, description), tmp_path / "a.onnx", {})
    grey = grey_image(64, 96)
    np.testing.assert_array_equal(labels(tmp_path / "a.onnx", grey), stranger_labels(grey / 255))
    assert told.class_names == names
    assert told.data is not None
    assert told.data.license == description["license"]
    assert told.data.pixel_size_m == (None if description is OLD else pytest.approx((5e-9, 5e-9)))
    assert told.input is not None
    assert told.input.multiple == multiple
    assert read_manifest(tmp_path / "a.onnx") == told


def preprocessed(tensor: Record, *steps: Record, **data: Any) -> None:
    tensor["inputs"][0].update(preprocessing=list(steps), data=data)


LEVELS: dict[str, tuple[Record, tuple[Record, ...], float, float, IntensityRecord | None]] = {
    "0 to 1": ({"type": "float32", "range": [0, 1]}, (), 0, 255, None),
    "0 to 255": ({"type": "float32", "range": [0, 255]}, (), 0, 1, None),
    "16 bits": ({"type": "uint16"}, ({"id": "scale_linear", "kwargs": {"gain": 1 / 65535}},), 0, 255, None),
    "two steps": ({"type": "uint8"}, (
        {"id": "scale_linear", "kwargs": {"axis": "channel", "gain": [2 / 255] * 3, "offset": [-1.0] * 3}},
        {"id": "fixed_zero_mean_unit_variance", "kwargs": {"mean": 0.5, "std": 0.25}},
        {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
    ), 191.25, 31.875, None),
    "range of the picture": ({"type": "float32"}, (
        {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
        {"id": "scale_range", "kwargs": {"axes": ["channel", "y", "x"], "min_percentile": 1, "max_percentile": 99.8}},
    ), 0, 255, IntensityRecord(unit="percentile", black=1, white=99.8)),
}  # fmt: skip


@pytest.mark.parametrize("case", LEVELS)
def test_grey_levels(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, steps, mean, std, intensity = LEVELS[case]
    package = packed(tmp_path, change=lambda told: preprocessed(told, *steps, **data))
    monkeypatch.setattr(bioimageio_reader, "adopt", lambda source, target, settings, images: settings)
    told: Any = adopt_package(package, tmp_path / "a.onnx", {})  # the settings of an adoption
    assert told.normalization.mean == pytest.approx((mean,) * 3)
    assert told.normalization.std == pytest.approx((std,) * 3)
    assert told.intensity == intensity


def test_what_is_given_counts_before_what_the_package_says(tmp_path: Path) -> None:
    package = packed(tmp_path, change=lambda told: preprocessed(told, {"id": "zero_mean_unit_variance"}, type="uint8"))
    unit = Normalization(mean=(0, 0, 0), std=(255, 255, 255))
    classes = [ClassInfo(name=name, color=(0, 0, 0)) for name in "abc"]
    told = adopt_package(package, tmp_path / "a.onnx", {"normalization": unit, "classes": classes})
    assert (told.normalization, told.class_names) == (unit, ["a", "b", "c"])


def with_weights(**changes: Any) -> Change:
    return lambda told: told["weights"]["onnx"].update(changes)


def with_input(**changes: Any) -> Change:
    return lambda told: told["inputs"][0].update(changes)


REFUSED: dict[str, tuple[str, Change]] = {
    "other weights": ("no ONNX weights \\(it has: keras_hdf5, torchscript", lambda told: told.update(
        weights={"torchscript": {}, "keras_hdf5": {}})),
    "no weights": ("it has: none", lambda told: told.pop("weights")),
    "weights elsewhere": ("'https://example.org/net.onnx' that its description names is not in it",
                          with_weights(source="https://example.org/net.onnx")),
    "a path out of it": ("'../../etc/passwd' that its description names is not in it",
                         with_weights(source="../../etc/passwd")),
    "an absolute path": ("'/etc/passwd' that its description names is not in it", with_weights(source="/etc/passwd")),
    "other bytes": ("SHA-256 differs", with_weights(sha256=hashlib.sha256(b"").hexdigest())),
    "no text": ("'None' that its description names", with_weights(source=None)),
    "no model": ("describes no model", lambda told: told.update(type="dataset")),
    "an older format": ("it has version 0.3.6 of the format", lambda told: told.update(format_version="0.3.6")),
    "two inputs": ("takes 2 inputs", lambda told: told["inputs"].append(told["inputs"][0])),
    "no inputs": ("does not follow the format", lambda told: told.pop("inputs")),
    "nonsense": ("does not follow the format", with_input(axes=7)),
    "depth": ("takes an axis 'z'", lambda told: told["inputs"][0]["axes"].append(DEPTH)),
    "each picture's own": ("go through 'zero_mean_unit_variance', which depends on each picture",
                           with_input(preprocessing=[{"id": "zero_mean_unit_variance"}])),
    "range of another": ("'scale_range', which depends", with_input(preprocessing=[
        {"id": "scale_range", "kwargs": {"reference_tensor": "raw"}}])),
    "no white": ("does not say which value is white", with_input(data={"type": "float32"})),
    "darker": ("makes white darker", with_input(preprocessing=[{"id": "scale_linear", "kwargs": {"gain": -1}}])),
    "rounded in between": ("go through 'ensure_dtype'", with_input(preprocessing=[
        {"id": "scale_linear", "kwargs": {"gain": 2}}, {"id": "ensure_dtype", "kwargs": {"dtype": "int8"}}])),
    "infinite": ("does not follow the format", with_input(preprocessing=[
        {"id": "scale_linear", "kwargs": {"gain": 1e-320}}])),
    "several of a pixel": ("scores go through 'sigmoid'", lambda told: told["outputs"][0].update(
        postprocessing=[{"id": "sigmoid"}])),
    "classes unsaid": ("give --classes", lambda told: told["outputs"][0]["axes"].pop(1)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_package_says_that_is_not_taken(case: str, tmp_path: Path) -> None:
    said, change = REFUSED[case]
    with pytest.raises(BadInputFile, match=said) as told:
        adopt_package(packed(tmp_path, change=change), tmp_path / "a.onnx", {})
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["package.zip"]


TEXTS = {
    "no YAML": (b"a: [", "is not readable YAML"),
    "another encoding": (b"\xff\xfe\x00", "is not readable YAML"),
    "objects": (b"type: !!python/object/apply:os.system [ls]", "is not readable YAML"),
    "lists in lists": (b"[" * 600, "is not readable YAML"),
    "a list": (b"- model", "describes no model"),
    "too much": (b"type: model #" + b"x" * (1 << 18), "more than such a file has"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_descriptions_that_are_none(case: str, tmp_path: Path) -> None:
    text, said = TEXTS[case]
    with pytest.raises(BadInputFile, match=said):
        adopt_package(packed(tmp_path, text), tmp_path / "a.onnx", {})


def test_files_that_are_no_packages(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_bytes(b"text")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    cut = packed(tmp_path).read_bytes()
    (tmp_path / "cut.zip").write_bytes(cut[: len(cut) // 2])
    for name, said in {"text": "no readable zip", "empty": "holds no rdf.yaml", "cut": "no readable zip"}.items():
        with pytest.raises(BadInputFile, match=said):
            adopt_package(tmp_path / f"{name}.zip", tmp_path / "a.onnx", {})
    with pytest.raises(UserError, match="does not exist"):
        adopt_package(tmp_path / "gone.zip", tmp_path / "a.onnx", {})


def test_a_bomb_a_link_and_damaged_bytes(tmp_path: Path) -> None:
    bomb = packed(tmp_path, **{"inner/rdf.yaml": b"deeper, so not the one that counts", "big.onnx": bytes(64 << 20)},
                  change=with_weights(source="big.onnx"))  # fmt: skip
    with pytest.raises(BadInputFile, match="is said to have 67108864 bytes"):
        adopt_package(bomb, tmp_path / "a.onnx", {})
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr("rdf.yaml", yaml.safe_dump(NEW))
        link = zipfile.ZipInfo("net.onnx")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(BadInputFile, match="no file but a link"):
        adopt_package(tmp_path / "link.zip", tmp_path / "a.onnx", {})
    package = packed(tmp_path)
    with zipfile.ZipFile(package) as archive:
        start = archive.getinfo("net.onnx").header_offset
    content = bytearray(package.read_bytes())
    content[start + 60 : start + 90] = bytes(30)
    package.write_bytes(content)
    with pytest.raises(BadInputFile, match="refused"):
        adopt_package(package, tmp_path / "a.onnx", {})
    assert not (tmp_path / "a.onnx").exists()
