"""ModelOpt in a child process: what it may touch, what comes back, and readable errors when it goes wrong.

The wrapper is tested with small packages called ``modelopt`` that the child finds instead of the real one.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.errors import MissingDependency, UsageError, UserError
from hpddrnet_trt.export import modelopt
from hpddrnet_trt.export.modelopt import allowed_nodes, installed_version, quantise_with_modelopt
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.graph.nodes import name_nodes
from hpddrnet_trt.graph.precision import to_half
from tests.graph.residual_onnx import GATE, residual_model

SIZE = 64
needs_modelopt = pytest.mark.skipif(
    installed_version() is None, reason="NVIDIA ModelOpt is missing; pip install 'hpddrnet-trt[modelopt]'"
)
Fake = Callable[[str], None]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return onnx.load(residual_model(tmp_path_factory.mktemp("model") / "model.onnx"))


@pytest.fixture
def batches() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (1, 1, SIZE, SIZE), dtype=np.uint8) for _ in range(3)]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that all temporary files go to."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a package ``modelopt`` whose ``quantize`` has this body in front of the child's path."""

    def install(body: str) -> None:
        write_fake(tmp_path / "fake", body)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    return install


def write_fake(folder: Path, body: str) -> None:
    package = folder / "modelopt" / "onnx"
    package.mkdir(parents=True)
    (folder / "modelopt" / "__init__.py").touch()
    (package / "__init__.py").touch()
    head = "def quantize(onnx_path, *, output_path, calibration_data_reader, **options):\n"
    (package / "quantization.py").write_text(head + textwrap.indent(textwrap.dedent(body), "    "), encoding="utf-8")


# ----------------------------------------------------------------------- the wrapper, always run

PAIRED = """
    import json, onnx, pathlib
    model = onnx.load(onnx_path)
    seen = []
    while (batch := calibration_data_reader.get_next()) is not None:
        seen.append({name: [list(array.shape), str(array.dtype), int(array.sum())] for name, array in batch.items()})
    note = json.dumps({"options": options, "batches": seen})
    model.graph.initializer.append(onnx.helper.make_tensor("s", onnx.TensorProto.FLOAT, [], [0.5]))
    model.graph.initializer.append(onnx.helper.make_tensor("z", onnx.TensorProto.INT8, [], [0]))
    conv = next(node for node in model.graph.node if node.name == "second")
    nodes = [onnx.helper.make_node("QuantizeLinear", [conv.input[0], "s", "z"], ["q"]),
             onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"])]
    place = list(model.graph.node).index(conv)
    conv.input[0] = "d"
    for node in reversed(nodes):
        model.graph.node.insert(place, node)
    model.doc_string = note
    onnx.save(model, output_path)
"""


def test_batches_and_request_reach_the_child_and_its_graph_comes_back(
    network: onnx.ModelProto, batches: list[Any], fake: Fake, scratch: Path
) -> None:
    fake(PAIRED)
    before = network.SerializeToString()
    result = quantise_with_modelopt(network, iter(batches), method="entropy", exclude=["second", "gate"])
    assert network.SerializeToString() == before
    assert Counter(node.op_type for node in result.graph.node)["QuantizeLinear"] == 1
    note = json.loads(result.doc_string)
    assert note["batches"] == [{"image": [[1, 1, SIZE, SIZE], "uint8", int(batch.sum())]} for batch in batches]
    options = note["options"]
    assert (options["quantize_mode"], options["calibration_method"]) == ("int8", "entropy")
    assert options["high_precision_dtype"] == "fp32"
    assert options["nodes_to_exclude"] == [r"gate\Z", r"second\Z"]
    assert not list(scratch.iterdir())


def test_names_are_excluded_whole_not_as_patterns(network: onnx.ModelProto, batches: list[Any], fake: Fake) -> None:
    """ModelOpt matches regular expressions from the beginning: ``a/Add`` would exclude ``a/Add_7``."""
    renamed = onnx.ModelProto()
    renamed.CopyFrom(network)
    names = {"first": "a+b/Conv", "second": "a+b/Conv_7"}
    for node in renamed.graph.node:
        if node.name in names:
            node.name = names[node.name]
    fake(PAIRED.replace('"second"', '"a+b/Conv_7"'))
    note = quantise_with_modelopt(renamed, batches, exclude=["a+b/Conv"]).doc_string
    (pattern,) = json.loads(note)["options"]["nodes_to_exclude"]
    assert [name for name in names.values() if re.match(pattern, name)] == ["a+b/Conv"]


