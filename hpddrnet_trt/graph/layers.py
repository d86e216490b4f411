"""Which part of the network a layer belongs to, by its name in a graph or in a runtime's profile.

Parts come in two sizes: :func:`group_of` gives one of the dozen of :data:`GROUPS`, :func:`block_of` the
residual block, attention module or step. Nodes of an exported file are named after modules
(``backbone.stem.0.conv.conv/Conv``), and runtimes keep those names in their own way:

* ONNX Runtime writes ``.../Conv_kernel_time`` for a node, and the *tensor* it makes for a convolution in its
  blocked layout (``relu_13_nchwc``): :func:`tensor_owners` knows whose tensor that is;
* OpenVINO appends what it split off (``.../Conv/WithoutBiases``), joins what it fused by commas (its
  ``originalLayersNames``) and names a conversion after both neighbours, with what changes between them
  (``A_bf16_acdb_f32_abcd_B``);
* TensorRT joins fused layers by `` + ``, names a compiled region by its ends
  (``{ForeignNode[A...B]}``), a conversion by its reader (``Reformatting CopyNode for Input Tensor 0 to A``),
  and kernels of its graph compiler by what they compute (``__myl_...``).

A fused layer belongs to its convolution or matrix product; without one to a module before the additions
and ReLUs that join the branches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hpddrnet_trt.core.errors import require

GROUPS = (
    "stem", "spatial branch", "context branch", "bilateral fusion", "channel attention", "position attention",
    "pyramid", "detail", "head", "output", "domain guard", "conversions", "other",
)  # fmt: skip
"""The parts in the network's order, then what belongs to no part: changes of type or layout, and the rest."""

_MODULES = (
    (r"backbone\.stem", "stem"),
    (r"backbone\.spatial_branch_layers", "spatial branch"),
    (r"backbone\.context_branch_layers", "context branch"),
    (r"backbone\.(?:compression|down)_\d", "bilateral fusion"),
    (r"backbone\.ecas", "channel attention"),
    (r"backbone\.sps", "position attention"),
    (r"backbone\.spp", "pyramid"),
    (r"backbone", "bilateral fusion"),  # the joints themselves: sums, ReLUs and resizes between the branches
    (r"(?:decode_head\.)?detail", "detail"),
    (r"(?:decode_head\.)?(?:head|conv_seg)|decode_head", "head"),
    (r"output", "output"),
    (r"domain", "domain guard"),
)
_PATH = re.compile("|".join(rf"(?P<g{index}>{path})(?=[./]|$)" for index, (path, _) in enumerate(_MODULES)))
_JOINT = re.compile(r"backbone(?:/|$)")
_PRODUCT = re.compile(r"/(?:Attention|Conv|ConvTranspose|Gemm|Loop|MatMul|Scan|Softmax)(?![a-z])")
# Nothing but position attention multiplies matrices or has a softmax. From its function ONNX Runtime makes
# nodes that are named after their operator alone; TensorRT's compiler writes a softmax as Max, Sub, Exp, Sum.
_ATTENTION = re.compile(
    r"PositionAttention|^(?:MatMul|Softmax)_\d+$|^/MatmulTransposeFusion|fmha|mha_|flash|^__my[el].*(?:Soft|SubExpSum)"
)
_LABELS = re.compile(r"^(?:ArgMax|TopK|confidence|labels|logits)(?![a-z])")

_INNER = re.compile(r"conv\d*|bn\d*|cnn|mix|downsample|skip|shortcut")
# Modules that are one part for people, however many convolutions they hold.
_WHOLE = re.compile(r"^(.*?\.spp|.*?\.down_\d+|.*?\.compression_\d+|.*?\.sps\.\d+|.*?\.ecas\.\d+|head|detail)(\.|$)")

