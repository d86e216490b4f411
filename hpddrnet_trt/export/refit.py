"""Other weights for a built TensorRT engine: retrained, or those that were left out of its file.

What is known of TensorRT's refitter is from its documentation and the bindings of 11.4: it was run on a simulated
library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import EngineRecord, Manifest, read_manifest
from hpddrnet_trt.engines.cuda import current_device, find_gpu
from hpddrnet_trt.engines.engine_file import check_gpu, check_version, engine_record, verified_content
from hpddrnet_trt.engines.tensorrt_library import TensorRT, load_tensorrt
from hpddrnet_trt.export.tensorrt import (
    check_build,
    parser_reason,
    typed_file,
    weights_checksum,
    without_bf16,
    write_engine,
)

# What must be the same for the weights of one file to fit into the other's engine.
_SAME = ("network", "input_type", "output", "attention", "quantized_for")


def refit_engine(
    engine: str | Path,
    source_onnx: str | Path,
    target: str | Path,
    *,
    calibration_images: str | Path | Sequence[Path] | None = None,
    device: int = 0,
) -> Manifest:
    """Write ``target``: the engine with the weights of ``source_onnx``, a file of the same network and form.

    ``engine`` was built refittable, or stripped and takes back the weights that it was built with. ``source_onnx`` is
    what a build in its precision would take (:func:`~hpddrnet_trt.export.tensorrt.build_engine`), converted or
    calibrated on ``calibration_images`` likewise. Kernels stay as they were chosen. What was known of the old weights'
    accuracy is not taken over. Returns the new description. Raises what the build raises, :class:`UsageError` for an
    engine that takes no other weights or a file of another network, and :class:`UserError` where the library
    refuses; then nothing is written.
    """
    engine, source, target = Path(engine), Path(source_onnx), Path(target)
    described = read_manifest(engine)
    record = engine_record(engine, described)
    if not (record.refittable or record.stripped):
        raise UsageError(f"{engine} takes no other weights; build it with --refittable")
    assert described.precision is not None  # written by the build
    manifest = check_build(source, target, described.precision, calibration_images)
    content = verified_content(engine, record)
    api, gpu = load_tensorrt(record.runtime), find_gpu(device)
    check_version(engine, record, api)
    check_gpu(engine, record.model_copy(update={"stripped": False}), gpu)
    lacks_bf16 = without_bf16([gpu.compute_capability])
    with (
        typed_file(source, manifest, described.precision, calibration_images, lacks_bf16=lacks_bf16) as (path, ready),
        current_device(device),
    ):
        if differs := [name for name in _SAME if _form(ready, name) != _form(described, name)]:
            raise UsageError(
                f"{source} is of another form than {engine} ({', '.join(differs)}); build an engine of it instead"
            )
        if not record.refittable and weights_checksum(path) != record.weights_sha256:
            raise UsageError(
                f"{engine} takes back only the weights that it was built with, {source} has others; "
                "build it with --refittable"
            )
        plan = _refitted(api, engine, content, record, path, source)
    new = record.model_copy(
        update={"stripped": False, "sha256": hashlib.sha256(plan).hexdigest(), "bytes": plan.nbytes}
    )
    result = ready.replace(input=described.input, precision=described.precision, engine=new)
    write_engine(target, plan, result)
    return result


def _form(manifest: Manifest, name: str) -> Any:
    if name == "input_type":  # sizes are the engine's
        return manifest.input and (manifest.input.dtype, manifest.input.channels)
    return getattr(manifest, name)


def _refitted(
    api: TensorRT, engine: Path, content: bytes, record: EngineRecord, path: Path, source: Path
) -> memoryview:
    """The plan with other weights, and all of them in it."""
    trt = api.module
    api.log.clear()
    loaded = api.runtime(host_code=record.version_compatible).deserialize_cuda_engine(content)
    if loaded is None:
        raise BadInputFile(f"{api.label} cannot load {engine}: {api.log.explain('no reason given')}; build it again")
    refitter = trt.Refitter(loaded, api.log)
    parser = trt.OnnxParserRefitter(refitter, api.log)
    if not parser.refit_from_file(str(path)) or not refitter.refit_cuda_engine():
        missing = list(refitter.get_missing_weights())[:3]
        reason = f"it has no weights for {', '.join(missing)}" if missing else parser_reason(api, parser)
        raise UserError(
            f"{api.label} cannot put the weights of {source} into {engine}: {reason}; build an engine of it instead"
        )
    config = loaded.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):  # else the new file may take no other weights any more
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    plan = loaded.serialize_with_config(config)
    if plan is None:
        raise UserError(f"{api.label} cannot write the refitted engine: {api.log.explain('no reason given')}")
    return memoryview(plan)