def test_one_batch_is_held_at_a_time(network: onnx.ModelProto, fake: Fake) -> None:
    fake(PAIRED)
    alive: list[Any] = []
    most = 0

    def feed() -> Any:
        nonlocal most
        for value in range(6):
            batch = np.full((1, 1, SIZE, SIZE), value, np.uint8)
            alive.append(weakref.ref(batch))
            gc.collect()
            most = max(most, sum(entry() is not None for entry in alive))
            yield batch
            del batch

    quantise_with_modelopt(network, feed())
    assert most <= 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('the last words'); raise RuntimeError('no such operator')", "no such operator"),
        ("import os; print('the last words', flush=True); os.abort()", f"died by signal {signal.SIGABRT.value}"),
        ("print('the last words'); import sys; sys.exit(7)", "the last words"),
        ("print('the last words')", "without a result"),
        ("print('the last words'); open(output_path, 'wb').write(b'garbage' * 99)", "not a valid ONNX graph"),
        ("print('the last words'); open(output_path, 'wb').close()", "not a valid ONNX graph"),
        (
            "import onnx; print('the last words'); m = onnx.load(onnx_path); del m.graph.node[3]; "
            "onnx.save(m, output_path)",
            "not a valid ONNX graph",
        ),
        ("import shutil; print('the last words'); shutil.copy(onnx_path, output_path)", "quantised nothing"),
        (
            "import onnx; print('the last words'); m = onnx.load(onnx_path); "
            "m.graph.output.append(onnx.helper.make_tensor_value_info('block', 1, list('nchw'))); "
            "onnx.save(m, output_path)",
            "changed the model's outputs",
        ),
    ],
    ids=["exception", "signal", "exit", "nothing", "garbage", "empty", "dangling", "unquantised", "contract"],
)
def test_what_goes_wrong_in_the_child_is_said(
    network: onnx.ModelProto, batches: list[Any], fake: Fake, scratch: Path, body: str, message: str
) -> None:
    fake(body)
    with pytest.raises(UserError, match=message) as caught:
        quantise_with_modelopt(network, batches)
    assert "the last words" in str(caught.value)
    assert "--tool own" in str(caught.value)
    assert not list(scratch.iterdir())


