"""TensorRT 8.5 and 8.6, with stand-ins for their interface: they do not run without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.engines.cuda import Gpu
from hpddrnet_trt.engines.tensorrt_library import TensorRT
from hpddrnet_trt.export.legacy import configure_weak_typing, for_tensorrt8, legacy_problems
from hpddrnet_trt.export.tensorrt import build_engine
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.nodes import name_nodes
from hpddrnet_trt.graph.precision import to_half
from tests.export import simulated_tensorrt86
from tests.graph.residual_onnx import residual_model
from tests.tiny_onnx import tiny_model

TRT = SimpleNamespace(
    BuilderFlag=SimpleNamespace(FP16="FP16", INT8="INT8", OBEY_PRECISION_CONSTRAINTS="OBEY"),
    DataType=SimpleNamespace(FLOAT="FLOAT"),
    LayerType=SimpleNamespace(
        CAST="CAST",
        ELEMENTWISE="ELEMENTWISE",
        IDENTITY="IDENTITY",
        MATRIX_MULTIPLY="MATMUL",
        SCALE="SCALE",
        SHUFFLE="SHUFFLE",
        SOFTMAX="SOFTMAX",
        UNARY="UNARY",
    ),
    TacticSource=SimpleNamespace(CUDNN=2, EDGE_MASK_CONVOLUTIONS=3, JIT_CONVOLUTIONS=4),
    PreviewFeature=SimpleNamespace(PROFILE_SHARING_0806="SHARED"),
)
# TensorRT 8.5: no shared profiles, no cast layers.
TRT85 = SimpleNamespace(
    **{
        **vars(TRT),
        "PreviewFeature": SimpleNamespace(),
        "LayerType": SimpleNamespace(**{name: kind for name, kind in vars(TRT.LayerType).items() if name != "CAST"}),
    }
)


class Layer:
    """Of the interface, what the code may use; anything else is an AttributeError."""

    num_outputs = 1

    def __init__(self, kind: str, name: str, *inputs: str) -> None:
        self.type, self.name, self.precision = kind, name, None
        self._inputs = inputs
        self.output_types: dict[int, Any] = {}

    def get_input(self, slot: int) -> Any:
        return SimpleNamespace(name=self._inputs[slot])

    def get_output(self, slot: int) -> Any:
        assert slot == 0
        return SimpleNamespace(name=self.name)

    def set_output_type(self, slot: int, kind: Any) -> None:
        self.output_types[slot] = kind


class Network:
    def __init__(self, *layers: Layer) -> None:
        self.layers, self.num_layers = layers, len(layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


class Config:
    def __init__(self) -> None:
        self.flags: list[str] = []
        self.tactics, self.features = 0, []  # type: int, list[str]

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def set_tactic_sources(self, sources: int) -> bool:
        self.tactics = sources
        return True

    def set_preview_feature(self, feature: str, on: bool) -> None:
        assert on
        self.features.append(feature)


def network() -> Network:
    """Position attention with what a parser puts between, and a softmax of class scores."""
    return Network(
        Layer("CONVOLUTION", "keys", "image"),
        Layer("MATMUL", "projected", "keys", "keys"),
        Layer("SHUFFLE", "flat", "projected"),
        Layer("MATMUL", "scores", "flat", "keys"),
        Layer("ELEMENTWISE", "scaled", "scores", "factor"),
        Layer("SHUFFLE", "wide", "scaled"),
        Layer("SOFTMAX", "weights", "wide"),
        Layer("MATMUL", "mixed", "weights", "keys"),
        Layer("CONVOLUTION", "logits", "mixed"),
        Layer("SOFTMAX", "confidence", "logits"),
    )


@pytest.mark.parametrize(
    ("version", "weak", "shared"),
    [("8.5.2.2", True, False), ("8.6.1", True, True), ("10.0.1", False, True), ("11.1.0.32", False, True)],
)
def test_versions(version: str, weak: bool, shared: bool) -> None:
    api = TensorRT("tensorrt", None, version, None)
    assert api.weakly_typed is weak
    assert api.shares_profiles is shared
    rtx = TensorRT("tensorrt-rtx", None, "1.7.1", None)
    assert not rtx.weakly_typed
    assert rtx.shares_profiles


@pytest.mark.parametrize(("trt", "features"), [(TRT, ["SHARED"]), (TRT85, [])])
def test_neither_cublas_nor_cudnn_is_needed(trt: Any, features: list[str]) -> None:
    config = Config()
    assert configure_weak_typing(trt, network(), config, "fp16") == ["scores", "scaled", "weights"]
    assert config.tactics == 1 << 3 | 1 << 4
    assert config.features == features


@pytest.mark.parametrize(("precision", "flags"), [("fp16", ["FP16", "OBEY"]), ("int8", ["INT8", "FP16", "OBEY"])])
def test_scores_stay_in_fp32(precision: str, flags: list[str]) -> None:
    parsed, config = network(), Config()
    assert configure_weak_typing(TRT, parsed, config, precision) == ["scores", "scaled", "weights"]
    assert config.flags == flags
    held = {layer.name for layer in parsed.layers if layer.precision == "FLOAT"}
    assert held == {"scores", "scaled", "weights"} == {layer.name for layer in parsed.layers if layer.output_types}
    assert all(layer.output_types == {0: "FLOAT"} for layer in parsed.layers if layer.name in held)


def test_fp32_needs_nothing() -> None:
    parsed, config = network(), Config()
    assert configure_weak_typing(TRT, parsed, config, "fp32") == []
    assert config.flags == []
    assert not any(layer.output_types for layer in parsed.layers)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_later_precisions_are_refused(precision: str) -> None:
    with pytest.raises(UsageError, match=f"TensorRT before 10 has no {precision.upper()}; choose one of: fp32"):
        configure_weak_typing(TRT, network(), Config(), precision)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = onnx.load(str(residual_model(tmp_path_factory.mktemp("legacy") / "model.onnx")))
    name_nodes(model)
    return model


@pytest.fixture(scope="module")
def quantised(model: Any) -> Any:
    plan = qdq.plan(model, "tensorrt")
    return qdq.quantise(model, "tensorrt", plan, dict.fromkeys(plan.tensors, (-6.0, 6.0)))


def _labels(model: Any) -> Any:
    image = simulate(64, 96, 3)[0][None, None]
    options = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": ["WeightBiasQuantization"]}
    return onnxruntime.InferenceSession(model.SerializeToString(), **options).run(["labels"], {"image": image})[0]


def _as_tensorrt8_reads(model: Any) -> None:
    """What the 8.6 headers and parser say about a file."""
    assert model.opset_import[0].version == 17
    assert model.ir_version <= 8
    constants = {entry.name: entry for entry in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    assert not halves.intersection(entry.data_type for entry in constants.values())
    for node in model.graph.node:
        targets = [entry.i for entry in node.attribute if entry.name == "to"]
        assert not halves.intersection(targets)
        if targets == [TensorProto.UINT8]:  # from floating point only
            assert [entry.i for entry in makers[node.input[0]].attribute] == [TensorProto.FLOAT]
        if node.op_type == "DequantizeLinear":
            assert makers[node.input[0]].op_type == "QuantizeLinear"
            assert constants[node.input[1]].data_type == TensorProto.FLOAT
        if node.op_type == "QuantizeLinear" and node.input[0] in constants:
            assert constants[node.input[0]].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("kind", ["model", "quantised", "half", "quantised_half"])
def test_rewritten_files_compute_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(kind.removesuffix("_half") if kind != "half" else "model")
    before = to_half(source) if kind.endswith("half") else source
    opset, bytes_before = before.opset_import[0].version, before.SerializeToString()
    rewritten = for_tensorrt8(before)
    _as_tensorrt8_reads(rewritten)
    # FP16 files are compared with what they were made of: what they round is another matter.
    same = (_labels(rewritten) == _labels(source)).mean()
    assert same == 1 if before is source else same > 0.95
    assert len(np.unique(_labels(source))) > 1
    assert rewritten.metadata_props == before.metadata_props
    assert opset == 20
    assert before.SerializeToString() == bytes_before


def test_weights_quantise_to_the_integers_that_they_were(quantised: Any) -> None:
    before = {entry.name: numpy_helper.to_array(entry) for entry in quantised.graph.initializer}
    rewritten = for_tensorrt8(quantised)
    after = {entry.name: numpy_helper.to_array(entry) for entry in rewritten.graph.initializer}
    checked = 0
    for node in rewritten.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in after:
            continue
        wide, scale = after[node.input[0]], after[node.input[1]]
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        scale = scale.reshape([-1 if place == axis else 1 for place in range(wide.ndim)]) if scale.ndim else scale
        np.testing.assert_array_equal(np.rint(wide / scale), before[node.input[0].removesuffix("_float")])
        checked += 1
    pairs = [node for node in quantised.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in before]
    assert checked == len(pairs) >= 4


def test_the_shipped_model_is_rewritten(shipped: Any) -> None:
    rewritten = for_tensorrt8(shipped)
    _as_tensorrt8_reads(rewritten)
    assert np.array_equal(_labels(rewritten), _labels(shipped))


@pytest.fixture(scope="module")
def shipped() -> Any:
    path = Path(__file__).resolve().parents[2] / "hpddrnet_trt" / "weights" / "nasa-super1.onnx"
    return onnx.load(str(path))


@pytest.mark.parametrize("sizes", [[], ["sizes"]])
def test_what_enlarges_labels_is_rewritten(sizes: list[str]) -> None:
    """Pad and Split have changed since opset 17, and the version converter leaves them behind."""
    number = {} if sizes else {"num_outputs": 2}
    nodes = [
        helper.make_node("Pad", ["scores", "pads"], ["wide"], mode="edge"),
        helper.make_node("Split", ["wide", *sizes], ["first", "second"], axis=1, **number),
        helper.make_node("Max", ["first", "second"], ["best"]),
    ]
    scores, best = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("scores", [1, 4, 3, 5]), ("best", [1, 2, 5, 7]))
    )
    constants = {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "sizes": [2, 2]}
    used = ["pads", *sizes]
    weights = [numpy_helper.from_array(np.array(constants[name], np.int64), name) for name in used]
    graph = helper.make_graph(nodes, "enlarge", [scores], [best], weights)
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    lowered = for_tensorrt8(source)
    assert [(entry.domain, entry.version) for entry in lowered.opset_import] == [("", 17)]
    values = np.random.default_rng(0).normal(size=(1, 4, 3, 5)).astype(np.float32)
    before, after = (
        onnxruntime.InferenceSession(entry.SerializeToString(), providers=["CPUExecutionProvider"])
        .run(None, {"scores": values})[0]
        for entry in (source, lowered)
    )
    np.testing.assert_array_equal(before, after)


def test_operators_that_came_later_are_an_error() -> None:
    node = helper.make_node("Gelu", ["image"], ["labels"])
    image, labels = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("image", "labels"))
    graph = helper.make_graph([node], "later", [image], [labels])
    with pytest.raises(UserError, match="cannot be written at opset 17"):
        for_tensorrt8(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def test_every_problem_is_named(tmp_path: Path) -> None:
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0])
    zero = helper.make_tensor("zero", TensorProto.UINT8, [], [0])
    eight = helper.make_tensor("eight", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    nodes = [
        helper.make_node("Transpose", ["image"], ["turned"]),
        helper.make_node("Cast", ["turned"], ["wide"], to=TensorProto.BFLOAT16),
        helper.make_node("QuantizeLinear", ["wide", "scale", "zero"], ["low"]),
        helper.make_node("Attention", ["q", "k", "v"], ["labels"]),
    ]
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("labels", TensorProto.FLOAT, None)],
        [scale, zero, eight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    assert legacy_problems(model) == [
        "FP8 values",
        "uint8 quantisation (calibrate for TensorRT)",
        "the Attention operator (export MatMul)",
        "a uint8 input read by Transpose (only Cast may)",
    ]
    with pytest.raises(UserError, match=r"has FP8 values; .*give the FP32 file that export wrote"):
        for_tensorrt8(model)


# --- the whole build, on a stand-in with the names of 8.6


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> Callable[..., simulated_tensorrt86.Module]:
    log = SimpleNamespace(clear=lambda: None, explain=lambda otherwise: otherwise)

    def start(**options: Any) -> simulated_tensorrt86.Module:
        module = simulated_tensorrt86.Module(**options)
        api = TensorRT("tensorrt", module, simulated_tensorrt86.VERSION, log)
        monkeypatch.setattr("hpddrnet_trt.export.tensorrt.choose_flavour", lambda flavour: api)
        monkeypatch.setattr("hpddrnet_trt.export.tensorrt.find_gpu", lambda: Gpu(0, "Orin", "8.7"))
        return module

    return start


@pytest.mark.parametrize(
    ("typing", "precision", "flags"),
    [
        ("fp32", "fp32", set()),
        ("fp32", "fp16", {"FP16", "OBEY_PRECISION_CONSTRAINTS"}),
        ("fp16", "fp16", {"FP16", "OBEY_PRECISION_CONSTRAINTS"}),
        ("int8", "int8", {"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"}),
    ],
)
def test_a_build_on_tensorrt_86(
    jetson: Callable[..., simulated_tensorrt86.Module], tmp_path: Path, typing: Any, precision: Any, flags: set[str]
) -> None:
    """No argument but the file and its precision, whatever the file's own typing."""
    module = jetson(layer_types={"fp32": "Float", "fp16": "Half", "int8": "Int8"}[precision])
    source = tiny_model(tmp_path / "m.onnx", typing=typing)
    manifest = build_engine(source, tmp_path / "m.engine", precision=precision, progress=False)
    _as_tensorrt8_reads(module.seen["model"])
    config = module.seen["config"]
    assert config.flags_set == flags
    assert config.told["tactics"] == ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]
    assert config.told["PROFILE_SHARING_0806"] is True
    assert read_manifest(tmp_path / "m.engine") == manifest
    assert manifest.precision == precision
    assert manifest.engine is not None
    assert manifest.engine.version == "8.6.1"
    assert manifest.engine.compute_capabilities == ["8.7"]
    assert manifest.engine.precision_proof["convolutions"] == {precision: 1}


