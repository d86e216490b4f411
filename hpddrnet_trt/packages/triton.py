"""A model repository for NVIDIA Triton Inference Server, all of it from the model's own description.

``REPOSITORY/NAME/config.pbtxt`` and ``REPOSITORY/NAME/1/...`` hold the file as it is; of an ONNX file with labels whose
class scores are found (:mod:`hpddrnet_trt.graph.scores`), ``NAME-scores`` holds the form with logits, so that tiles of
large images are blended over the service as well. The parameter ``description.VERSION`` of a configuration is what
that version says about itself, ``sha256.VERSION`` the checksum of the file that was exported and
``arithmetic.VERSION`` what its labels are computed in.

Sources: NVIDIA, Triton Inference Server, "Model Configuration" and "Model Repository".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Literal

from hpddrnet_trt.core.domain import OUTPUT as DOMAIN_OUTPUT
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.files import atomic_folder, read_file, sha256_of, write_text
from hpddrnet_trt.core.manifest import METADATA_KEY, AxisRange, Manifest, parse_manifest, read_manifest, sidecar_path
from hpddrnet_trt.core.precisions import is_calibrated
from hpddrnet_trt.engines import Arithmetic, Opening, opening_of
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.engines.engine_file import engine_record, verified_content
from hpddrnet_trt.engines.tensorrt_library import INPUT
from hpddrnet_trt.engines.triton import SCORES
from hpddrnet_trt.graph.check import check_onnx, load_checked
from hpddrnet_trt.graph.scores import with_scores
from hpddrnet_trt.inference.runner import WHOLE_PIXELS, tile_size
from hpddrnet_trt.packages.contents import read_packed
from hpddrnet_trt.packages.triton_model import LARGEST, OPENED

Backend = Literal["auto", "tensorrt_plan", "onnxruntime", "python"]
CONFIG = "config.pbtxt"
_MODEL_PY = b"from hpddrnet_trt.packages.triton_model import TritonPythonModel  # noqa: F401\n"
# In place of the folder that Python would make: a server that polls takes that for a change, and loads again.
_NO_FOLDER = b"A file, so that Python keeps nothing here.\n"
_PARAMETER = re.compile(r'^parameters \{ key: "(\w+)\.(\d+)" value \{ string_value: (".*") \} \}$', re.MULTILINE)


@dataclass(frozen=True)
class TritonSettings:
    """What the model's description does not say.

    - ``name``: of the model on the server; default: the file's.
    - ``backend``: ``auto``: ``tensorrt_plan`` for an engine file, ``onnxruntime`` for an ONNX file; ``python`` runs
      our own engines as :func:`~hpddrnet_trt.load_segmenter` opens the file here and now with ``engine``,
      ``precision`` and ``threads``, with ``gpu`` on each GPU of the server.
    - ``scores``: also write the model with class scores, where they are found.
    - ``batch``: pictures that the server puts together at most, within what the model admits; ``wait_us``: how long it
      waits for more of them, in microseconds; ``queue``: requests that wait at most, more are refused.
    - ``instances``: of the model, on each GPU where it runs on GPUs.
    - ``versions``: how many of the newest are served at once: two, so that who began with one ends with it.
    - ``largest_pixels``: of one picture, which the Python backend holds to; the others know the model's own limits.
    """

    name: str | None = None
    backend: Backend = "auto"
    scores: bool = True
    batch: int = 8
    wait_us: int = 500
    queue: int = 256
    instances: int = 1
    versions: int = 2
    largest_pixels: int = 4 * WHOLE_PIXELS
    engine: str = "auto"
    precision: Arithmetic = "auto"
    threads: int | None = None
    gpu: bool = False

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name, re.ASCII):
            raise UsageError(f"a model on a server has a name of letters, digits, '.', '_' and '-', not {self.name!r}")
        for name in ("batch", "queue", "instances", "versions", "largest_pixels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        own = {"engine": "auto", "precision": "auto", "threads": None, "gpu": False}
        given = [name for name, default in own.items() if getattr(self, name) != default]
        if given and self.backend != "python":
            raise UsageError(f"{' and '.join(given)} is of our engines, which --backend python runs; add that")


@dataclass(frozen=True)
class Exported:
    """What :func:`export_triton` wrote: ``models`` by name with their folder, all of the same ``version``.

    ``remarks`` is what to know before the server is started.
    """

    models: Mapping[str, Path]
    version: int
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Model:
    """One model of the repository: its description, and the files of its version by name, from where or of what.

    ``file``: of these, the one that runs; ``opening``: how the Python backend opens it.
    """

    name: str
    manifest: Manifest
    files: Mapping[str, Path | bytes]
    file: str
    opening: Opening | None

    def told(self, checksum: str) -> dict[str, str]:
        """Parameters of the version."""
        own, opening = self.manifest.precision, self.opening
        chosen = own if opening is None or is_calibrated(own) else opening.options.get("precision", own)
        told = {"description": self.manifest.to_json(), "sha256": checksum, "arithmetic": str(chosen or "fp32")}
        if opening is not None:
            told[OPENED] = json.dumps([self.file, opening.engine, dict(opening.options)])
        return told


def export_triton(model: str | Path, repository: str | Path, settings: TritonSettings | None = None) -> Exported:
    """Write ``model``, an ONNX or engine file, as the next version of a model in ``repository``.

    A server never sees half a version: its folder appears whole, after the configuration that describes it.

    Raises :class:`UsageError` for a backend that does not run the file, and for a version whose input, outputs or
    classes are not those of the versions there; :class:`BadInputFile` for a file that is damaged.
    """
    path, repository, settings = Path(model), Path(repository), settings or TritonSettings()
    backend = _backend(path, settings)
    models, remarks = _models(path, backend, settings)
    known = {one.name: _versions(repository / one.name, one) for one in models}
    version = max(highest for _, highest in known.values()) + 1
    checksum = sha256_of(path)
    for one in reversed(models):  # who finds the model finds its scores
        described = {**known[one.name][0], version: one.told(checksum)}
        _write(repository / one.name, version, one, _config(one, backend, settings, described))
    return Exported({one.name: repository / one.name for one in models}, version, remarks)


def _backend(path: Path, settings: TritonSettings) -> str:
    """The one that runs the file; :class:`UsageError` where the chosen one does not."""
    suitable = {".engine": ("tensorrt_plan", "python"), ".onnx": ("onnxruntime", "python")}.get(path.suffix.lower())
    if suitable is None:
        raise UsageError(f"{path} is no ONNX or engine file, which servers run; export the checkpoint first")
    backend = suitable[0] if settings.backend == "auto" else settings.backend
    if backend not in suitable:
        raise UsageError(f"the {backend} backend does not run {path}; choose one of: auto, {', '.join(suitable)}")
    return backend


def _models(path: Path, backend: str, settings: TritonSettings) -> tuple[list[_Model], tuple[str, ...]]:
    """What is written of a file, and remarks; everything is checked here."""
    manifest = read_manifest(path)
    input_contract(manifest)
    name, file = settings.name or path.stem, f"model{path.suffix.lower()}"
    files: dict[str, Path | bytes] = {file: path}
    if path.suffix.lower() == ".engine":
        files[sidecar_path(file).name] = sidecar_path(path)
        remarks = _engine_remarks(path, manifest, backend)
    else:
        remarks = ()
        if backend == "onnxruntime":
            read_packed(path)
        else:
            check_onnx(path)
    TritonSettings(name=name)  # the file's name may not do
    code: dict[str, Path | bytes] = {}
    opening = None
    if backend == "python":
        code = {"model.py": _MODEL_PY, "__pycache__": _NO_FOLDER}
        options = {"threads": settings.threads, "device": "cuda" if settings.gpu else None}
        opening = opening_of(path, settings.engine, settings.precision, options)
    models = [_Model(name, manifest, files | code, file, opening)]
    labels = manifest.output is not None and manifest.output.kind == "labels"
    if labels and settings.scores and path.suffix.lower() == ".onnx":
        graph = with_scores(load_checked(path), manifest)
        if graph is not None:
            described = next(prop.value for prop in graph.metadata_props if prop.key == METADATA_KEY)
            content = {file: graph.SerializeToString()}
            models.append(_Model(f"{name}{SCORES}", parse_manifest(described, path), content | code, file, opening))
    if opening is not None:
        said = models[0].told("")["arithmetic"].upper()
        remarks += (f"{name} runs with {opening.engine} in {said}, as here; --engine and --precision choose others",)
    if labels and len(models) == 1:
        remarks += (f"{name} gives labels only: over the service, tiles of large images are cut, not blended",)
    return models, remarks


def _engine_remarks(path: Path, manifest: Manifest, backend: str) -> tuple[str, ...]:
    record = engine_record(path, manifest)
    verified_content(path, record)
    if backend == "tensorrt_plan" and (record.runtime != "tensorrt" or record.stripped or record.platform):
        raise UsageError(
            f"{path} is no plan that the server's TensorRT runs as it is (TensorRT-RTX, without weights, or for "
            "Windows); build it with TensorRT on the server's GPU, or use --backend python"
        )
    versions = f"{record.runtime} {record.version}{' or later' if record.version_compatible else ''}"
    gpus = f"compute capability {', '.join(record.compute_capabilities)}"
    remarks = [f"the plan needs {versions} in the server and a GPU of {gpus}{f' ({record.gpu})' if record.gpu else ''}"]
    if backend == "tensorrt_plan" and record.version_compatible:
        remarks.append("start the server with --backend-config=tensorrt,version-compatible=true")
    return tuple(remarks)


# -- what is there already ---------------------------------------------------------------------------


def _versions(folder: Path, new: _Model) -> tuple[dict[int, dict[str, str]], int]:
    """Parameters of the versions in a model's folder, which the new one must be like; the highest number given yet,
    also to one that was taken away: clients may remember it."""
    if not folder.exists():
        return {}, 0
    text = read_file(folder / CONFIG, "configuration").decode("utf-8", "replace")
    parameters: dict[int, dict[str, str]] = {}
    for what, version, value in _PARAMETER.findall(text):
        parameters.setdefault(int(version), {})[what] = json.loads(value)
    present = {int(each.name): each for each in folder.iterdir() if each.is_dir() and each.name.isdecimal()}
    for version, at in present.items():
        if "description" not in parameters.get(version, {}):
            raise UsageError(f"{at} was not written by export-triton; choose another --name or repository")
        there = {each.name for each in at.iterdir() if each.is_file()}
        differing = "files" if there != set(new.files) else _difference(
            parse_manifest(parameters[version]["description"], folder / CONFIG), new.manifest
        )  # fmt: skip
        if differing is not None:
            raise UsageError(
                f"the new version of {new.name} has other {differing} than version {version} in {folder}, and clients "
                "take one for the other; choose another --name"
            )
    return {version: parameters[version] for version in sorted(present)}, max([*parameters, *present], default=0)


def _difference(old: Manifest, new: Manifest) -> str | None:
    """What clients would notice."""
    if old.input != new.input:
        return "sizes or types of the input"
    if _outputs(old) != _outputs(new):
        return "outputs"
    return "classes" if old.class_names != new.class_names else None


# -- the configuration -------------------------------------------------------------------------------


def _config(
    model: _Model, backend: str, settings: TritonSettings, described: Mapping[int, Mapping[str, str]]
) -> str:
    """The text of ``config.pbtxt``."""
    manifest, contract = model.manifest, input_contract(model.manifest)
    batched = contract.batch.minimum == 1 and contract.batch.fixed is None
    most = min(settings.batch, contract.batch.maximum or settings.batch) if batched else 0
    kind = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}[contract.dtype]
    runs = {"tensorrt_plan": "platform"}.get(backend, "backend")
    file = "model.py" if backend == "python" else model.file

    def tensor(name: str, of: str, sizes: list[int]) -> str:
        dims = sizes if batched else [_size(contract.batch), *sizes]
        return f'{{ name: "{name}" data_type: {of} dims: {dims} }}'

    tile = [contract.channels, *tile_size(manifest, "single", "auto")]
    warm_up = f"data_type: {kind} dims: {tile if batched else [contract.batch.minimum, *tile]} random_data: true"
    lines = [
        f'name: "{model.name}"',
        f'{runs}: "{backend}"',
        f'default_model_filename: "{file}"',
        f"max_batch_size: {most}",
        f"input {tensor(INPUT, kind, [contract.channels, _size(contract.height), _size(contract.width)])}",
        *(f"output {tensor(name, of, sizes)}" for name, (of, sizes) in _outputs(manifest).items()),
        f"version_policy {{ latest {{ num_versions: {settings.versions} }} }}",
        f"instance_group {{ {_instances(manifest, backend, settings)} }}",
        f'model_warmup {{ name: "tile" batch_size: 1 inputs {{ key: "{INPUT}" value {{ {warm_up} }} }} }}',
    ]
    if most:
        # Clients say how long they wait: what nobody waits for any more is not computed.
        queue = f"timeout_action: REJECT allow_timeout_override: true max_queue_size: {settings.queue}"
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: {[size for size in (2, 4, 8, 16, 32, 64) if size <= most]} "
            f"max_queue_delay_microseconds: {settings.wait_us} default_queue_policy {{ {queue} }} }}"
        )
    parameters = {f"{what}.{version}": text for version, of in described.items() for what, text in of.items()}
    if backend == "python":
        parameters[LARGEST] = str(settings.largest_pixels)
    lines += [  # a line each, which _PARAMETER reads
        f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}'
        for key, value in parameters.items()
    ]
    return "\n".join(lines) + "\n"


def _outputs(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Type and sizes of each output, without the batch."""
    contract, output = input_contract(manifest), manifest.output
    assert output is not None  # where there is an input
    plane = [_size(contract.height), _size(contract.width)]
    outputs = {"labels": ("TYPE_UINT8", plane)}
    if output.kind == "logits":
        outputs = {"logits": ("TYPE_FP32", [manifest.network.num_classes, *plane])}
    elif output.confidence:
        outputs["confidence"] = ("TYPE_FP32", plane)
    if output.domain:
        features = -1 if manifest.domain is None else len(manifest.domain.mean)
        outputs[DOMAIN_OUTPUT] = ("TYPE_FP32", [features, -1, -1])
    return outputs


