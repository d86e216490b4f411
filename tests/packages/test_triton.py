"""Repositories for Triton: configurations by an independent parser, versions, the Python backend, and a real server."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from benchmarks.service import NAME, Server, program, refusals, serving
from hpddrnet_trt.cli.packages import ServiceOptions
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import AxisRange, EngineRecord, InputContract, Manifest, parse_manifest, sidecar_path
from hpddrnet_trt.engines import Prediction, load_engine
from hpddrnet_trt.packages import triton
from hpddrnet_trt.packages.triton import TritonSettings, export_triton
from hpddrnet_trt.packages.triton_model import TritonPythonModel
from hpddrnet_trt.weights import locate
from tests.toy import CLASSES, grey_image, manifest, write_toy_onnx

PYTHON = TritonSettings(name="toy", backend="python", engine="onnxruntime", precision="fp32", threads=1)
TWO_TO_FOUR = InputContract(batch=AxisRange(minimum=2, maximum=4))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A labels file that knows its domain, and whose class scores are not found."""
    return write_toy_onnx(tmp_path / "toy.onnx", manifest(domain=True))


def parsed(folder: Path) -> Any:
    """The configuration of a model, as NVIDIA's own messages read it."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), messages.ModelConfig())


def written_engine(path: Path, description: Manifest, **changes: Any) -> Path:
    """A file with the description of a TensorRT engine beside it."""
    content = b"a plan"
    record = {
        "runtime": "tensorrt", "version": "10.9.0.34", "compute_capabilities": ["8.9"], "gpu": "RTX 4000",
        "profiles": [{"min": [1, 1, 8, 8], "opt": [1, 1, 64, 64], "max": [8, 1, 128, 128]}] * 2, "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(), "layer_precision": {}, "build_seconds": 1.0, **changes,
    }  # fmt: skip
    path.write_bytes(content)
    sidecar_path(path).write_text(description.replace(engine=EngineRecord.model_validate(record)).to_json())
    return path


def tensors(entries: Any) -> dict[str, tuple[str, list[int]]]:
    kinds = {2: "UINT8", 11: "FP32"}
    return {entry.name: (kinds[entry.data_type], list(entry.dims)) for entry in entries}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- the repository ----------------------------------------------------------------------------------


def test_a_configuration_says_what_the_description_says(toy: Path, tmp_path: Path) -> None:
    exported = export_triton(toy, tmp_path / "models")
    assert exported.version == 1
    assert exported.models == {"toy": tmp_path / "models" / "toy"}
    assert "tiles of large images are cut" in exported.remarks[0]
    assert files(tmp_path / "models") == {"toy"}
    assert files(tmp_path / "models/toy") == {"config.pbtxt", "1"}
    assert (tmp_path / "models/toy/1/model.onnx").read_bytes() == toy.read_bytes()
    config = parsed(tmp_path / "models/toy")
    assert (config.name, config.backend, config.default_model_filename) == ("toy", "onnxruntime", "model.onnx")
    assert config.max_batch_size == 8
    assert tensors(config.input) == {"image": ("UINT8", [1, -1, -1])}
    assert tensors(config.output) == {"labels": ("UINT8", [-1, -1]), "domain_features": ("FP32", [3, -1, -1])}
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4, 8]
    assert config.dynamic_batching.default_queue_policy.allow_timeout_override
    assert config.version_policy.latest.num_versions == 2
    (warm_up,) = config.model_warmup
    assert list(warm_up.inputs["image"].dims) == [1, 1024, 1024]
    told = config.parameters["description.1"].string_value
    assert parse_manifest(told, "") == manifest(domain=True)
    assert config.parameters["sha256.1"].string_value == hashlib.sha256(toy.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("description", "most", "image", "outputs", "warm_up"),
    [
        (manifest("labels", True, 64), 8, [1, 64, 64], {"labels": [64, 64], "confidence": [64, 64]}, [1, 64, 64]),
        (manifest("logits"), 8, [1, -1, -1], {"logits": [3, -1, -1]}, [1, 1024, 1024]),
        (manifest(input=InputContract(batch=AxisRange(minimum=1, maximum=4))), 4, [1, -1, -1], {"labels": [-1, -1]},
         [1, 1024, 1024]),
        (manifest(input=InputContract(batch=AxisRange(minimum=2, maximum=2))), 0, [2, 1, -1, -1],
         {"labels": [2, -1, -1]}, [2, 1, 1024, 1024]),
        (manifest(input=TWO_TO_FOUR), 0, [-1, 1, -1, -1], {"labels": [-1, -1, -1]}, [2, 1, 1024, 1024]),
        (manifest(input=InputContract(height=AxisRange(minimum=96, maximum=608), multiple=32)), 8, [1, -1, -1],
         {"labels": [-1, -1]}, [1, 608, 1024]),
    ],
)  # fmt: skip
def test_sizes_and_batches_are_those_of_the_contract(
    tmp_path: Path, description: Manifest, most: int, image: list[int], outputs: dict[str, list[int]],
    warm_up: list[int],
) -> None:  # fmt: skip
    model = write_toy_onnx(tmp_path / "toy.onnx", description)
    config = parsed(export_triton(model, tmp_path / "models", PYTHON).models["toy"])
    assert config.max_batch_size == most
    assert config.HasField("dynamic_batching") == bool(most)
    assert tensors(config.input)["image"][1] == image
    assert {name: dims for name, (_, dims) in tensors(config.output).items()} == outputs
    assert list(config.model_warmup[0].inputs["image"].dims) == warm_up


def test_an_engine_is_a_plan_for_its_gpu(tmp_path: Path) -> None:
    batch = InputContract(batch=AxisRange(minimum=1, maximum=8))
    engine = written_engine(tmp_path / "toy.engine", manifest(input=batch), version_compatible=True)
    exported = export_triton(engine, tmp_path / "models", TritonSettings(instances=2))
    assert "tensorrt 10.9.0.34 or later in the server and a GPU of compute capability 8.9 (RTX 4000)" in (
        exported.remarks[0]
    )
    assert "version-compatible=true" in exported.remarks[1]
    config = parsed(tmp_path / "models/toy")
    assert (config.platform, config.default_model_filename) == ("tensorrt_plan", "model.engine")
    (group,) = config.instance_group
    assert (group.Kind.Name(group.kind), group.count, list(group.profile)) == ("KIND_GPU", 2, ["0", "1"])
    assert files(tmp_path / "models/toy/1") == {"model.engine", "model.engine.json"}
    for changes in ({"runtime": "tensorrt-rtx"}, {"stripped": True}, {"platform": "windows"}):
        other = written_engine(tmp_path / "other.engine", manifest(), **changes)
        with pytest.raises(UserError, match="no plan that the server's TensorRT runs"):
            export_triton(other, tmp_path / "models")
    own = export_triton(other, tmp_path / "models", TritonSettings(backend="python"))
    assert parsed(own.models["other"]).instance_group[0].kind == group.kind
    engine.write_bytes(b"a flat")
    with pytest.raises(UserError, match="is not the engine that"):
        export_triton(engine, tmp_path / "models")


@pytest.mark.parametrize(
    ("settings", "arithmetic"),
    [
        (TritonSettings(name="alloy", backend="onnxruntime"), "fp32"),
        (TritonSettings(name="alloy", backend="python", precision="bf16"), "bf16"),
    ],
)
def test_a_labels_file_brings_its_class_scores(tmp_path: Path, settings: TritonSettings, arithmetic: str) -> None:
    if settings.precision == "bf16":
        pytest.importorskip("openvino")
    model = locate("nasa-super1")
    exported = export_triton(model, tmp_path, settings)
    assert list(exported.models) == ["alloy", "alloy-scores"]
    assert [arithmetic.upper() in remark for remark in exported.remarks] == [True] * (settings.backend == "python")
    configs = {name: parsed(folder) for name, folder in exported.models.items()}
    assert {config.parameters["arithmetic.1"].string_value for config in configs.values()} == {arithmetic}
    assert tensors(configs["alloy"].output)["labels"] == ("UINT8", [-1, -1])
    assert tensors(configs["alloy-scores"].output)["logits"] == ("FP32", [3, -1, -1])
    described = parse_manifest(configs["alloy-scores"].parameters["description.1"].string_value, "")
    assert described.output is not None
    assert described.output.kind == "logits"
    only = export_triton(model, tmp_path, replace(settings, name="plain", scores=False))
    assert list(only.models) == ["plain"]


# -- versions ----------------------------------------------------------------------------------------


def test_a_version_more_keeps_what_the_others_say(toy: Path, tmp_path: Path) -> None:
    export_triton(toy, tmp_path / "models", PYTHON)
    (tmp_path / "models/toy/1/model.onnx").touch()  # as it was; a server may have it open
    second = write_toy_onnx(tmp_path / "second.onnx", manifest(domain=True).replace(name='better "still" \\ µ'))
    exported = export_triton(second, tmp_path / "models", PYTHON)
    assert exported.version == 2
    parameters = parsed(tmp_path / "models/toy").parameters
    names = [parse_manifest(parameters[f"description.{n}"].string_value, "").name for n in (1, 2)]
    assert names == ["toy", 'better "still" \\ µ']
    shutil.rmtree(tmp_path / "models/toy/2")  # back to the old one; clients remember this number
    assert export_triton(second, tmp_path / "models", PYTHON).version == 3
    described = [key for key in parsed(tmp_path / "models/toy").parameters if key.startswith("description.")]
    assert sorted(described) == ["description.1", "description.3"]


@pytest.mark.parametrize(
    ("description", "differs"),
    [
        (manifest("logits", domain=True), "outputs"),
        (manifest(), "outputs"),
        (manifest(domain=True, input=TWO_TO_FOUR), "sizes or types of the input"),
        (manifest(domain=True, classes=[*CLASSES[:2], CLASSES[2].model_copy(update={"name": "ice"})]), "classes"),
    ],
)
def test_versions_are_of_one_kind(toy: Path, tmp_path: Path, description: Manifest, differs: str) -> None:
    export_triton(toy, tmp_path / "models", PYTHON)
    before = (tmp_path / "models/toy/config.pbtxt").read_bytes()
    other = write_toy_onnx(tmp_path / "other.onnx", description)
    with pytest.raises(UserError, match=f"has other {differs} than version 1"):
        export_triton(other, tmp_path / "models", PYTHON)
    with pytest.raises(UserError, match="has other files than version 1"):
        export_triton(toy, tmp_path / "models")
    assert (tmp_path / "models/toy/config.pbtxt").read_bytes() == before
    assert files(tmp_path / "models/toy") == {"config.pbtxt", "1"}


@pytest.mark.parametrize("fails", ["copyfile", "write_text"])
def test_a_full_disk_leaves_the_repository_as_it_was(
    toy: Path, tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_triton(toy, tmp_path / "models", PYTHON)
    before = (tmp_path / "models/toy/config.pbtxt").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(triton, fails, full)
        with pytest.raises((UserError, OSError), match="No space left"):
            export_triton(toy, tmp_path / "models", PYTHON)
        if fails == "copyfile":
            with pytest.raises(UserError, match="No space left"):
                export_triton(toy, tmp_path / "new", PYTHON)
            assert files(tmp_path / "new") == set()
    assert files(tmp_path / "models/toy") == {"config.pbtxt", "1"}
    assert (tmp_path / "models/toy/config.pbtxt").read_bytes() == before
    assert export_triton(toy, tmp_path / "models", PYTHON).version == 2


def test_two_at_once_do_not_take_each_others_version(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(source: Path, target: Path) -> None:
        shutil.copyfile(source, target)
        with monkeypatch.context() as patch:
            patch.setattr(triton, "copyfile", shutil.copyfile)
            export_triton(toy, tmp_path / "models", replace(PYTHON, batch=2))

    for version in (1, 2):
        monkeypatch.setattr(triton, "copyfile", slowly)
        with pytest.raises(UserError, match="somebody else has just written"):
            export_triton(toy, tmp_path / "models", PYTHON)
        assert files(tmp_path / "models/toy") == {"config.pbtxt", *map(str, range(1, version + 1))}
        assert parsed(tmp_path / "models/toy").max_batch_size == 2


def test_what_is_refused(toy: Path, tmp_path: Path) -> None:
    def refused(says: str, model: Path = toy, **settings: Any) -> None:
        with pytest.raises(UserError, match=says):
            export_triton(model, tmp_path / "models", TritonSettings(**settings))
        assert not (tmp_path / "models").exists()

    refused("no ONNX or engine file", tmp_path / "model.safetensors")
    refused("does not exist", tmp_path / "none.onnx")
    refused("the tensorrt_plan backend does not run", backend="tensorrt_plan")
    refused("the onnxruntime backend does not run", written_engine(tmp_path / "e.engine", manifest()),
            backend="onnxruntime")  # fmt: skip
    refused("a name of letters", name="a/b")
    refused("a name of letters", toy.rename(tmp_path / "no name.onnx"))
    refused("queue must be at least 1", queue=0)
    refused("precision and threads is of our engines", precision="fp32", threads=2)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes((tmp_path / "no name.onnx").read_bytes()[:-40])
    refused(".", damaged)
    quantized = write_toy_onnx(tmp_path / "q.onnx", manifest(precision="int8", quantized_for="tensorrt"))
    refused("other programs compute such files with other labels", quantized)
    with pytest.raises(UserError, match="cannot write"):
        export_triton(locate("nasa-super1"), quantized)
    (tmp_path / "theirs/toy/1").mkdir(parents=True)
    toy = write_toy_onnx(toy, manifest())
    for config, says in (("", "was not written by export-triton"), (None, "does not exist")):
        if config is not None:
            (tmp_path / "theirs/toy/config.pbtxt").write_text(config)
        else:
            (tmp_path / "theirs/toy/config.pbtxt").unlink()
        with pytest.raises(UserError, match=says):
            export_triton(toy, tmp_path / "theirs")


def test_the_command_has_the_same_settings() -> None:
    assert vars(ServiceOptions()) == vars(TritonSettings())
    annotation = ServiceOptions.__annotations__["backend"]
    assert all(name in str(annotation) for name in get_args(triton.Backend))


# -- the Python backend, with a server that is not there ---------------------------------------------


class Tensor:
    """As the backend's: an array by DLPack alone."""

    def __init__(self, array: Any) -> None:
        self.array = np.array(array)

    def __dlpack__(self, **_: Any) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> tuple[str, Any]:
        class Given:
            def __dlpack__(self, **_: Any) -> Any:
                return capsule

            def __dlpack_device__(self) -> tuple[int, int]:
                return (1, 0)

        return name, np.from_dlpack(Given()).copy()


