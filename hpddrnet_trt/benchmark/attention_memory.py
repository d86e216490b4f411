"""Peak memory of a network by image size, for every way its position attention can be computed.

CPU engines are measured, each size in a process of its own. TensorRT engines are built for the one
size and not run: their memory for activations is what the builder itself logs, which needs no GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpddrnet_trt.benchmark.probe import probe
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.engines import engine_status
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.export.tensorrt import build_engine
from hpddrnet_trt.graph.attention import in_type
from hpddrnet_trt.graph.model import load_model, save_model

MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """Memory at one size: ``mib`` above a bare Python process (measured), or of activations (the builder's log)."""

    form: str
    side: int  # pixels; the image is square
    mib: float | None
    source: Literal["measured", "builder's log"]
    reason: str | None = None  # why there is no figure


def attention_memory(
    model: Path,
    sides: Sequence[int],
    *,
    checkpoint: Path | None = None,
    typed: Sequence[Path] = (),
    build: bool = True,
    on_result: Callable[[Usage], object] = lambda usage: None,
) -> list[Usage]:
    """Memory of every form at each of ``sides`` (pixels, multiples of 8), smallest first.

    ``model``: the FP32 ONNX file with dynamic sizes; ``checkpoint``: also the unmodified network in
    PyTorch; ``typed``: files of lower precision made from ``model``, for TensorRT only. What does not
    run has its reason, and larger sizes of the same form are not tried. ``on_result`` is called with each
    figure. Raises :class:`UsageError` for a model of one fixed size, :class:`BadInputFile` for a bad file.
    """
    _, manifest = load_model(model)
    contract = input_contract(manifest)
    if contract.height.fixed is not None or contract.width.fixed is not None:
        raise UsageError(f"{model} has a fixed size; export it again without --height and --width")
    found: list[Usage] = []

    def add(usage: Usage) -> bool:
        found.append(usage)
        on_result(usage)
        return usage.mib is not None

    for form, path, engine, options in _cpu_forms(model, checkpoint):
        for side in sorted(sides):
            if not add(_measured(form, path, engine, options, side)):
                break
    if build:
        for form, path in _tensorrt_forms(model, typed):
            for side in sorted(sides):
                if not add(_built(form, path, side)):
                    break
    return found


def _cpu_forms(model: Path, checkpoint: Path | None) -> Iterator[tuple[str, Path, str, Mapping[str, Any]]]:
    if checkpoint is not None:
        yield "PyTorch FP32, as trained", checkpoint, "torch", {"output": "labels", "device": "cpu"}
    yield "ONNX Runtime FP32, all at once", model, "onnxruntime", {"defaults": True}
    yield "ONNX Runtime FP32, in blocks when large", model, "onnxruntime", {}
    if engine_status("openvino").usable:
        yield "OpenVINO, its defaults, three operators", model, "openvino", {"precision": "default"}
        yield "OpenVINO FP32, fused", model, "openvino", {"precision": "f32"}


def _measured(form: str, path: Path, engine: str, options: Mapping[str, Any], side: int) -> Usage:
    frame = np.random.default_rng(0).integers(0, 256, (1, side, side)).astype(np.uint8)
    try:
        (answer,) = probe(path, engine, options, [frame])
    except UserError as exc:
        answer = str(exc)
    if isinstance(answer, str):
        return Usage(form, side, None, "measured", answer)
    return Usage(form, side, answer.host_peak_mib, "measured")


def _tensorrt_forms(model: Path, typed: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Files to build engines of, temporary ones among them."""
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        yield "TensorRT FP32", model
        for path in typed:
            graph, manifest = load_model(path)
            name = str(manifest.precision).upper()
            older = save_model(in_type(graph, "fp32"), Path(folder) / f"{path.stem}.fp32-scores.onnx", manifest)
            yield f"TensorRT {name}, attention scores in FP32", older
            yield f"TensorRT {name}, attention in BF16, fused", path


def _built(form: str, path: Path, side: int) -> Usage:
    precision = read_manifest(path).precision
    assert precision is not None  # an exported file has one
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        target = Path(folder) / "it.engine"
        try:
            made = build_engine(path, target, precision=precision, shapes=f"1x1x{side}x{side}", progress=False)
        except UserError as exc:
            return Usage(form, side, None, "builder's log", str(exc))
    activations = None if made.engine is None else made.engine.activation_bytes
    if activations is None:
        return Usage(form, side, None, "builder's log", "this library does not log the figure")
    return Usage(form, side, activations / MIB, "builder's log")


def table(usages: Sequence[Usage]) -> str:
    """Markdown: one row per form, MiB by side; a dash with its reason below where there is none."""
    sides = sorted({usage.side for usage in usages})
    lines = [
        "| peak memory, MiB | " + " | ".join(f"{side}x{side}" for side in sides) + " | |",
        "|---|" + "---:|" * len(sides) + "---|",
    ]
    for form in dict.fromkeys(usage.form for usage in usages):
        own = {usage.side: usage for usage in usages if usage.form == form}
        cells = [f"{own[side].mib:,.0f}" if side in own and own[side].mib is not None else "–" for side in sides]
        lines.append(f"| {form} | {' | '.join(cells)} | {next(iter(own.values())).source} |")
    reasons = [f"- {usage.form} at {usage.side}x{usage.side}: {usage.reason}" for usage in usages if usage.reason]
    return "\n".join([*lines, *(["", *reasons] if reasons else [])])