_LAYOUT = r"(?:bf16|f(?:16|32|64)|[iu](?:8|16|32|64)|boolean|[a-eA-E]{3,5}(?:\d+[a-e])*)"
_CONVERSION = re.compile(
    rf"_{_LAYOUT}_{_LAYOUT}_"  # OpenVINO: both neighbours, and what changes between them
    r"|^Reformatting CopyNode|^(?:Reorder(?:Input|Output)|Reshape|Transpose)(?:_token_\d+)?$|^Memcpy",
)
_CONVERSION_PART = re.compile(r"[Qq]uantizeLinear|/Cast(?:_\d+)?$|^InsertedPrecisionFreeCast_|^Cast(?:_\d+)?$")
_SUFFIXES = re.compile(r"(?:_bn)?_nchwc$")


def group_of(layer_name: str, owners: Mapping[str, str] | None = None) -> str:
    """The part of the network, one of :data:`GROUPS`; ``owners``: see :func:`tensor_owners`."""
    name = layer_name.removesuffix("_kernel_time")
    if _CONVERSION.search(name):
        return "conversions"
    found = [
        _ranked(part, owners or {})
        for part in re.split(r"\s*(?:\.\.\.|[\s,+()\[\]{}|]|ONNX Layer:)\s*", name)
        if part and part != "ForeignNode"
    ]
    return min(found, key=lambda entry: entry[0], default=(0, "other"))[1]


def block_of(node: str) -> str:
    """The part a node belongs to: ``backbone.stem.2.0.conv1.conv/Conv`` is of ``backbone.stem.2.0``.

    Residual blocks, pyramid pooling, down-sampling and compression steps, attention modules and the
    head are parts; a name without module path is its own part.
    """
    path = node.split("/")[0]
    whole = _WHOLE.match(path)
    if whole:
        return whole.group(1)
    parts = path.split(".")
    while len(parts) > 1:
        if _INNER.fullmatch(parts[-1]) or (parts[-1].isdigit() and _INNER.fullmatch(parts[-2])):
            parts.pop()
        else:
            break
    return ".".join(parts)


def short(node: str) -> str:
    """A node's name for tables: without the operator and what every name begins with."""
    return node.split("/")[0].removeprefix("backbone.").removesuffix(".conv")


def group_times(layer_ms: Mapping[str, float], owners: Mapping[str, str] | None = None) -> dict[str, float]:
    """Milliseconds by part, in the order of :data:`GROUPS`, without parts that have no layer."""
    sums: dict[str, float] = {}
    for name, milliseconds in layer_ms.items():
        group = group_of(name, owners)
        sums[group] = sums.get(group, 0.0) + milliseconds
    return {group: sums[group] for group in GROUPS if group in sums}


def tensor_owners(path: str | Path) -> dict[str, str]:
    """The node that makes each tensor of an ``.onnx`` file, by name; empty for any other file."""
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        return {}
    onnx = require("onnx", "export", "read the names of an ONNX file's layers")
    graph = onnx.load(str(path), load_external_data=False).graph
    return {output: node.name for node in graph.node for output in node.output if output and node.name}


def _ranked(part: str, owners: Mapping[str, str]) -> tuple[int, str]:
    """Group of one name, and how much it counts among names that were fused: less is more."""
    if part.endswith("_nchwc"):  # a convolution (or pooling) of ONNX Runtime, named after the tensor it makes
        tensor = _SUFFIXES.sub("", part.removeprefix("InsertedPrecisionFreeCast_"))
        return (0, _module(owners[tensor])) if tensor in owners else (5, "other")
    if _CONVERSION_PART.search(part):
        return 4, "conversions"
    if _ATTENTION.search(part):
        return 0, "position attention"
    if _LABELS.match(part):
        return 3, "output"
    group = _module(part)
    if group == "other":
        return (2, _module(owners[part])) if part in owners else (5, "other")
    return (0 if _PRODUCT.search(part) else 2 if _JOINT.match(part) else 1), group


def _module(name: str) -> str:
    found = _PATH.match(name)
    return "other" if found is None else next(group for index, (_, group) in enumerate(_MODULES) if found[f"g{index}"])