def test_options_on_tensorrt_86(jetson: Callable[..., simulated_tensorrt86.Module], tmp_path: Path) -> None:
    module = jetson()
    source, target = tiny_model(tmp_path / "m.onnx"), tmp_path / "m.engine"
    build_engine(
        source, target, precision="fp16", optimisation_level=5, workspace_mib=64, sparsity=True, progress=False,
        version_compatible=True,
    )  # fmt: skip
    config = module.seen["config"]
    assert config.told["builder_optimization_level"] == 5
    assert config.told["workspace"] == 64 << 20
    assert {"SPARSE_WEIGHTS", "VERSION_COMPATIBLE"} <= config.flags_set
    with pytest.raises(UsageError, match=r"TensorRT 8\.6\.1 has no tiling search .*leave --tiling out"):
        build_engine(source, target, precision="fp16", tiling="fast", progress=False)
    with pytest.raises(UsageError, match="has no BF16"):
        build_engine(source, target, precision="bf16", progress=False)


def test_an_engine_that_did_not_become_what_it_is_called(
    jetson: Callable[..., simulated_tensorrt86.Module], tmp_path: Path
) -> None:
    jetson(layer_types="Float")
    with pytest.raises(UserError, match="would be labelled FP16, but none of its convolutions is"):
        build_engine(tiny_model(tmp_path / "m.onnx"), tmp_path / "m.engine", precision="fp16", progress=False)
    assert not (tmp_path / "m.engine").exists()


