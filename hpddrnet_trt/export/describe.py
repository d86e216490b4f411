"""What a model file says about itself, for people: contract, precision by layer, validation records."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpddrnet_trt.core.magnification import in_words
from hpddrnet_trt.core.manifest import (
    DomainRecord,
    EngineRecord,
    InputContract,
    Manifest,
    OutputContract,
    ValidationRecord,
)
from hpddrnet_trt.core.text import megabytes
from hpddrnet_trt.engines.profiles import default_profiles, is_static
from hpddrnet_trt.engines.tensorrt_library import INPUT
from hpddrnet_trt.export.layer_precision import summary
from hpddrnet_trt.graph.lint import report_lines

_INDENT = 13


def describe(manifest: Manifest, path: str | Path, *, layers: bool = False) -> str:
    """Text for a terminal; ``layers``: also every convolution and matrix product with its precision."""
    lines = [f"{path}: {_kind(manifest)}"]
    for name, rows in _sections(manifest, path, layers=layers):
        for index, row in enumerate(rows):
            lines.append(f"{name if index == 0 else '':<{_INDENT}}{row}")
    return "\n".join(lines)


def _kind(manifest: Manifest) -> str:
    if manifest.engine is not None:
        record = manifest.engine
        kinds = {
            "version-compatible": record.version_compatible, "refittable": record.refittable,
            "without its weights": record.stripped, f"for {record.platform}": record.platform is not None,
        }  # fmt: skip
        return (
            f"engine of {record.runtime} {record.version} for {', '.join(record.compute_capabilities)}"
            f"{f' ({record.gpu})' if record.gpu else ''}, {megabytes(record.bytes)}, built in "
            f"{record.build_seconds:.1f} s{''.join(f', {kind}' for kind, holds in kinds.items() if holds)}"
        )
    if manifest.input is None:
        return "checkpoint"
    made_for = {"tensorrt": ", quantised for TensorRT", "onnxruntime": ", quantised for ONNX Runtime's CPU kernels"}
    return f"ONNX file{made_for.get(manifest.quantized_for or '', '')}"


def _sections(manifest: Manifest, path: str | Path, *, layers: bool) -> Iterator[tuple[str, list[str]]]:
    yield "network", [f"{manifest.network.name} ({manifest.name!r})"]
    yield "classes", [", ".join(manifest.class_names)]
    if manifest.data is not None:
        images = f", {manifest.data.train_images} images" if manifest.data.train_images else ""
        yield "trained on", [f"{manifest.data.name}{images} (licence: {manifest.data.license or 'not stated'})"]
        if (sizes := manifest.read_at_m) is not None:
            brought = "" if manifest.data.common_pixel_size_m is None else ", to which all pictures were brought"
            yield "pixel size", [f"{in_words(sizes)}{brought}"]
    if manifest.domain is not None:
        yield "domain", _domain(manifest, manifest.domain)
    if manifest.checkpoint_sha256:
        yield "checkpoint", [f"SHA-256 {manifest.checkpoint_sha256}"]
    if manifest.metrics:
        yield "training", [", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())]
    if manifest.input is not None and manifest.output is not None:
        yield "input", [_input(manifest.input)]
        yield "output", [_output(manifest.output)]
    if manifest.precision is not None:
        yield "precision", _precision(manifest, layers=layers)
    if manifest.calibration is not None:
        record = manifest.calibration
        yield "calibration", [f"{record.method}, {record.images} images ({record.source}), {record.tool}"]
    if manifest.mixed is not None:
        mixed = manifest.mixed
        yield "mixed", [
            f"{len(mixed.floating)} of {mixed.layers} layers in FP16 for: {mixed.budget} (on {mixed.searched_on})",
            *mixed.floating,
        ]
    if manifest.engine is not None:
        yield "profiles", [_profile(entry) for entry in manifest.engine.profiles]
        yield "as trtexec", _timing_commands(manifest.engine, path)
        if (activations := manifest.engine.activation_bytes) is not None:
            yield "memory", [f"{activations / 2**20:,.0f} MiB for activations, by the builder's log"]
    elif manifest.input is not None and manifest.quantized_for != "onnxruntime":
        yield "as trtexec", [_build_command(manifest.input, path)]
    for index, entry in enumerate(manifest.validation):
        yield "" if index else "validation", _validation(entry)
    if manifest.remarks:
        yield "remarks", manifest.remarks
    if manifest.versions:
        yield "versions", [", ".join(f"{name} {number}" for name, number in manifest.versions.items())]


def _domain(manifest: Manifest, record: DomainRecord) -> list[str]:
    source = f" of {record.source}" if record.source else ""
    rows = [
        f"{len(record.mean)} features, {len(record.components)} components, from {record.crops} crops of "
        f"{record.pictures} pictures{source}; unusual from distance {record.unusual:.3g}, foreign from "
        f"{record.foreign:.3g}"
    ]
    if manifest.output is not None and not manifest.output.domain:
        rows.append("the file does not give these features: whether a picture is foreign is not known")
    return rows


def _input(contract: InputContract) -> str:
    what = "grey levels 0..255" if contract.dtype == "uint8" else "normalised"
    return (
        f"{contract.dtype} [{contract.batch}, {contract.channels}, {contract.height}, {contract.width}], {what}; "
        f"height and width multiples of {contract.multiple}"
    )


def _output(contract: OutputContract) -> str:
    if contract.kind == "logits":
        return "float32 scores [batch, classes, height, width]"
    return f"uint8 labels [batch, height, width]{' and float32 confidence' if contract.confidence else ''}"


def _precision(manifest: Manifest, *, layers: bool) -> list[str]:
    rows = [str(manifest.precision).upper()]
    if manifest.engine is not None:
        try:
            rows += _layer_precision(manifest.engine, layers=layers)
        except (KeyError, TypeError, AttributeError, ValueError):  # another version's report, or a damaged one
            rows.append("its description has no readable report of layers; build the engine again for one")
    if manifest.qdq_report is not None:
        rows += report_lines(manifest.qdq_report)
    return rows


def _layer_precision(record: EngineRecord, *, layers: bool) -> list[str]:
    report = record.layer_precision
    rows = summary(report).split("; ")
    if "remark" in report:
        rows.append(f"remark: {report['remark']}")
    if "layers" in report.get("reformats", {}):
        counts = report["reformats"]
        rows.append(f"reformats in the engine: {counts['reformats']} of {counts['layers']} layers")
    if layers:
        rows += [_layer(entry) for entry in report.get("parsed_network", report).get("layers", [])]
        graph = report.get("graph", [])
        rows.append(f"layers of the {report['source']}: {len(graph)}, conversions marked *")
        rows += [
            f"{'*' if entry['conversion'] else ' '} {entry['precision']:<5} {entry['type']:<16} {entry['name']}"
            for entry in graph
        ]
    return rows


def _build_command(contract: InputContract, path: str | Path) -> str:
    """The command of NVIDIA's own tool that builds an engine of an ONNX file as ``build`` does by default."""
    (profile,) = default_profiles(contract)
    boxes = {"min": profile.minimum, "opt": profile.optimum, "max": profile.maximum}
    shapes = [f"--{name}Shapes={INPUT}:{'x'.join(map(str, box))}" for name, box in boxes.items()]
    options = ["--stronglyTyped", "--noTF32", "--profilingVerbosity=detailed", *([] if is_static(contract) else shapes)]
    files = [f"--onnx={shlex.quote(str(path))}", f"--saveEngine={shlex.quote(str(Path(path).with_suffix('.engine')))}"]
    return " ".join(["trtexec", *files, *options])


