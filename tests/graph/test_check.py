"""What ONNX files are refused for before a runtime reads them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.protobuf import protobuf_fields
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export.calibrate import CalibrationSettings, calibrate
from hpddrnet_trt.export.tensorrt import build_engine
from hpddrnet_trt.graph.check import MAX_GRAPH_DEPTH, MAX_OPSET, _Reader, check_onnx, rewritten
from tests.tiny_export import pictures, write_fp32
from tests.tiny_onnx import QUIET
from tests.toy import manifest, write_toy_onnx

Change = Callable[[onnx.ModelProto], Any]


def _damage(path: Path, change: Change) -> None:
    model = onnx.load(str(path))
    change(model)
    path.write_bytes(model.SerializeToString())


def _external(location: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def _inside_an_attribute(model: onnx.ModelProto) -> None:
    value = TensorProto(dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=value))


def _inside_a_branch(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Constant", [], ["y"], value=TensorProto(dims=[10**12], data_type=TensorProto.FLOAT))]
    branch = helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model.graph.node.append(helper.make_node("If", ["image"], ["y"], then_branch=branch, else_branch=branch))


def _lying_size(*dims: int) -> Change:
    return lambda model: model.graph.initializer[0].dims.__setitem__(slice(None), dims)


def _calls(names: dict[str, list[str]]) -> Change:
    """Functions by name, with the functions that each calls; the graph calls the first."""

    def change(model: onnx.ModelProto) -> None:
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
        for name, called in names.items():
            values = ["x", *[f"t{number}" for number in range(len(called) - 1)], "y"]
            nodes = [helper.make_node(inner, [values[number]], [values[number + 1]], domain="f")
                     for number, inner in enumerate(called)]  # fmt: skip
            model.functions.append(helper.make_function("f", name, ["x"], ["y"], nodes, opsets))
        model.graph.node.append(helper.make_node(next(iter(names)), ["image"], ["called"], domain="f"))

    return change


def _defined_twice(model: onnx.ModelProto) -> None:
    _calls({"a": []})(model)
    model.functions.append(model.functions[0])


def _deep(levels: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        nodes = [helper.make_node("Identity", ["image"], ["y"])]
        for _ in range(levels):
            inner = helper.make_graph(nodes, "g", [], [])
            nodes = [helper.make_node("If", ["image"], ["y"], then_branch=inner)]
        model.graph.node.extend(nodes)

    return change


def _sparse(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [2**40])
    )


def _operator(kind: str) -> Change:
    return lambda model: model.graph.node.append(helper.make_node(kind, ["image"], ["z"]))


def _circle(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = model.graph.node[3].output[0]


def _made_of_nothing(operator: str, place: int, shape: list[int], held: str = "") -> Change:
    """The shape is stored, or ``held`` in that attribute of a Constant node."""

    def change(model: onnx.ModelProto) -> None:
        values = numpy_helper.from_array(np.array(shape, np.int64), "shape")
        if held:
            made = {held: shape if held == "value_ints" else values}
            model.graph.node.append(helper.make_node("Constant", [], ["shape"], **made))
        else:
            model.graph.initializer.append(values)
        model.graph.node.append(helper.make_node(operator, ["image"] * place + ["shape"], ["made"]))

    return change


def _opset(version: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def _setting(name: str, *values: int, of: str = "Conv") -> Change:
    def change(model: onnx.ModelProto) -> None:
        node = helper.make_node(of, ["image"], ["z"], **{name: list(values) if len(values) > 1 else [*values, 1][0]})
        if not values:
            node.attribute[0].ClearField("i")
        model.graph.node.append(node)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *[(_external(place), "some of its numbers are in another file")
          for place in ("weights.bin", "../weights.bin", "/etc/passwd", "")],
        (lambda model: model.graph.initializer[0].external_data.add(key="location", value="w.bin"), "in another file"),
        (_inside_an_attribute, "in another file"),
        (_inside_a_branch, "is said to hold 1000000000000 numbers"),
        (_lying_size(200), r"a tensor of \d+ bytes is said to hold 200 numbers"),
        (_lying_size(2**40), r"a tensor of \d+ bytes is said to hold 1099511627776 numbers"),
        (_lying_size(2**40, 2**40), "is said to hold 9223372036854775808 numbers"),
        (_lying_size(-1), "negative size"),
        (_calls({"a": ["a"]}), "its function 'a' calls itself"),
        (_calls({"a": ["b"], "b": ["c"], "c": ["a"]}), "calls itself"),
        (_calls({f"f{n}": [f"f{n + 1}"] * 10 for n in range(7)}), "written out, have 1000000. operators, more than"),
        (_calls({f"f{n}": [f"f{n + 1}"] for n in range(300)}), "more than 256 functions"),
        (_defined_twice, "defines the function 'a' twice"),
        (_deep(MAX_GRAPH_DEPTH), "more than 8 deep"),
        (_sparse, "sparse tensors"),
        (_operator("Loop"), "it has a loop, which need not end"),
        (_operator("EPContext"), "compiled program of an execution provider"),
        (_operator("x" * 5000), "a name or a shape of 5000 bytes"),
        (_opset(2**32), "it asks for version 4294967296 of ONNX's operators"),
        (_opset(-1), "it asks for version"),
        (lambda model: model.training_info.add(), "instructions for training"),
        (_circle, "an operator reads 'logits', which no operator before it makes"),
        (lambda model: model.graph.node.append(model.graph.node[0]), "the tensor 'grey' is made twice"),
        (_made_of_nothing("ConstantOfShape", 0, [2**40]), "an operator ConstantOfShape makes 1.1e.12 numbers"),
        (_made_of_nothing("Expand", 1, [2**20, -(2**20)], "value"), "an operator Expand makes 1.1e.12 numbers"),
        (_made_of_nothing("Tile", 1, [2**62]), "an operator Tile makes"),
        (_made_of_nothing("Resize", 3, [1, 1, 2**20, 2**20]), "an operator Resize makes"),
        (_made_of_nothing("ConstantOfShape", 0, [2**20, 2**20], "value_ints"), "ConstantOfShape makes 1.1e.12"),
        (_setting("blocksize", 0, of="DepthToSpace"), "'blocksize' of an operator is 0"),
        (_setting("blocksize", of="DepthToSpace"), "'blocksize' of an operator has no value"),
        (_setting("group", -1), "'group' of an operator is -1"),
        (_setting("strides", 1, 0), "'strides' of an operator is 0"),
        (_setting("axis", 2**62, of="Softmax"), "'axis' of an operator is 4611686018427387904"),
        (_setting("pads", 0, 0, -(2**40), 0), "'pads' of an operator is -1099511627776"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, change: Change, says: str) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    check_onnx(path)
    _damage(path, change)
    with pytest.raises(BadInputFile, match=rf"^{path} is refused: .*{says}.*; export it again with this package$"):
        check_onnx(path)
    with pytest.raises(BadInputFile, match="is refused"):
        OnnxRuntimeEngine(path)


def test_limits_are_above_what_is_allowed(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    for change in (
        _calls({"a": ["b", "b"], "b": ["c"], "c": []}), _deep(MAX_GRAPH_DEPTH - 1), _operator("Scan"),
        _opset(MAX_OPSET), _lying_size(3, 3), _made_of_nothing("Expand", 1, [1024, 1024]),
        _made_of_nothing("Pad", 1, [9, 2**40]), _setting("axis", -1, of="Softmax"), _setting("strides", 1, 1),
        _setting("pads", 0, 0, 0, 0), _setting("to", 0, of="Cast"),
    ):  # fmt: skip
        model = onnx.load(str(path))
        change(model)
        (tmp_path / "n.onnx").write_bytes(model.SerializeToString())
        check_onnx(tmp_path / "n.onnx")


def _pad_without_pads(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Pad", ["image"], ["padded"]))


def _shape_of_no_whole_numbers(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float16), "shape"))
    model.graph.node.append(helper.make_node("Reshape", ["image", "shape"], ["reshaped"]))


@pytest.mark.parametrize(
    ("depth", "change", "says"),
    [  # OpenVINO would crash, and the builder of an engine
        ("operators", _pad_without_pads, r"Pad:19\) has input size 1 not in range"),
        ("types", _shape_of_no_whole_numbers, "Expected:int64 Actual:float16"),
    ],
)
def test_operators_without_what_they_need(tmp_path: Path, depth: Any, change: Change, says: str) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    check_onnx(path, depth)
    _damage(path, change)
    check_onnx(path)
    with pytest.raises(BadInputFile, match=rf"m\.onnx is refused: .*{says}"):
        check_onnx(path, depth)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    path.write_bytes(path.read_bytes().replace(b"smooth", b"smoot\xff"))
    with pytest.raises(BadInputFile, match=r"m\.onnx is refused: 'utf-8' codec"):
        check_onnx(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\x3a\xff\xff\xff\xff\x0f", b"\x3b", b"\x3a\x02\x0a\x05", b"\x38\x01"]
)
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    if content:
        with pytest.raises(BadInputFile, match=r"m\.onnx is refused: it is (cut off|damaged)"):
            check_onnx(path)
    with pytest.raises(BadInputFile):
        OnnxRuntimeEngine(path)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names of the files whose structure and whose operators were looked into."""
    seen: dict[str, list[str]] = {"structure": [], "operators": []}
    walk, checker = _Reader.model, onnx.checker.check_model

    def model(reader: _Reader, size: int) -> None:
        seen["structure"].append(Path(reader._stream.name).name)
        walk(reader, size)

    def check_model(source: Any, **options: Any) -> None:
        if isinstance(source, str):
            seen["operators"].append(Path(source).name)
        checker(source, **options)

    monkeypatch.setattr(_Reader, "model", model)
    monkeypatch.setattr(onnx.checker, "check_model", check_model)
    return seen