def test_where_the_inspector_shows_no_types_the_flags_are_believed(
    jetson: Callable[..., simulated_tensorrt86.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jetson(layer_types="?")
    manifest = build_engine(tiny_model(tmp_path / "m.onnx"), tmp_path / "m.engine", precision="fp16", progress=False)
    assert "its precision is not proven" in caplog.text
    assert manifest.engine is not None
    assert manifest.engine.precision_proof["source"] == "parsed network"


def test_parser_errors_of_tensorrt_86(jetson: Callable[..., simulated_tensorrt86.Module], tmp_path: Path) -> None:
    jetson(refuses="Assertion failed: legalUINT8.")
    with pytest.raises(BadInputFile, match=r"cannot read .*: Assertion failed: legalUINT8 in node 7; export"):
        build_engine(tiny_model(tmp_path / "m.onnx"), tmp_path / "m.engine", precision="fp16", progress=False)


def test_tensorrt_85_builds_one_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = TensorRT("tensorrt", simulated_tensorrt86.Module(), "8.5.2.2", None)
    monkeypatch.setattr("hpddrnet_trt.export.tensorrt.choose_flavour", lambda flavour: api)
    monkeypatch.setattr("hpddrnet_trt.export.tensorrt.find_gpu", lambda: Gpu(0, "Xavier", "7.2"))
    with pytest.raises(UsageError, match=r"TensorRT 8\.5\.2 run one fixed shape here: .*--shapes 1x1x1024x1024"):
        build_engine(tiny_model(tmp_path / "m.onnx"), tmp_path / "m.engine", precision="fp16", progress=False)