def test_time_out_ends_the_child(
    network: onnx.ModelProto, batches: list[Any], fake: Fake, scratch: Path, tmp_path: Path
) -> None:
    fake(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    with pytest.raises(UserError, match="did not finish within 3 s; use fewer images"):
        quantise_with_modelopt(network, batches, timeout_s=3)
    # On a very busy machine the child may not have come as far as its first line.
    assert not (tmp_path / "pid").exists() or has_ended(int((tmp_path / "pid").read_text()))
    assert not list(scratch.iterdir())


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupt_ends_the_child_and_leaves_nothing(tmp_path: Path) -> None:
    write_fake(
        tmp_path / "fake",
        f"import os, time; open({str(tmp_path / 'new')!r}, 'w').write(str(os.getpid())); "
        f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pid')!r}); time.sleep(600)",
    )
    path = residual_model(tmp_path / "model.onnx")
    (tmp_path / "scratch").mkdir()
    code = (  # a shell's background jobs begin with SIGINT ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import numpy, onnx; from hpddrnet_trt.export.modelopt import quantise_with_modelopt as run; "
        f"run(onnx.load({str(path)!r}), [numpy.zeros((1, 1, {SIZE}, {SIZE}), numpy.uint8)])"
    )
    root = str(Path(modelopt.__file__).parents[2])
    search = os.pathsep.join([root, str(tmp_path / "fake")])
    environment = {**os.environ, "PYTHONPATH": search, "TMPDIR": str(tmp_path / "scratch")}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists():
            assert time.monotonic() < deadline
            assert parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(signal.SIGINT)
        _, errors = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert b"KeyboardInterrupt" in errors
    assert has_ended(int((tmp_path / "pid").read_text()))
    assert not list((tmp_path / "scratch").iterdir())


def test_missing_package_names_the_extra(
    network: onnx.ModelProto, batches: list[Any], fake: Fake, tmp_path: Path
) -> None:
    fake("pass")
    broken = "raise ImportError(\"No module named 'lief'\\nPlease install optional dependencies.\")"
    (tmp_path / "fake" / "modelopt" / "onnx" / "__init__.py").write_text(broken, encoding="utf-8")
    with pytest.raises(MissingDependency, match=r"No module named 'lief'.*hpddrnet-trt\[modelopt\]"):
        quantise_with_modelopt(network, batches)


def test_a_request_without_sense_is_refused(network: onnx.ModelProto, batches: list[Any]) -> None:
    with pytest.raises(UsageError, match="unknown ModelOpt method 'mse'; choose one of: max, entropy"):
        quantise_with_modelopt(network, batches, method="mse")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'int4'; choose one of: int8, fp8"):
        quantise_with_modelopt(network, batches, precision="int4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="FP8 needs the method 'max'"):
        quantise_with_modelopt(network, batches, precision="fp8", method="entropy")
    with pytest.raises(UsageError, match="no node called nothing"):
        quantise_with_modelopt(network, batches, exclude=["nothing"])
    with pytest.raises(UsageError, match="no calibration batch"):
        quantise_with_modelopt(network, [])


def test_nothing_of_modelopt_is_imported_here() -> None:
    code = (
        "import sys; from hpddrnet_trt.export import modelopt; modelopt.installed_version(); "
        "print([name for name in sys.modules if name.split('.')[0] in ('modelopt', 'torch', 'onnxruntime')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_allowed_are_the_nodes_of_our_own_plan(network: onnx.ModelProto) -> None:
    allowed = allowed_nodes(network)
    assert set(qdq.plan(network, "tensorrt").nodes) < set(allowed)
    assert "sum" in allowed
    assert not {GATE, "gated", "means", "query", "scores", "mixed", "fused", "full"} & set(allowed)


# ---------------------------------------------------------------------------- the real ModelOpt


def scales(model: onnx.ModelProto) -> dict[str, float]:
    """Scale of each quantised activation."""
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    quantisers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return {node.input[0]: float(constants[node.input[1]]) for node in quantisers}


def wide_network() -> onnx.ModelProto:
    """Convolutions with enough channels for ModelOpt, a residual sum, and a gate on a 1x1 map."""
    rng = np.random.default_rng(0)
    constants = []

    def conv(source: str, name: str, inputs: int, kernel: int = 3) -> onnx.NodeProto:
        weights = rng.normal(0, 0.1, (32, inputs, kernel, kernel)).astype(np.float32)
        constants.append(numpy_helper.from_array(weights, f"{name}.weight"))
        pads = [kernel // 2] * 4
        return helper.make_node("Conv", [source, f"{name}.weight"], [f"{name}.out"], f"{name}/Conv", pads=pads)

    def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{name}.out"], f"{name}/{kind}", **attributes)

    constants.append(numpy_helper.from_array(np.array([2, 3], np.int64), "space"))
    nodes = [
        node("Cast", ["image"], "float", to=TensorProto.FLOAT),
        conv("float.out", "stem", 1),
        node("Relu", ["stem.out"], "block"),
        conv("block.out", "one", 32),
        node("Relu", ["one.out"], "inner"),
        conv("inner.out", "two", 32),
        node("Add", ["two.out", "block.out"], "sum"),
        node("Relu", ["sum.out"], "after"),
        node("ReduceMean", ["after.out", "space"], "mean", keepdims=1),
        conv("mean.out", "gate", 32, 1),
        node("Sigmoid", ["gate.out"], "weight"),
        node("Mul", ["after.out", "weight.out"], "gated"),
        conv("gated.out", "last", 32),
        node("ArgMax", ["last.out"], "index", axis=1, keepdims=0),
        helper.make_node("Cast", ["index.out"], ["labels"], "labels/Cast", to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, "height", "width"])],
        [helper.make_tensor_value_info("labels", TensorProto.UINT8, ["batch", "height", "width"])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@needs_modelopt
def test_int8_pairs_and_ranges_are_those_of_max_calibration(batches: list[Any]) -> None:
    import onnxruntime

    model = wide_network()
    quantised = quantise_with_modelopt(model, batches)
    assert qdq.count_convolutions(quantised) == (4, 5)  # the gate's stays
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    found = scales(quantised)
    assert {"block.out", "inner.out", "gated.out"} <= found.keys()
    assert not {"mean.out", "weight.out", "two.out", "gate.out"} & found.keys()
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in found)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = [session.run(list(found), {"image": batch}) for batch in batches]
    peaks = {name: max(float(np.abs(run[i]).max()) for run in runs) for i, name in enumerate(found)}
    assert {name: 127.5 * scale for name, scale in found.items()} == pytest.approx(peaks, rel=0.005)
    types = {entry.name: entry.data_type for entry in quantised.graph.initializer}
    kernels = [node.input[0] for node in quantised.graph.node if node.op_type == "DequantizeLinear"]
    assert sum(types.get(name) == TensorProto.INT8 for name in kernels) == 4


@needs_modelopt
def test_the_same_inputs_give_the_same_graph_which_runs_as_half(batches: list[Any]) -> None:
    import onnxruntime

    model = wide_network()
    first, second = (quantise_with_modelopt(model, batches) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    half = to_half(first)
    labels = []
    for graph in (model, half):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        labels.append(np.stack([session.run(None, {"image": batch})[0] for batch in batches]))
    assert np.mean(labels[0] == labels[1]) > 0.9


@needs_modelopt
def test_fp8_maps_the_largest_value_to_36(batches: list[Any]) -> None:
    """ModelOpt 0.47 multiplies where it should divide; when this fails, it was corrected: say so in the module."""
    model = wide_network()
    int8, fp8 = quantise_with_modelopt(model, batches), quantise_with_modelopt(model, batches, precision="fp8")
    types = {entry.name: entry.data_type for entry in fp8.graph.initializer}
    quantisers = [node for node in fp8.graph.node if node.op_type == "QuantizeLinear"]
    assert {types[node.input[2]] for node in quantisers} == {TensorProto.FLOAT8E4M3FN}
    before, after = scales(int8), scales(fp8)
    common = before.keys() & after.keys()
    assert {"inner.out", "gated.out"} <= common
    assert {name: after[name] for name in common} == pytest.approx(
        {name: before[name] * 448 / 127 for name in common}, rel=1e-5
    )


@needs_modelopt
def test_real_network_on_real_micrographs(sem_data: Path) -> None:
    """The shipped network: all of our plan is INT8, nothing else, and labels hardly change."""
    from hpddrnet_trt.accuracy.judge import Judge
    from hpddrnet_trt.data.datasets import FolderDataset
    from hpddrnet_trt.engines.base import input_contract
    from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
    from hpddrnet_trt.export import images as micrographs
    from hpddrnet_trt.inference import Segmenter

    path = Path(modelopt.__file__).parents[1] / "weights" / "nasa-super1.onnx"
    model, manifest = load_model(path)
    crops = micrographs.plan_crops(sorted((sem_data / "nasa-super1/images/train").iterdir())[:4], 512, 512, 4)
    feed = micrographs.batches(crops, 512, 512, input_contract(manifest), manifest.normalisation)
    quantised = quantise_with_modelopt(model, feed)
    name_nodes(model)
    assert qdq.count_convolutions(quantised) == (len(qdq.plan(model, "tensorrt").nodes), 61)
    dataset = FolderDataset.open(sem_data / "nasa-super1")
    with Segmenter(OnnxRuntimeEngine(path)) as reference, Judge(dataset, "val", reference, progress=False) as judge:
        found = judge.score_graph(to_half(quantised), manifest.replace(precision="int8", quantised_for="tensorrt"))
    assert found.agreement > 0.99
    assert found.drop < 1