class Family(list[Any]):
    """Counters by their labels."""

    COUNTER = "counter"

    def __init__(self, name: str, description: str, kind: str) -> None:
        super().__init__()

    def Metric(self, labels: dict[str, str]) -> Any:
        self.append(types.SimpleNamespace(labels=labels, value=0))
        metric = self[-1]
        metric.increment = lambda by: setattr(metric, "value", metric.value + by)
        return metric


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """What the backend's module has of what is used."""
    module: Any = types.ModuleType("triton_python_backend_utils")

    class TritonError(Exception):
        INVALID_ARG, INTERNAL, UNAVAILABLE = "invalid", "internal", "unavailable"

    module.Tensor, module.MetricFamily, module.TritonError = Tensor, Family, TritonError
    module.TritonModelException = RuntimeError
    module.InferenceResponse = lambda tensors=(), error=None: error or dict(tensors)
    module.get_input_tensor_by_name = lambda request, name: request.image
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def request(image: Any, *outputs: str, cancelled: bool = False, parameters: str = "") -> Any:
    return types.SimpleNamespace(
        image=Tensor(image), requested_output_names=lambda: list(outputs), is_cancelled=lambda: cancelled,
        parameters=lambda: parameters,
    )  # fmt: skip


def started(folder: Path, version: int = 1) -> TritonPythonModel:
    told = re.findall(r'key: "(.*?)" value \{ string_value: (".*") \} \}', (folder / "config.pbtxt").read_text())
    parameters = {name: {"string_value": json.loads(value)} for name, value in told}
    model = TritonPythonModel()
    model.initialize({
        "model_config": json.dumps({"parameters": parameters, "model_warmup": [{}]}), "model_name": folder.name,
        "model_repository": str(folder), "model_version": str(version), "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    })  # fmt: skip
    return model


def counts(model: TritonPythonModel) -> dict[str, int]:
    return {name: metric.value for name, metric in [*model._pictures.items(), *model._requests.items()] if metric.value}


def batch(height: int = 64, width: int = 48, count: int = 1) -> Any:
    return np.stack([grey_image(height, width, seed)[None] for seed in range(count)])


def test_the_backend_answers_as_the_engine_does(toy: Path, tmp_path: Path, backend: Any) -> None:
    folder = export_triton(toy, tmp_path / "models", PYTHON).models["toy"]
    model = started(folder)
    model.execute([request(batch(), "labels")])  # the server's own, which is no picture
    white = np.full((1, 1, 64, 64), 255, np.uint8)
    asked = [batch(), batch(32, 32, count=3), white]
    answers = model.execute([request(each, "labels", "domain_features") for each in asked])
    with load_engine(toy, "onnxruntime", threads=1) as engine:
        for given, answer in zip(asked, answers, strict=True):
            expected = engine.infer(given)
            assert np.array_equal(answer["labels"], expected.labels)
            assert np.array_equal(answer["domain_features"], expected.domain_features)
    found = counts(model)
    assert found == {"answered": 4, "familiar": 4, "foreign": 1}
    model.finalize()
    gc.collect()


def test_the_backend_refuses_one_and_answers_the_others(
    toy: Path, tmp_path: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(PYTHON, largest_pixels=64 * 64)
    model = started(export_triton(toy, tmp_path / "models", settings).models["toy"])
    good = request(batch(), "labels")
    floats, gone = request(batch().astype(np.float32)), request(batch(), cancelled=True)
    answers = model.execute([request(batch(63, 48)), good, request(batch(72, 64)), floats, gone])
    assert [getattr(answer, "args", None) and answer.args[1] for answer in answers] == [
        "invalid", None, "invalid", "invalid", "invalid"
    ]  # fmt: skip
    said = ("multiples of 8", "larger than the 4096 pixels", "nobody waits")
    for answer, says in zip(answers[::2], said, strict=True):
        assert says in answer.args[0]
    assert counts(model) == {"refused": 4, "answered": 1}

    def fails(_: Any, problem: Exception) -> Prediction:
        raise problem

    for problem, kind, says in (
        (UserError("out of order"), "internal", "out of order"),
        (MemoryError(), "unavailable", "no memory left"),
        (ZeroDivisionError("/secret/path"), "internal", "the server's log says how"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(model._engine, "infer", lambda given, problem=problem: fails(given, problem))
            (answer,) = model.execute([good])
        assert answer.args[1] == kind
        assert says in answer.args[0]
    assert "labels" in model.execute([good])[0]


def test_a_row_of_batches_is_one_for_the_engine_too(
    toy: Path, tmp_path: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO's rows round otherwise than its single inferences."""
    model = started(export_triton(toy, tmp_path / "models", PYTHON).models["toy"])
    rows: list[list[int]] = []
    usual = model._engine.infer_many

    def infer_many(batches: Any) -> Any:
        rows.append([len(each) for each in batches])
        if rows[-1][0] == 4:
            raise UserError("too many")
        return usual(batches)

    monkeypatch.setattr(model._engine, "infer_many", infer_many)
    parts = [(1, ""), (2, '{"many": true}'), (3, '{"many": true, "other": 1}'), (1, '{"many": false}')]
    answers = model.execute([request(batch(8, 8, count), "labels", parameters=told) for count, told in parts])
    assert [len(answer["labels"]) for answer in answers] == [1, 2, 3, 1]
    assert rows == [[2, 3]]
    answers = model.execute([request(batch(8, 8, count), "labels", parameters=parts[1][1]) for count in (4, 2)])
    assert rows[1:] == [[4, 2], [4], [2]]
    assert answers[0].args == ("too many", "internal")
    assert len(answers[1]["labels"]) == 2


def test_float_input_must_be_numbers(tmp_path: Path, backend: Any) -> None:
    floats = InputContract(dtype="float32", channels=3)
    model = TritonPythonModel()
    model._server, model._contract, model._largest = backend, floats, 10**6
    image = np.zeros((1, 3, 8, 8), np.float32)
    assert model._batch(request(image)).shape == image.shape
    image[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="not numbers"):
        model._batch(request(image))


def test_the_backend_says_why_a_file_does_not_open(toy: Path, tmp_path: Path, backend: Any) -> None:
    folder = export_triton(toy, tmp_path / "models", PYTHON).models["toy"]
    (folder / "1/model.onnx").write_bytes(b"not onnx")
    with pytest.raises(RuntimeError, match="is not a readable ONNX file"):
        started(folder)


# -- a real server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A real server with our models, for the backends that it has and for those that it lacks."""
    tritonserver = program()
    if tritonserver is None:
        pytest.skip("no Triton server here: HPDDRNET_TRITON names its program, docs/service.md says where to have one")
    folder = tmp_path_factory.mktemp("triton")
    repository = folder / "repository"
    toy = write_toy_onnx(folder / "toy.onnx", manifest(domain=True))
    export_triton(toy, repository, replace(PYTHON, name=NAME, instances=2))
    pair = InputContract(batch=AxisRange(minimum=2, maximum=2))
    two = write_toy_onnx(folder / "pair.onnx", manifest(input=pair))
    export_triton(two, repository, replace(PYTHON, name="pair"))
    export_triton(toy, repository, TritonSettings(name="onnx"))
    export_triton(written_engine(folder / "plan.engine", manifest()), repository)
    with serving(tritonserver, repository, folder, "--exit-on-error=false") as running:
        for name in (NAME, "pair"):
            running.wait(f"models/{name}/versions/1/ready", seconds=60)
        yield running, repository


def ask(
    server: Server, image: Any, model: str = NAME, version: str = "", outputs: tuple[str, ...] = ("labels",)
) -> Any:
    grpc = pytest.importorskip("tritonclient.grpc")
    client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
    given = grpc.InferInput("image", image.shape, "UINT8")
    given.set_data_from_numpy(image)
    wanted = [grpc.InferRequestedOutput(name) for name in outputs]
    answer = client.infer(model, [given], model_version=version, outputs=wanted)
    return [answer.as_numpy(name) for name in outputs]


def test_a_real_server_gives_the_labels_of_the_engine(server: tuple[Server, Path]) -> None:
    running, repository = server
    with load_engine(repository / NAME / "1/model.onnx", "onnxruntime", threads=1) as engine:
        for size in ((64, 48, 1), (128, 128, 3), (8, 8, 8)):
            image = batch(*size)
            labels, features = ask(running, image, outputs=("labels", "domain_features"))
            expected = engine.infer(image)
            assert np.array_equal(labels, expected.labels)
            assert np.array_equal(features, expected.domain_features)
        image = batch(count=2)
        assert np.array_equal(ask(running, image, "pair")[0], engine.infer(image).labels)
    page = running.page()
    states = {key: value for key, value in page.items() if key.startswith(f'hpddrnet_pictures{{model="{NAME}"')}
    assert sum(states.values()) == 12
    log = running.log.read_text(errors="replace")
    assert "PyCapsule" not in log
    # The configurations are good for it; the backends are not there.
    assert "unable to find backend library for backend 'onnxruntime'" in log
    assert re.search(r"failed to load 'plan' version 1.*tensorrt", log)


def test_a_real_server_refuses_in_a_sentence(server: tuple[Server, Path]) -> None:
    said = refusals(server[0])
    assert "multiples of 8, got 63x64" in said["a size that is no multiple"]
    assert "is larger than the 16777216 pixels" in said["too large"]
    assert "not allowed if polling is enabled" in said["loading a model"]


def test_a_new_version_comes_while_the_old_one_answers(server: tuple[Server, Path]) -> None:
    running, repository = server
    second = repository.parent / "second.onnx"
    shutil.copy(repository / NAME / "1/model.onnx", second)
    image = batch()
    (before,) = ask(running, image, version="1")
    assert export_triton(second, repository, replace(PYTHON, name=NAME)).version == 2
    answered = 0
    while not running.ready(f"models/{NAME}/versions/2/ready"):
        assert np.array_equal(ask(running, image, version="1")[0], before)
        assert np.array_equal(ask(running, image)[0], before)
        answered += 2
        assert answered < 100_000
    assert np.array_equal(ask(running, image, version="2")[0], before)
    assert np.array_equal(ask(running, image, version="1")[0], before)
