"""ONNX files of this package: reading and writing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.core.files import atomic_path
from hpddrnet_trt.core.manifest import METADATA_KEY, Manifest, read_manifest
from hpddrnet_trt.graph.attention import as_function, expanded
from hpddrnet_trt.graph.check import Depth, load_checked, trust

if TYPE_CHECKING:
    import onnx


def load_model(path: str | Path, depth: Depth = "structure") -> tuple[onnx.ModelProto, Manifest]:
    """Read an ONNX file of this package and its description; functions are written out as their operators.

    A file that enters here is checked to ``depth`` (:mod:`hpddrnet_trt.graph.check`). Raises
    :class:`~hpddrnet_trt.core.errors.BadInputFile` for a damaged or foreign one.
    """
    manifest = read_manifest(path)
    model = load_checked(Path(path), depth)
    return expanded(model) if model.functions else model, manifest


def save_model(model: onnx.ModelProto, target: str | Path, manifest: Manifest) -> Path:
    """Check ``model``, put ``manifest`` into its ``metadata_props`` and write one self-contained file.

    Position attention becomes a function where the manifest says so. The file appears complete or not at
    all. ``model`` itself is changed (its metadata).
    """
    onnx = require("onnx", "export", "write ONNX files")
    if manifest.attention == "function" and not model.functions:
        model = as_function(model)
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=manifest.to_json())
    model.producer_name = "hpddrnet-trt"
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise UserError(f"the graph meant for {target} is not valid ONNX ({exc}); please report this") from exc
    with atomic_path(target) as temporary:
        onnx.save(model, str(temporary))
    trust(Path(target))
    return Path(target)


def check_target(source: str | Path, target: str | Path) -> None:
    """Raise :class:`UsageError` unless ``target`` may hold what a pass makes of the FP32 file ``source``."""
    source, target = Path(source), Path(target)
    if target.suffix.lower() != ".onnx":
        raise UsageError(f"the ONNX file to write, {target}, must end with .onnx; write {target.with_suffix('.onnx')}")
    if source.resolve() == target.resolve():
        raise UsageError(f"{target} would overwrite the FP32 model it is made from; choose another output path")
