"""The least time that a machine with given ceilings can need for a graph.

A roofline (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Commun. ACM 52(4), 2009), kernel by kernel: each takes as long as its multiply-accumulates
at the ceiling of their precision or its bytes at that of the memory, whichever is longer, and kernels
run one after the other. Work is counted by :func:`hpddrnet_trt.graph.work.typed_work`, which
fuses what every runtime fuses and stores no attention scores. What such a floor leaves out: launches, and
everything that is neither a product nor a move. What it does not know: activations that stay in a
cache between kernels move faster than memory copies, so an engine on a machine with a large cache may come
below ``floor_ms``; below ``compute_ms`` it cannot come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hpddrnet_trt.benchmark.result import Ceilings, Roof
from hpddrnet_trt.core.errors import BadInputFile, require
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import InputContract, Manifest, read_manifest
from hpddrnet_trt.graph.work import TypedWork, typed_work

_CHECKPOINT = ".safetensors"
# What makes two files of one checkpoint the same graph.
_SAME = ("checkpoint_sha256", "network", "output", "attention", "precision", "quantized_for", "calibration", "mixed")


def roofs(
    path: str | Path,
    manifest: Manifest,
    sizes: Iterable[tuple[int, int]],
    batches: Sequence[int],
    ceilings: Ceilings,
    graphs: Iterable[str | Path] = (),
    autocast: str | None = None,
) -> list[Roof]:
    """A :class:`Roof` for every size (height, width) and batch that the file takes, sizes first.

    ``path``: an ``.onnx`` file; or an ``.engine`` or ``.safetensors`` file, whose work is that of the
    ONNX file which :func:`graph_of` finds among ``graphs`` (for a checkpoint its FP32 export). Empty
    where there is none. ``autocast``: ``fp16`` or ``bf16`` where the entry computes floating-point
    products in that precision, and keeps FP32 tensors in it.
    """
    source = graph_of(path, manifest, graphs)
    if source is None:
        return []
    onnx = require("onnx", "export", "count a network's operations")
    model = onnx.load(str(source))
    described = read_manifest(source)
    contract = described.input or InputContract()
    found = []
    for height, width in sizes:
        for batch in batches:
            if _takes(contract, batch, height, width):
                work = typed_work(model, (batch, contract.channels, height, width))
                if autocast is not None:
                    halve = described.precision == "fp32"
                    work = {name: _lowered(kernel, autocast, halve) for name, kernel in work.items()}
                found.append(roof(work, ceilings, batch, height, width))
    return found


def roof(work: Mapping[str, TypedWork], ceilings: Ceilings, batch: int, height: int, width: int) -> Roof:
    """The floor of counted kernels; ``work``: of one batch of that size.

    A precision whose ceiling was not measured, or is below FP32's, counts at the rate of FP32: whatever
    has such tensors can be computed there, as CPU runtimes do with FP16. The roof's note names them.
    """
    compute, floor = 0.0, 0.0
    assumed: set[str] = set()
    for kernel in work.values():
        seconds = 0.0
        if kernel.precision is not None:
            rate, own = _rate(ceilings, kernel.precision)
            assumed |= set() if own else {kernel.precision}
            seconds = kernel.macs / (1e9 * rate)
        compute += seconds
        floor += max(seconds, kernel.bytes / (1e9 * ceilings.gigabytes_per_s))
    return Roof(
        height=height,
        width=width,
        batch=batch,
        gmac=sum(kernel.macs for kernel in work.values()) / 1e9,
        megabytes=sum(kernel.bytes for kernel in work.values()) / 1e6,
        floor_ms=1e3 * floor,
        compute_ms=1e3 * compute,
        note=f"{', '.join(sorted(assumed)).upper()} at the rate of FP32" if assumed else None,
    )


def graph_of(path: str | Path, manifest: Manifest, graphs: Iterable[str | Path] = ()) -> Path | None:
    """The ONNX file whose work a model file does, None where it is not to be found.

    An ``.onnx`` file is its own. For an ``.engine``, which holds no graph that could be counted, it is the
    file among ``graphs`` and those beside the engine whose description says that it was built from
    it; for a ``.safetensors`` checkpoint the FP32 export of it.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return path
    if suffix not in (".engine", _CHECKPOINT):
        return None
    wanted = manifest.model_dump(include=set(_SAME))
    checkpoint = sha256_of(path) if suffix == _CHECKPOINT else None
    for candidate in [*map(Path, graphs), *sorted(path.parent.glob("*.onnx"))]:
        try:
            described = read_manifest(candidate)
        except BadInputFile:
            continue  # somebody else's
        if checkpoint is not None:
            found = described.checkpoint_sha256 == checkpoint and described.precision == "fp32"
        else:
            found = described.model_dump(include=set(_SAME)) == wanted
        if found:
            return candidate
    return None


def _lowered(kernel: TypedWork, precision: str, halve: bool) -> TypedWork:
    """A kernel whose floating-point products are computed in ``precision``; ``halve``: its tensors are FP32."""
    kept = precision if kernel.precision in ("fp32", "fp16", "bf16") else kernel.precision
    if not halve:
        return kernel._replace(precision=kept)
    return TypedWork(kept, kernel.macs, kernel.read // 2, kernel.weights // 2, kernel.written // 2)


def _rate(ceilings: Ceilings, precision: str) -> tuple[float, bool]:
    """10^9 multiply-accumulates per second, and whether that is the precision's own ceiling."""
    own, plain = ceilings.gmacs_per_s.get(precision, 0.0), ceilings.gmacs_per_s["fp32"]
    return (own, True) if own >= plain else (plain, False)


def _takes(contract: InputContract, batch: int, height: int, width: int) -> bool:
    axes = zip((contract.batch, contract.height, contract.width), (batch, height, width), strict=True)
    return all(axis.admits(size) for axis, size in axes)
