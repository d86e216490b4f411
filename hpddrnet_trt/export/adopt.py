"""An ONNX segmenter that is none of ours gets our contract and our description, and with them everything else.

A stranger's file takes a normalised colour image and gives scores, probabilities or labels, at full size or at a
fraction of it. The adopted file takes a grey 8-bit micrograph, normalises it in FP32 inside the graph, and gives labels
(or logits) of its size; the network between the two is untouched. Calibration, engines, the accuracy gate, the
benchmark and the runner then see one of our files. There is no PyTorch network to compare with: the reference is
the stranger's file itself in ONNX Runtime, and later the adopted FP32 file.

The new nodes are named ``input/...`` and ``output/...`` (``output.enlarge/Resize`` where scores are enlarged), those
of the stranger ``network....`` after their modules, as far as the file says them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError, one_line
from hpddrnet_trt.core.files import existing_file, sha256_of
from hpddrnet_trt.core.manifest import (
    AdoptedNetwork,
    InputContract,
    Manifest,
    OutputContract,
    ValidationRecord,
)
from hpddrnet_trt.core.metrics import LabelComparison, arg_max
from hpddrnet_trt.export.adopt_settings import AdoptSettings
from hpddrnet_trt.export.onnx import name_after_modules, simplified
from hpddrnet_trt.export.stranger import REMEDY, Stranger, read_stranger
from hpddrnet_trt.export.verify import feed_of, runtime_name, sample_batches, source_name
from hpddrnet_trt.graph.model import check_target, save_model
from hpddrnet_trt.graph.nodes import (
    consumers,
    copied,
    int_attribute,
    name_nodes,
    producers,
    replace_nodes,
)
from hpddrnet_trt.graph.scores import COMPARISON, ENLARGEMENT

if TYPE_CHECKING:
    import onnx


logger = logging.getLogger(__name__)

LEAST_AGREEMENT = 0.999  # of labels with the stranger's own, which only rounding and ties may change
_SMALLEST_PROBABILITY = 1e-7


def adopt(source: str | Path, target: str | Path, settings: AdoptSettings, *, images: Sequence[Path] = ()) -> Manifest:
    """Write ``source``, an ONNX segmenter of another program, as a file of this package, and return its description.

    Weights beside the file are taken in. The result is compared with ``source`` on ``images`` (micrographs), or on
    simulated ones: labels must agree on :data:`LEAST_AGREEMENT` of the pixels; the figures go into the description.

    Raises :class:`BadInputFile` for a file that is damaged, refused (:mod:`hpddrnet_trt.graph.check`), no FP32
    segmenter, or not what it says; :class:`UsageError` for settings that do not go with it; :class:`UserError` where
    the result differs. Nothing is written then.
    """
    source = existing_file(source, "ONNX file")
    check_target(source, target)
    stranger = Stranger(source, read_stranger(source), settings)
    model, found = _with_our_contract(stranger, settings)
    manifest = Manifest(
        name=settings.name or source.stem,
        network=AdoptedNetwork(kind="adopted", name=settings.name or source.stem, num_classes=len(settings.classes)),
        classes=list(settings.classes),
        normalization=settings.normalization,
        intensity=settings.intensity,
        data=settings.data,
        remarks=[
            f"adopted from {source.name} ({stranger.producer}): its output {stranger.output!r}, {found.gives}; "
            f"{settings.channel_order.upper() if stranger.channels == 3 else 'one channel'} in"
        ],
        checkpoint_sha256=sha256_of(source),
        versions=_versions(),
        input=stranger.contract,
        output=OutputContract(kind=settings.output, confidence=settings.confidence),
        precision="fp32",
    )
    manifest = manifest.replace(validation=[_compare(model, stranger, found, manifest, images)])
    save_model(model, target, manifest)
    return manifest


# ------------------------------------------------------------------------------- our contract


class _Found(NamedTuple):
    """What the stranger's network gives, before its own softmax and arg-max."""

    tensor: str
    gives: Literal["logits", "probabilities", "labels"]
    example: npt.NDArray[Any]  # of the smallest image
    axis: int  # of the classes
    threshold: float = 0.0  # of the stranger's own output, where the second class alone has scores


