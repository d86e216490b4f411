"""From a checkpoint to one self-describing ONNX file, compared with PyTorch before it is kept.

The exporter is torch's own (``dynamo=True``), at opset 20 (23 for the Attention operator), followed
by onnxsim. Names in the file follow the network's modules (``backbone.stem.0.conv/Conv``).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.core.files import existing_file, sha256_of
from hpddrnet_trt.core.magnification import plausible
from hpddrnet_trt.core.manifest import SIZE_MULTIPLE, AxisRange, DataRecord, InputContract, Manifest, OutputContract
from hpddrnet_trt.core.quiet import quiet as held_back
from hpddrnet_trt.graph.domain import with_domain
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.nodes import consumers, initializers, producers, replace_nodes

if TYPE_CHECKING:
    import onnx

    from hpddrnet_trt.models.network import HPDDRNet

OPSET = 20
ATTENTION_OPSET = 23  # the first with the Attention operator
# The attention's matrix product and sum become one Gemm only between two reshapes: nothing is gained,
# and dynamic sizes would need more shape arithmetic.
_SKIPPED_OPTIMIZERS = ["fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched"]
_SMALLEST_HALF = 1024  # values of a constant; below, FP16 wins nothing

ExportedAttention = Literal["matmul", "attention-op", "function"]


@dataclass(frozen=True)
class ExportOptions:
    """What the exported graph looks like; ``None`` for a size means dynamic.

    ``attention`` is ``matmul`` (every runtime), ``attention-op`` (opset 23 and later, for runtimes with a fused
    kernel) or ``function`` (``hpddrnet::PositionAttention``, whose body is ``matmul``; for plugins of that name).
    ``pixel_size_m``: metres, of the pictures that the model was trained on, where its description does not say it.
    Raises :class:`UsageError` for sizes the network cannot take or an opset without the operators.
    """

    batch: int | None = None
    height: int | None = None
    width: int | None = None
    attention: ExportedAttention = "matmul"
    output: Literal["labels", "logits"] = "labels"
    confidence: bool = False
    grey_input: bool = True
    opset: int | None = None
    pixel_size_m: float | None = None

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"batch must be at least 1, got {self.batch}")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (size < SIZE_MULTIPLE or size % SIZE_MULTIPLE):
                raise UsageError(f"{name} must be a positive multiple of {SIZE_MULTIPLE}, got {size}")
        if self.pixel_size_m is not None and not plausible(self.pixel_size_m):
            raise UsageError(f"no microscope has pixels of {self.pixel_size_m:g} m; give that of the training pictures")
        lowest = ATTENTION_OPSET if self.attention == "attention-op" else OPSET
        if self.opset is not None and self.opset < lowest:
            raise UsageError(f"opset must be at least {lowest} for attention={self.attention!r}, got {self.opset}")

    @property
    def chosen_opset(self) -> int:
        return self.opset or (ATTENTION_OPSET if self.attention == "attention-op" else OPSET)

    @property
    def input_contract(self) -> InputContract:
        def axis(size: int | None, least: int) -> AxisRange:
            return AxisRange(minimum=least) if size is None else AxisRange(minimum=size, maximum=size)

        return InputContract(
            dtype="uint8" if self.grey_input else "float32",
            channels=1 if self.grey_input else 3,
            batch=axis(self.batch, 1),
            height=axis(self.height, SIZE_MULTIPLE),
            width=axis(self.width, SIZE_MULTIPLE),
        )

    @property
    def output_contract(self) -> OutputContract:
        return OutputContract(kind=self.output, confidence=self.confidence)

    @property
    def output_names(self) -> list[str]:
        if self.output == "logits":
            return ["logits"]
        return ["labels", "confidence"] if self.confidence else ["labels"]


DEFAULTS = ExportOptions()


def export_onnx(
    checkpoint: str | Path,
    target: str | Path,
    options: ExportOptions = DEFAULTS,
    *,
    verify: bool = True,
    images: Sequence[Path] = (),
) -> Manifest:
    """Export a checkpoint of this package to ``target`` and return the file's description.

    With ``verify`` the file is run on ONNX Runtime and compared with the unmodified PyTorch network, on
    ``images`` (micrographs) or on simulated ones; the figures are logged and stored in the description.
    Raises :class:`UserError` when they differ, and then leaves no file.
    """
    checkpoint = existing_file(checkpoint, "checkpoint")
    require("torch", "export", "export a checkpoint")
    from hpddrnet_trt.models.checkpoints import load_checkpoint

    network, manifest = load_checkpoint(checkpoint)
    manifest = manifest.replace(checkpoint_sha256=sha256_of(checkpoint))
    if options.pixel_size_m is not None:
        sizes = {"pixel_size_m": (options.pixel_size_m,) * 2, "common_pixel_size_m": None}
        manifest = manifest.replace(data=(manifest.data or DataRecord(name="unknown")).model_copy(update=sizes))
    return export_network(network, manifest, target, options, verify=verify, images=images)


def export_network(
    network: HPDDRNet,
    manifest: Manifest,
    target: str | Path,
    options: ExportOptions,
    *,
    verify: bool = True,
    images: Sequence[Path] = (),
) -> Manifest:
    """:func:`export_onnx` for a network in memory (evaluation mode)."""
    from hpddrnet_trt.export.verify import compare_with_pytorch

    model = simplified(trace(network, manifest, options))
    shorten_sizes(model)
    guarded = manifest.domain is not None
    manifest = manifest.replace(
        input=options.input_contract,
        output=options.output_contract.model_copy(update={"domain": guarded}),
        attention=options.attention if network.config.pam != "none" else None,
        precision="fp32",
        versions={**manifest.versions, **_versions()},
    )
    if verify:
        evidence = compare_with_pytorch(model, network, manifest, images)
        manifest = manifest.replace(validation=[*manifest.validation, evidence])
    save_model(with_domain(model) if guarded else model, target, manifest)
    return manifest


class ShippedFiles(NamedTuple):
    """What :func:`ship` wrote."""

    checkpoint: Path
    onnx: Path


def ship(
    checkpoint: str | Path, folder: str | Path, *, name: str | None = None, images: Sequence[Path] = ()
) -> ShippedFiles:
    """Write ``<name>.safetensors`` and ``<name>.onnx`` with FP16 kernels and matrices to ``folder``.

    Both compute in FP32: the ONNX file casts its constants once, when a runtime loads it. It is
    exported from the rounded checkpoint and compared with it on ``images``, or on simulated ones.
    ``name`` (default: the checkpoint's) goes into both descriptions. Raises as
    :func:`export_onnx` does.
    """
    checkpoint, folder = existing_file(checkpoint, "checkpoint"), Path(folder)
    require("torch", "export", "ship a checkpoint")
    from hpddrnet_trt.models.checkpoints import load_checkpoint, save_checkpoint

    network, manifest = load_checkpoint(checkpoint)
    manifest = manifest.replace(name=name or manifest.name)
    small = save_checkpoint(folder / f"{manifest.name}.safetensors", network, manifest, half=True)
    network, manifest = load_checkpoint(small)
    target = folder / f"{manifest.name}.onnx"
    export_network(network, manifest, target, ExportOptions(), images=images)
    model, description = load_model(target)
    store_in_half(model)
    save_model(model, target, description)
    return ShippedFiles(small, target)


def trace(network: HPDDRNet, manifest: Manifest, options: ExportOptions) -> onnx.ModelProto:
    """The rewritten network as an ONNX model, before simplification."""
    torch = require("torch", "export", "export a checkpoint")
    require("onnx", "export", "export to ONNX")
    require("onnxscript", "export", "export to ONNX")
    from hpddrnet_trt.export.reformulate import DeployNetwork

    deployed = DeployNetwork(
        network,
        manifest,
        attention="attention-op" if options.attention == "attention-op" else "matmul",
        grey_input=options.grey_input,
        output=options.output,
        confidence=options.confidence,
    )
    # A dynamic size must not be 1 (torch would fix it) and, to keep its name, not equal another's.
    shape = (options.batch or 2, 1 if options.grey_input else 3, options.height or 128, options.width or 192)
    example = torch.zeros(shape, dtype=torch.uint8 if options.grey_input else torch.float32)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                deployed,
                (example,),
                dynamo=True,
                opset_version=options.chosen_opset,
                dynamic_shapes=_dynamic_shapes(options),
                input_names=["image"],
                output_names=options.output_names,
                optimize=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as exc:
        raise UserError(f"PyTorch {torch.__version__} could not export this network to ONNX: {exc}") from exc
    model: onnx.ModelProto = program.model_proto
    name_after_modules(model)
    _name_axes(model, options)
    return model


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` after onnxsim, with the same inputs and outputs."""
    onnxsim = require("onnxsim", "export", "simplify the exported graph")
    result, valid = onnxsim.simplify(model, skipped_optimizers=_SKIPPED_OPTIMIZERS, certify=False)
    same = [entry.name for entry in result.graph.output] == [entry.name for entry in model.graph.output]
    if not valid or not same:
        raise UserError("onnxsim broke the exported graph; report this with the versions that `pip list` prints")
    del result.graph.value_info[:]
    return result


def store_in_half(model: onnx.ModelProto) -> None:
    """Store large FP32 constants of ``model`` in FP16, each behind a cast back; changes ``model``.

    Vectors stay as they are (folded shifts, a thousandth of the bytes), and so does what FP16 cannot hold.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    casts = []
    for entry in graph.initializer:
        values = numpy_helper.to_array(entry)
        if values.dtype != np.float32 or values.ndim < 2 or values.size < _SMALLEST_HALF:
            continue
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        stored = f"{entry.name}.half"
        casts.append(helper.make_node("Cast", [stored], [entry.name], f"{entry.name}/Cast", to=TensorProto.FLOAT))
        entry.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def shorten_sizes(model: onnx.ModelProto) -> None:
    """Shorter shape arithmetic for dynamic sizes, in place; nodes that do not follow the two patterns stay.

    The exporter computes every size of the graph from the input's height and width. Here each size is
    read from the tensor that has it already: a resize whose result is added to another tensor takes that
    tensor's size, and position attention, which flattens a feature map, takes the size back from that map.
    """
    from onnx import helper, numpy_helper, shape_inference

    graph = model.graph
    ranks = _ranks(shape_inference.infer_shapes(model))
    constant = set(initializers(graph))
    made, readers = producers(graph), consumers(graph)
    added: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Resize" and len(node.input) == 4 and node.input[3] not in constant:
            _size_of_summand(node, readers, added)
        elif node.op_type == "Reshape" and node.input[1] not in constant:
            if ranks.get(node.output[0]) == 3:
                graph.initializer.append(
                    numpy_helper.from_array(np.array([0, 0, -1], dtype=np.int64), f"{node.name}.shape")
                )
                node.input[1] = f"{node.name}.shape"
                del node.attribute[:]  # allowzero, which would take the zeros for sizes
            elif flatten := _flatten_before(node, made, ranks):
                node.input[1] = f"{node.name}.shape"
                added.append(helper.make_node("Shape", [flatten.input[0]], [node.input[1]], f"{node.name}/Shape"))
    replace_nodes(graph, [*graph.node, *added])


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    entries = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {entry.name: len(entry.type.tensor_type.shape.dim) for entry in entries}


def _size_of_summand(
    resize: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], added: list[onnx.NodeProto]
) -> None:
    from onnx import helper

    sums = [node for node in readers[resize.output[0]] if node.op_type == "Add"]
    if len(sums) != 1:
        return
    other = next(name for name in sums[0].input if name != resize.output[0])
    parts = [f"{resize.name}.{part}" for part in ("outer", "inner", "sizes")]
    added += [
        helper.make_node("Shape", [resize.input[0]], parts[:1], f"{resize.name}/Shape", start=0, end=2),
        helper.make_node("Shape", [other], parts[1:2], f"{resize.name}/Shape_2", start=2, end=4),
        helper.make_node("Concat", parts[:2], parts[2:], f"{resize.name}/Concat", axis=0),
    ]
    resize.input[3] = parts[2]


def _flatten_before(
    node: onnx.NodeProto, made: dict[str, onnx.NodeProto], ranks: dict[str, int]
) -> onnx.NodeProto | None:
    """The nearest reshape to rank 3 among the ancestors of ``node``."""
    frontier = [node.input[0]]
    while frontier:
        parent = made.get(frontier.pop(0))
        if parent is None:
            continue
        if parent.op_type == "Reshape" and ranks.get(parent.output[0]) == 3:
            return parent
        frontier.extend(parent.input)
    return None


def _dynamic_shapes(options: ExportOptions) -> Any:
    from torch.export import Dim

    axes: dict[int, Any] = {}
    if options.batch is None:
        axes[0] = Dim("batch", min=1)
    if options.height is None:
        axes[2] = SIZE_MULTIPLE * Dim("height_8", min=1)
    if options.width is None:
        axes[3] = SIZE_MULTIPLE * Dim("width_8", min=1)
    return (axes,) if axes else None


def _name_axes(model: onnx.ModelProto, options: ExportOptions) -> None:
    """Dynamic axes are called batch, height and width."""
    for entry in [*model.graph.input, *model.graph.output]:
        dims = entry.type.tensor_type.shape.dim
        for position, name in ((0, "batch"), (len(dims) - 2, "height"), (len(dims) - 1, "width")):
            if getattr(options, name) is None:
                dims[position].dim_param = name


def name_after_modules(model: onnx.ModelProto) -> None:
    """Name nodes after the module they come from; drop the exporter's notes (they hold local paths).

    A node of which the exporter lost the module (it makes a split of several steps) belongs to its input's.
    """
    seen: Counter[str] = Counter()
    made: dict[str, str] = {}  # tensor: module
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "['']"))
        before = made.get(node.input[0], "") if node.input else ""
        module = next((scope for scope in reversed(scopes[:-1]) if scope), before)
        made.update(dict.fromkeys(node.output, module))
        name = f"{module}/{node.op_type}" if module else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        del node.metadata_props[:]
        node.doc_string = ""
    for entry in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        del entry.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")}


def quiet() -> AbstractContextManager[None]:
    """Silence what the exporter says and is known to be harmless, such as every single rewrite."""
    registration = "torch.onnx._internal.exporter._registration"  # says that torchvision is missing
    return held_back(registration, "onnx_ir", "onnxscript", hints=[r".*isinstance\(treespec, LeafSpec\).*"])
