"""Everything that can be compared, made from one checkpoint: files in every precision, engines in every form."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import existing_file, sha256_of, write_bytes
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.core.precisions import Half, LowPrecision
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.export.calibrate import CalibrationSettings, calibrate
from hpddrnet_trt.export.convert import convert_precision
from hpddrnet_trt.export.onnx import export_onnx
from hpddrnet_trt.export.tensorrt import build_engine
from hpddrnet_trt.graph.attention import in_type
from hpddrnet_trt.graph.model import load_model, save_model

logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """Model files in the order of their making, and what could not be made, with the reason, by file name."""

    files: list[Path] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    def make(self, path: Path, work: Callable[[], object]) -> None:
        """Do ``work``, which writes ``path``, unless the file is there; one failure does not stop the others."""
        if not path.exists():
            try:
                work()
            except UserError as exc:
                logger.warning("%s: %s", path.name, exc)
                self.problems[path.name] = str(exc)
                return
        self.files.append(path)


def prepare(
    checkpoint: str | Path,
    data: str | Path,
    folder: str | Path,
    *,
    shapes: str,
    runtimes: Sequence[str] = ("auto",),
    split: str = "train",
) -> Prepared:
    """Export ``checkpoint``, type and calibrate it on ``split`` of ``data``, and build every engine into ``folder``.

    Files: FP32, FP16 (also with attention scores in FP32), BF16, INT8 and FP8, and INT8 in ONNX Runtime's own
    form; an engine of each but the last for the optimization profiles ``shapes`` and each of ``runtimes``
    (see :func:`~hpddrnet_trt.export.tensorrt.build_engine`). What exists is not made again, so an interrupted
    preparation goes on. Raises :class:`BadInputFile` for a missing checkpoint or dataset, :class:`UsageError`
    for a folder with the files of another checkpoint.
    """
    folder, result = Path(folder), Prepared()
    source, model = folder / "model.safetensors", folder / "model.onnx"
    images = find_images(data, split)
    existing_file(checkpoint, "checkpoint")
    if source.exists() and sha256_of(source) != sha256_of(checkpoint):
        raise UsageError(f"{folder} holds files of another checkpoint; choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    result.make(source, lambda: write_bytes(source, Path(checkpoint).read_bytes()))
    result.make(model, lambda: export_onnx(source, model))
    if model not in result.files:
        return result
    for kind in get_args(Half):
        typed = folder / f"model.{kind}.onnx"
        result.make(typed, partial(convert_precision, model, typed, kind, images=images))
    half, older = folder / "model.fp16.onnx", folder / "model.fp16-fp32-scores.onnx"
    if half in result.files:
        result.make(older, lambda: _with_fp32_scores(half, older))
    for low in get_args(LowPrecision):
        typed = folder / f"model.{low}.onnx"
        result.make(typed, partial(calibrate, model, typed, images, CalibrationSettings(precision=low)))
    graphs = [path for path in result.files if path.suffix == ".onnx"]
    own = folder / "model.int8-cpu.onnx"
    result.make(own, lambda: calibrate(model, own, images, CalibrationSettings(runtime="onnxruntime")))
    for runtime in runtimes:
        for graph in graphs:
            suffix = "" if runtime == "auto" else f".{runtime}"
            target = folder / f"{graph.stem}{suffix}.engine"
            precision = read_manifest(graph).precision
            assert precision is not None  # every file above has one
            result.make(
                target, partial(build_engine, graph, target, precision=precision, runtime=runtime, shapes=shapes)
            )
    return result


def _with_fp32_scores(source: Path, target: Path) -> None:
    model, manifest = load_model(source)
    save_model(in_type(model, "fp32"), target, manifest)
