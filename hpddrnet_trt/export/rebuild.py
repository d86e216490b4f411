"""An engine file that does not fit this machine any more, built again from the ONNX file beside it."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hpddrnet_trt.core.errors import BadInputFile, EngineDoesNotFit, first_problem
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.core.manifest import EngineRecord, Manifest, read_manifest
from hpddrnet_trt.core.precisions import PRECISIONS
from hpddrnet_trt.engines.cuda import find_gpu
from hpddrnet_trt.engines.engine_file import check_gpu, engine_record
from hpddrnet_trt.engines.profiles import Profile
from hpddrnet_trt.engines.tensorrt_library import PORTABLE
from hpddrnet_trt.export.build_settings import OF_THE_BUILD, BuildSettings
from hpddrnet_trt.export.tensorrt import build_engine

logger = logging.getLogger(__name__)


def rebuild_engine(path: str | Path, *, progress: bool = True) -> Manifest:
    """Build the engine ``path`` again for this machine: same precision, profiles, settings and runtime.

    It takes the ONNX file beside it that it was built from. The files are replaced whole at the end; until then, and
    where the build fails, the old ones stay. Accuracy is not verified again, and a warning says so.
    ``progress``: show a progress bar on the standard error output.

    Raises :class:`BadInputFile` for a missing or other ONNX file, :class:`NoGpu`, and what
    :func:`~hpddrnet_trt.export.tensorrt.build_engine` raises.
    """
    path = existing_file(path, "engine file")
    manifest = read_manifest(path)
    record = engine_record(path, manifest)
    source = _source(path, manifest, record)
    known = {field.name for field in fields(BuildSettings)} - {"compute_capabilities", *OF_THE_BUILD}
    given = {name: value for name, value in record.settings.items() if name in known}
    try:
        settings = TypeAdapter(BuildSettings).validate_python(given)
    except ValidationError as exc:
        raise BadInputFile(
            f"the builder's settings in the description of {path} are not valid ({first_problem(exc, 'settings')}); "
            "build the engine with: hpddrnet-trt build"
        ) from exc
    settings = replace(settings, progress=progress, compute_capabilities=_targets(path, record))
    assert manifest.precision is not None  # _source has compared it
    built = build_engine(
        source, path, precision=manifest.precision, runtime=record.runtime,
        shapes=",".join(str(Profile.from_record(entry)) for entry in record.profiles), settings=settings,
    )  # fmt: skip
    logger.warning("%s was built again from %s; its accuracy was not verified again", path, source.name)
    return built


def _source(path: Path, manifest: Manifest, record: EngineRecord) -> Path:
    """The ONNX file that the engine was built from; older descriptions do not name it."""
    stem, _, precision = path.stem.rpartition(".")
    names = [f"{path.stem}.onnx", *([f"{stem}.onnx"] if precision in PRECISIONS else [])]
    if record.source is not None:
        names = [Path(record.source).name]
    source = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if source is None:
        raise BadInputFile(
            f"{path} cannot be built again, because the ONNX file that it was built from ({' or '.join(names)}) is not "
            "beside it; copy it there, or build the engine with: hpddrnet-trt build"
        )
    found = read_manifest(source)
    same = ("network", "classes", "normalization", "output", "checkpoint_sha256")
    if manifest.precision is None or any(getattr(found, name) != getattr(manifest, name) for name in same):
        raise BadInputFile(
            f"{source} is not the model that {path} was built from (its description differs); put that one beside it"
        )
    return source


def _targets(path: Path, record: EngineRecord) -> list[str] | None:
    """The GPUs that a TensorRT-RTX engine is for, and this machine's; TensorRT builds for the one here."""
    if record.runtime == "tensorrt":
        return None
    gpu, targets = find_gpu(), [target for target in record.compute_capabilities if target != PORTABLE]
    try:
        check_gpu(path, record, gpu)
    except EngineDoesNotFit:
        targets.append(gpu.compute_capability)
    return targets or None