def _timing_commands(record: EngineRecord, path: str | Path) -> list[str]:
    """Commands of NVIDIA's own tool that time the engine as it is, one for each profile at the shape it is tuned for.

    Options are those of trtexec 10.5 and of ``tensorrt_rtx`` (its name in TensorRT-RTX); neither was run here.
    """
    tool = "tensorrt_rtx" if record.runtime == "tensorrt-rtx" else "trtexec"
    compatible = " --versionCompatible" if record.version_compatible else ""
    return [
        f"{tool} --loadEngine={shlex.quote(str(path))} --shapes={INPUT}:{'x'.join(map(str, profile['opt']))}"
        f"{f' --useProfile={index}' if index else ''}{compatible} --useCudaGraph --noDataTransfers --useSpinWait"
        for index, profile in enumerate(record.profiles)
    ]


def _layer(entry: dict[str, Any]) -> str:
    return f"  {entry['precision']:<5} {entry['macs'] / 1e6:>9.1f} MMAC  {entry['name']}"


def _profile(entry: dict[str, list[int]]) -> str:
    return "  ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in entry.items())


def _validation(entry: ValidationRecord) -> list[str]:
    rows = [f"{entry.what}: {entry.images} images, {entry.source}; {entry.runtime}"]
    return rows + [f"  {name:<34} {value:.6g}" for name, value in entry.values.items()]