def _with_our_contract(stranger: Stranger, settings: AdoptSettings) -> tuple[onnx.ModelProto, _Found]:
    """The graph with our input and outputs, and what of the stranger's is in it."""
    from onnx import compose, helper

    model = stranger.model
    _name_after_modules(model, stranger.path)
    found = _network_output(stranger)
    if found.gives == "labels" and (settings.confidence or settings.output == "logits"):
        raise UsageError(f"{stranger.path} gives labels without scores: neither logits nor a confidence come from it")
    kind = helper.np_dtype_to_tensor_dtype(found.example.dtype)
    del model.graph.output[:], model.graph.value_info[:]
    model.graph.output.append(helper.make_tensor_value_info(found.tensor, kind, [None] * found.example.ndim))
    for entry in [entry for entry in model.graph.input if entry.name != stranger.image]:
        model.graph.input.remove(entry)  # weights, as old exporters list them
    replace_nodes(model.graph, model.graph.node)
    try:
        model = simplified(model)
    except Exception as exc:  # of a C++ library, on a graph that ONNX Runtime runs
        logger.info("%s is not simplified: %s", stranger.path, one_line(exc))
    model = compose.add_prefix(model, "network.")
    ours = _Nodes(model)
    _add_input(ours, stranger)
    _add_output(ours, found, stranger.contract, settings)
    name_nodes(model)
    replace_nodes(model.graph, [*ours.nodes, *model.graph.node])
    del model.graph.value_info[:]
    return model, found


def _name_after_modules(model: onnx.ModelProto, path: Path) -> None:
    """Names after modules: by the notes of PyTorch's exporter, or by the paths that its older one made of them."""
    if any(entry.key == "pkg.torch.onnx.name_scopes" for node in model.graph.node for entry in node.metadata_props):
        try:
            name_after_modules(model)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as exc:
            raise BadInputFile(f"{path} has damaged notes of its exporter ({one_line(exc)}); {REMEDY}") from exc
    for node in model.graph.node:
        module, _, operator = node.name.strip("/").rpartition("/")
        node.name = f"{module.replace('/', '.')}/{operator}" if module else operator
        node.doc_string = ""
        del node.metadata_props[:]
    name_nodes(model)


def _network_output(stranger: Stranger) -> _Found:
    """What stands before the arg-max, softmax or sigmoid that the file may end with."""
    from onnx import TensorProto, helper

    graph, classes = stranger.model.graph, len(stranger.settings.classes)
    made, name = producers(graph), stranger.output

    def before(name: str, *operators: str) -> onnx.NodeProto | None:
        node = made.get(name)
        return node if node is not None and node.op_type in operators else None

    inside, logits, threshold = name, False, 0.0
    while (node := before(inside, "Cast", "Identity", "Squeeze", "Unsqueeze")) is not None:
        inside = node.input[0]
    if (node := before(inside, "ArgMax")) is not None:
        name = node.input[0]
    elif stranger.example[name].dtype.kind in "iub" or stranger.example[name].ndim == 3:
        return _Found(name, "labels", stranger.example[name], 1)
    if (node := before(name, "Softmax", "LogSoftmax", "Sigmoid")) is not None:
        name, logits, threshold = node.input[0], True, 0.5
    example = stranger.example.get(name)
    if example is None:
        part = copied(stranger.model)
        del part.graph.output[:]
        part.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        example = stranger.run(stranger.smallest, runtimes.session(part))[name]
    axis = 3 if stranger.channels_last and example.shape[3] in (1, classes) else 1
    if example.shape[axis] != classes and (example.shape[axis], classes) != (1, 2):
        raise UsageError(
            f"{stranger.path} has scores of {example.shape[axis]} classes, and {classes} are named: "
            f"{', '.join(entry.name for entry in stranger.settings.classes)}; name them all, in their order"
        )
    shares = bool(example.min() >= 0 and example.max() <= 1)
    if example.shape[axis] > 1:
        shares = shares and np.allclose(example.sum(axis=axis), 1, atol=1e-3)
    if shares and not logits:
        return _Found(name, "probabilities", example, axis, 0.5)
    return _Found(name, "logits", example, axis, threshold)