def _size(axis: AxisRange) -> int:
    return -1 if axis.fixed is None else axis.fixed


def _instances(manifest: Manifest, backend: str, settings: TritonSettings) -> str:
    on_gpu = manifest.engine is not None or settings.gpu
    kind = "KIND_GPU" if on_gpu else "KIND_AUTO" if backend == "onnxruntime" else "KIND_CPU"
    profiles = 0 if manifest.engine is None or backend == "python" else len(manifest.engine.profiles)
    named = "".join(f' profile: "{number}"' for number in range(profiles))
    return f"count: {settings.instances} kind: {kind}{named if profiles > 1 else ''}"


def _write(folder: Path, version: int, model: _Model, config: str) -> None:
    """A new model's folder at once; in an existing one the configuration first, then the version's folder."""
    new = not folder.exists()
    target = folder if new else folder / str(version)
    with atomic_folder(target) as fresh:
        place = fresh / str(version) if new else fresh
        place.mkdir(exist_ok=True)
        if new:
            (fresh / CONFIG).write_text(config, encoding="utf-8")
        for name, content in model.files.items():
            if isinstance(content, bytes):
                (place / name).write_bytes(content)
            else:
                copyfile(content, place / name)
        if target.exists():
            raise UsageError(f"somebody else has just written {target}; run this again, for the version after it")
        if not new:
            write_text(folder / CONFIG, config)  # until the folder is there, it says more than is served: nobody minds