def _foreign(path: Path) -> Path:
    """As if another program had written it."""
    copy = path.with_name("foreign.onnx")
    copy.write_bytes(path.read_bytes())
    return copy


def test_calibration_checks_the_file_it_is_given_once(tmp_path: Path, counted: dict[str, list[str]]) -> None:
    source, images = _foreign(write_fp32(tmp_path / "m.onnx")), pictures(tmp_path / "images", 2)
    calibrate(source, tmp_path / "int8.onnx", images, CalibrationSettings(method="auto", min_agreement=0.1, cache=None))
    check_onnx(tmp_path / "int8.onnx", "types")  # ours
    assert counted == {"structure": ["foreign.onnx"], "operators": []}


def test_a_build_checks_the_file_it_is_given_once(tmp_path: Path, counted: dict[str, list[str]]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, which builds without a GPU, is missing")
    source = _foreign(write_fp32(tmp_path / "m.onnx"))
    options: dict[str, Any] = {"runtime": "tensorrt-rtx", "shapes": "1x1x64x64:1x1x64x64:1x1x64x64"}
    build_engine(source, tmp_path / "m.engine", precision="fp16", settings=QUIET, **options)
    assert counted == {"structure": ["foreign.onnx"], "operators": ["foreign.onnx"]}


def test_a_file_that_was_changed_is_checked_again(tmp_path: Path, counted: dict[str, list[str]]) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    for depth in ("structure", "operators", "structure", "types", "operators"):
        check_onnx(path, depth)  # type: ignore[arg-type]
    assert {name: len(files) for name, files in counted.items()} == {"structure": 1, "operators": 2}
    _damage(path, _operator("Loop"))
    with pytest.raises(BadInputFile, match="it has a loop"):
        check_onnx(path)


def test_the_reader_sees_what_protobuf_sees(tmp_path: Path) -> None:
    path = write_fp32(tmp_path / "m.onnx")
    content = path.read_bytes()
    stream = io.BytesIO(content)
    fields = {field.number: field for field in protobuf_fields(stream, 0, len(content))}
    model = onnx.load(str(path))
    assert fields[1].value == model.ir_version
    assert fields[2].read(stream, 100).decode() == model.producer_name
    graph = fields[7]
    assert onnx.GraphProto.FromString(graph.read(stream, len(content))) == model.graph
    nodes = [part for part in protobuf_fields(stream, graph.start, graph.end) if part.number == 1]
    assert len(nodes) == len(model.graph.node)
    assert onnx.NodeProto.FromString(nodes[5].read(stream, 10**6)) == model.graph.node[5]


def test_a_change_that_does_not_understand_the_graph_is_a_sentence(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    with pytest.raises(BadInputFile, match=r"m\.onnx is damaged or no ONNX file of this .*index out of range"):
        rewritten(path, lambda model: model.graph.node[1000])
    assert rewritten(path, lambda model: None) is None
    path.write_bytes(b"\x3a\x05")
    with pytest.raises(BadInputFile, match="is refused: it is cut off"):
        rewritten(path, lambda model: None)