class _Nodes:
    """Nodes and constants of ours, around a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph, self.nodes = model.graph, list[Any]()

    def add(self, operator: str, inputs: Sequence[str], name: str, output: str | None = None, **attributes: Any) -> str:
        """A node called ``name``, and what it makes."""
        from onnx import helper

        made = output or name.replace("/", ".")
        self.nodes.append(helper.make_node(operator, list(inputs), [made], name, **attributes))
        return made

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def by_class(self, name: str, values: Sequence[float]) -> str:
        """The same, one value a channel."""
        return self.constant(name, np.reshape(values, (1, -1, 1, 1)))


def _add_input(ours: _Nodes, stranger: Stranger) -> None:
    """Grey levels become the stranger's image: one factor and one shift a channel, which also make the channels."""
    from onnx import TensorProto, helper

    graph, contract = ours.graph, stranger.contract
    levels = ours.add("Cast", ["image"], "input/Cast", to=TensorProto.FLOAT)
    mean, std = (values.astype(np.float64).reshape(1, -1, 1, 1) for values in (stranger.mean, stranger.std))
    levels = ours.add("Mul", [levels, ours.constant("input.factor", 1 / std)], "input/Mul")
    inner, last = graph.input[0].name, stranger.channels_last
    levels = ours.add("Add", [levels, ours.constant("input.shift", -mean / std)], "input/Add", None if last else inner)
    if last:
        ours.add("Transpose", [levels], "input/Transpose", inner, perm=[0, 2, 3, 1])
    if stranger.is_uint8:  # a uint8 tensor of three channels would be no type that TensorRT computes with
        casts = consumers(graph)[inner]
        if any(node.op_type != "Cast" or int_attribute(node, "to", 0) != TensorProto.FLOAT for node in casts):
            raise BadInputFile(f"{stranger.path} computes with a uint8 image; {REMEDY}")
    del graph.input[:]
    sizes = _sizes(contract)
    graph.input.append(helper.make_tensor_value_info("image", TensorProto.UINT8, [sizes[0], 1, *sizes[1:]]))


def _sizes(contract: InputContract) -> list[int | str]:
    """Batch, height and width as ONNX has them: a number where it is fixed, else a name."""
    axes = (contract.batch, "batch"), (contract.height, "height"), (contract.width, "width")
    return [axis.fixed or name for axis, name in axes]


def _add_output(ours: _Nodes, found: _Found, contract: InputContract, settings: AdoptSettings) -> None:
    from onnx import TensorProto, helper

    graph, tensor = ours.graph, f"network.{found.tensor}"
    sizes = _sizes(contract)
    outputs = [helper.make_tensor_value_info("labels", TensorProto.UINT8, sizes)]
    if found.gives == "labels":
        if found.example.ndim == 4:
            tensor = ours.add("Squeeze", [tensor, ours.constant("output.axis", [1], np.int64)], "output/Squeeze")
        real = ours.add("Cast", [tensor], "output/Cast", to=TensorProto.FLOAT)
    else:
        tensor = _full_size(ours, tensor, found, contract, settings)
        if settings.output == "logits":
            ours.add("Identity", [tensor], "output/Identity", "logits")
            logits = [sizes[0], len(settings.classes), *sizes[1:]]
            outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)]
        index = ours.add("ArgMax", [tensor], COMPARISON, axis=1, keepdims=0)
        real = ours.add("Cast", [index], "output/Cast", to=TensorProto.FLOAT)
        if settings.confidence:
            axis = ours.constant("output.axis", [1], np.int64)
            best = ours.add("ReduceMax", [tensor, axis], "output/ReduceMax", keepdims=1)
            below = ours.add("Sub", [tensor, best], "output/Sub")
            shares = ours.add("Exp", [below], "output/Exp")
            total = ours.add("ReduceSum", [shares, axis], "output/ReduceSum", keepdims=0)
            ours.add("Reciprocal", [total], "output/Reciprocal", "confidence")
            outputs.append(helper.make_tensor_value_info("confidence", TensorProto.FLOAT, sizes))
    # By way of floating point, the only type that TensorRT documents to become uint8.
    ours.add("Cast", [real], "output/Cast_1", "labels", to=TensorProto.UINT8)
    del graph.output[:]
    graph.output.extend(outputs)


def _full_size(ours: _Nodes, tensor: str, found: _Found, contract: InputContract, settings: AdoptSettings) -> str:
    """One logit a class for every pixel of the image."""
    if found.axis == 3:
        tensor = ours.add("Transpose", [tensor], "output/Transpose", perm=[0, 3, 1, 2])
    binary = found.example.shape[found.axis] == 1
    if found.gives == "probabilities":
        if binary:  # of the second class
            tensor = ours.add("Mul", [tensor, ours.by_class("output.factor", [-1, 1])], "output/Mul")
            tensor = ours.add("Add", [tensor, ours.by_class("output.shift", [1, 0])], "output/Add")
        tensor = ours.add("Max", [tensor, ours.constant("output.least", _SMALLEST_PROBABILITY)], "output/Max")
        tensor = ours.add("Log", [tensor], "output/Log")
    elif binary:  # by how much the second class is above the first one
        tensor = ours.add("Mul", [tensor, ours.by_class("output.factor", [0, 1])], "output/Mul")
    height, width = (found.example.shape[place] for place in ((1, 2) if found.axis == 3 else (2, 3)))
    image = contract.height.minimum, contract.width.minimum
    if image == (height, width):
        return tensor
    how = "align_corners" if settings.align_corners else "half_pixel"
    if image[0] % height == 0 and image[1] % width == 0:
        scales = ours.constant("output.scales", [1, 1, image[0] // height, image[1] // width])
        return ours.add(
            "Resize", [tensor, "", scales], f"{ENLARGEMENT}Resize", mode="linear", coordinate_transformation_mode=how
        )
    if contract.height.fixed is None or contract.width.fixed is None:
        raise BadInputFile(
            f"the file gives scores of {height}x{width} for an image of {image[0]}x{image[1]}, which is no "
            "whole factor; give --multiple as its network needs it, or export it with fixed sizes"
        )
    whole = ours.constant("output.sizes", image, np.int64)
    return ours.add(
        "Resize", [tensor, "", "", whole], f"{ENLARGEMENT}Resize", mode="linear", axes=[2, 3],
        coordinate_transformation_mode=how,
    )  # fmt: skip


# ------------------------------------------------------------------------------- the comparison


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnx", "onnxsim", "onnxruntime")}


def _compare(
    model: onnx.ModelProto, stranger: Stranger, found: _Found, manifest: Manifest, images: Sequence[Path]
) -> ValidationRecord:
    """Labels of the adopted graph beside those of the file as it came, enlarged by OpenCV where that is needed."""
    try:
        session = runtimes.session(model, "check the adopted file")
    except runtimes.onnxruntime_errors() as exc:
        raise UserError(
            f"the adopted form of {stranger.path} does not run ({one_line(exc)}); please report this"
        ) from exc
    comparison, seen = LabelComparison(manifest.network.num_classes), set[int]()
    for batch in sample_batches(manifest, images):
        image = feed_of(batch, manifest)
        (ours, *others) = session.run(None, image)
        theirs = stranger.run(image["image"][:, 0])[stranger.output]
        height, width = image["image"].shape[2:]
        if ours.shape[-2:] != (height, width):
            raise BadInputFile(
                f"{stranger.path} gives {ours.shape[-2]}x{ours.shape[-1]} labels for an image of {height}x{width}, so "
                "it is not as dynamic as it says; export it with fixed sizes"
            )
        if not all(np.isfinite(values).all() for values in (ours, theirs, *others)):
            raise BadInputFile(
                f"{stranger.path} gives values that are not finite for a micrograph; check --normalization, and the "
                "file in the program that it comes from"
            )
        labels = arg_max(ours) if ours.ndim == 4 else ours
        if labels.max() >= manifest.network.num_classes:
            raise UsageError(
                f"{stranger.path} gives the label {labels.max()}, and {manifest.network.num_classes} classes are "
                "named; name them all, in their order"
            )
        seen |= set(np.unique(labels).tolist())
        for got, wanted in zip(labels, _labels(theirs, found, height, width, stranger.settings), strict=True):
            comparison.update(got, wanted)
    if not comparison.agreement >= LEAST_AGREEMENT:
        raise UserError(
            f"the adopted form of {stranger.path} labels only {comparison.agreement:.2%} of the pixels as the file "
            "itself does, so it was not written; please report this"
        )
    if len(seen) == 1:
        logger.warning(
            "%s gives class %r for every pixel of the %d pictures tried; is the normalization the one of its training?",
            stranger.path.name, manifest.class_names[seen.pop()], comparison.images,
        )  # fmt: skip
    return ValidationRecord(
        what="adoption parity", runtime=runtime_name(), values={"agreement": comparison.agreement},
        images=comparison.images, source=source_name(images[: comparison.images]),
    )  # fmt: skip


def _labels(
    output: npt.NDArray[Any], found: _Found, height: int, width: int, settings: AdoptSettings
) -> npt.NDArray[np.uint8]:
    """Labels ``[N, H, W]`` of what the stranger's file gives, worked out without ONNX."""
    if output.dtype.kind in "iub" or output.ndim == 3:
        return output.reshape(len(output), height, width).astype(np.uint8)
    scores = np.moveaxis(output, found.axis, 1).astype(np.float32)
    if scores.shape[2:] != (height, width):
        rows, columns = (
            _interpolation(*sizes, settings.align_corners)
            for sizes in zip((height, width), scores.shape[2:], strict=True)
        )
        scores = np.asarray(rows @ scores @ columns.T, dtype=np.float32)
    return (scores[:, 0] > found.threshold).astype(np.uint8) if scores.shape[1] == 1 else arg_max(scores)


def _interpolation(size: int, source: int, align_corners: bool) -> npt.NDArray[np.float32]:
    """The matrix ``[size, source]`` of linear interpolation."""
    places: npt.NDArray[Any] = (np.arange(size) + 0.5) * source / size - 0.5
    if align_corners:
        places = np.linspace(0, source - 1, size)
    return np.stack([np.interp(places, np.arange(source), unit) for unit in np.eye(source)], axis=1).astype(np.float32)
