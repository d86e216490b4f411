"""Position attention inside an ONNX graph: find it, and choose how it is computed.

Written as MatMul, Softmax, MatMul it stores the scores of all pairs of tokens: with tokens at 1/16 of
the image that is 64 MiB in FP32 at 1024x1024, 1 GiB at 2048x2048 and 16 GiB at 4096x4096, twice. Where
a runtime has no fused kernel, :func:`in_blocks` computes the same rows of the softmax a block of
queries at a time, which is exact because rows do not depend on each other; the memory of a block grows
linearly with the image. :func:`as_function` gives the three operators one name, so that a plugin can
take their place; runtimes without one take them apart again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpddrnet_trt.core.errors import UsageError, require
from hpddrnet_trt.graph.nodes import copied, int_attribute, producers, renamed, replace_nodes

if TYPE_CHECKING:
    import onnx

ScoreType = Literal["fp32", "bf16"]
# Queries per block. ONNX Runtime, two cores, 4096 and 16384 tokens of 128 channels: 512 rows cost 4 % and 1 % more
# time than all at once, 64 rows 16 % and 18 %.
BLOCK_ROWS = 512
FUNCTION_DOMAIN = "hpddrnet"
FUNCTION_NAME = "PositionAttention"
_FUNCTION_VERSION = 1
_HEAD_AXIS = "attention.head_axis"  # constant: where the axis of the one head is


# What may stand between the product of queries and keys and the softmax: casts, a scale, a mask.
_BETWEEN = ("Cast", "Mul", "Div", "Add", "Sub")


@dataclass(frozen=True)
class Attention:
    """One attention of a graph, its operators in order.

    ``scores``: from the product of queries and keys to the softmax, or an Attention operator alone.
    ``mixing``: from there to the product with the values; empty where the weights go another way.
    """

    scores: tuple[onnx.NodeProto, ...]
    mixing: tuple[onnx.NodeProto, ...] = ()

    @property
    def nodes(self) -> tuple[onnx.NodeProto, ...]:
        """All of its operators."""
        return (*self.scores, *self.mixing)

    @property
    def is_plain(self) -> bool:
        """Whether it is MatMul, Softmax over keys, MatMul, with nothing but casts between them: what is rewritten."""
        if not self.mixing or any(node.op_type not in ("Cast", "MatMul", "Softmax") for node in self.nodes):
            return False
        axis = int_attribute(self.scores[-1], "axis", -1)
        return axis in (-1, 2)  # else its rows depend on each other

    @property
    def query(self) -> str:
        """``[N, T, C]``."""
        return str(self.scores[0].input[0])

    @property
    def keys(self) -> str:
        """``[N, C, T]``."""
        return str(self.scores[0].input[1])

    @property
    def values(self) -> str:
        """``[N, T, C]``."""
        return str(self.mixing[-1].input[1])

    @property
    def output(self) -> str:
        """``[N, T, C]``."""
        return str(self.mixing[-1].output[0])


def attentions(nodes: Iterable[onnx.NodeProto]) -> list[Attention]:
    """Every softmax of a matrix product, and every Attention operator, in the order of ``nodes``.

    The one place that recognises attention in a graph, the body of a loop or a part of either. Calls of
    ``hpddrnet::PositionAttention`` are not looked into: :func:`expanded` writes them out.
    """
    nodes = list(nodes)
    made = {name: node for node in nodes for name in node.output if name}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def before(node: onnx.NodeProto) -> onnx.NodeProto | None:
        return next((made[name] for name in node.input if name in made), None)

    def after(node: onnx.NodeProto) -> onnx.NodeProto | None:
        reading = readers.get(node.output[0], [])
        return reading[0] if len(reading) == 1 else None

    found = []
    for node in nodes:
        if node.op_type == "Attention":
            found.append(Attention((node,)))
        elif node.op_type == "Softmax" and (product := _until_product(node, before, _BETWEEN)):
            mixing = _until_product(node, after, ("Cast",))
            if mixing and mixing[-1].input[0] != [node, *mixing][-2].output[0]:
                mixing = []  # its weights are multiplied from the right
            if any(len(readers[part.output[0]]) != 1 for part in product):
                mixing = []  # its scores are read elsewhere, too
            found.append(Attention((*reversed(product), node), tuple(mixing)))
    return found


def _until_product(start: onnx.NodeProto, step: Any, through: Collection[str]) -> list[onnx.NodeProto]:
    """The MatMul beside ``start`` and what lies between, in walking order; nothing where another operator is met."""
    walked: list[onnx.NodeProto] = []
    node = step(start)
    while node is not None:
        walked.append(node)
        if node.op_type == "MatMul":
            return walked
        node = step(node) if node.op_type in through else None
    return []


def position_attentions(model: onnx.ModelProto) -> list[Attention]:
    """Those :func:`attentions` of a graph that can be rewritten: of tokens ``[N, T, C]``, or of one head of them.

    Attention with several heads, as an adopted transformer has it, is left alone.
    """
    found = [attention for attention in attentions(model.graph.node) if attention.is_plain]
    if not found:
        return []
    onnx = require("onnx", "export", "rewrite attention")
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        entry.name: [axis.dim_value for axis in entry.type.tensor_type.shape.dim]
        for entry in (*graph.value_info, *graph.input)
    }

    def has_one_head(query: str) -> bool:
        shape = shapes.get(query, [])  # empty where it is not known
        return len(shape) in (0, 3) or (len(shape) == 4 and shape[1] == 1)

    return [attention for attention in found if has_one_head(attention.query)]


def in_blocks(model: onnx.ModelProto, rows: int = BLOCK_ROWS) -> onnx.ModelProto:
    """A copy of ``model`` whose attentions work on ``rows`` queries at a time; exact, for every size.

    A ``Scan`` over blocks of queries holds the attention's own operators; the last block is filled up with
    zeros, whose results are dropped. Apply it last: other passes do not look into the ``Scan``. Raises
    :class:`UsageError` for a model without MatMul attention.
    """
    if rows < 1:
        raise UsageError(f"rows per block must be at least 1, got {rows}")
    result = copied(model)
    types = _types(model)
    for index, attention in enumerate(_attentions_of(result)):
        _replace(result.graph, attention, _blocked(result.graph, attention, f"attention_{index}", types, rows))
    return result


def in_type(model: onnx.ModelProto, scores: ScoreType, leave: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of a typed ``model`` (FP16, INT8, FP8) whose attentions compute in ``scores``.

    ``bf16``: both products and the softmax, as one head of rank 4, ``[N, 1, T, C]``, which is how NVIDIA documents
    attention (https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html).
    TensorRT-RTX 1.7.1 then makes each attention of at most 256 channels one fused kernel that stores no scores (its
    builder's log, which is the same at rank 3; other TensorRT libraries were not asked), so that memory grows
    linearly with the image. BF16 has the range of FP32, which the scores of trained networks need
    (measured: 3e5 to 2e7); FP16 has not. ``fp32``: rank 3 again, the product of queries and keys and the
    softmax in FP32, the product with the values in the type that the network has there. An attention that holds one
    of the nodes in ``leave`` stays as it is. A model without MatMul attention comes back unchanged.
    """
    result = copied(model)
    types = {name: element for name, (element, _) in _types(model).items()}
    for index, attention in enumerate(position_attentions(result)):
        if any(node.name in leave for node in attention.nodes):
            continue
        _replace(result.graph, attention, _typed(result.graph, attention, f"attention_{index}", types, scores))
    replace_nodes(result.graph, result.graph.node)  # without casts that nothing reads any more
    del result.graph.value_info[:]
    return result


def uses_bf16(model: onnx.ModelProto) -> bool:
    """Whether an attention of ``model`` is cast to BF16 (by :func:`in_type`)."""
    from onnx import TensorProto, helper

    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    narrowed = {node.output[0] for node in casts if helper.get_node_attr_value(node, "to") == TensorProto.BFLOAT16}
    return any(attention.query in narrowed for attention in position_attentions(model))


def _typed(
    graph: onnx.GraphProto, attention: Attention, prefix: str, types: dict[str, int], scores: ScoreType
) -> list[onnx.NodeProto]:
    from onnx import TensorProto, helper, numpy_helper

    made = producers(graph)
    stem = attention.nodes[-1].name.rpartition("/")[0]
    output = _output_of_the_network(graph, attention)
    result_type = types[output]
    score_type = TensorProto.BFLOAT16 if scores == "bf16" else TensorProto.FLOAT
    mix_type = score_type if scores == "bf16" else result_type
    nodes: list[onnx.NodeProto] = []

    def add(operator: str, inputs: list[str], target: str, what: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [target], name=f"{stem}/{operator}_{what}", **attributes))
        return target

    def operand(name: str, to: int, what: str) -> str:
        # What was widened, or cast or given a head for the attention alone, is taken as it was before.
        before = made.get(name)
        while before is not None and (
            _HEAD_AXIS in before.input
            or (before.op_type == "Cast" and types[name] in (TensorProto.FLOAT, TensorProto.BFLOAT16))
        ):
            name = before.input[0]
            before = made.get(name)
        kind = types[name]
        if scores == "bf16":
            name = add("Unsqueeze", [name, _HEAD_AXIS], f"{prefix}.{what}_head", what)
        return name if kind == to else add("Cast", [name], f"{prefix}.{what}_{scores}", f"{what}_{scores}", to=to)

    if scores == "bf16" and all(entry.name != _HEAD_AXIS for entry in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), _HEAD_AXIS))
    product, softmax, mix = (renamed(node, {}) for node in attention.nodes if node.op_type != "Cast")
    keys, values = operand(attention.keys, score_type, "keys"), operand(attention.values, mix_type, "values")
    product.input[:] = [operand(attention.query, score_type, "query"), keys]
    softmax.input[0] = product.output[0]
    if scores == "bf16":
        del softmax.attribute[:]
        softmax.attribute.append(helper.make_attribute("axis", -1))
    nodes += [product, softmax]
    weights = softmax.output[0]
    if mix_type != score_type:
        weights = add("Cast", [weights], f"{prefix}.weights_{scores}", f"weights_{scores}", to=mix_type)
    mix.input[:] = [weights, values]
    nodes.append(mix)
    mix.output[0] = f"{prefix}.mixed_{scores}"
    if scores == "bf16":
        add("Squeeze", [mix.output[0], _HEAD_AXIS], f"{prefix}.mixed_tokens", "mixed")
    if mix_type != result_type:
        add("Cast", [nodes[-1].output[0]], output, f"mixed_{scores}", to=result_type)
    nodes[-1].output[0] = output
    return nodes


def _output_of_the_network(graph: onnx.GraphProto, attention: Attention) -> str:
    """The attention's result as the network goes on with it; the squeeze and the cast to it leave the graph."""
    name = attention.output
    for operator in ("Squeeze", "Cast"):
        readers = [node for node in graph.node if name in node.input]
        if len(readers) == 1 and readers[0].op_type == operator:
            name = readers[0].output[0]
            graph.node.remove(readers[0])
    return name


def as_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` whose attentions are calls of model-local functions ``hpddrnet::PositionAttention``.

    The function's body is what stood there, so every runtime that knows local functions still runs it; one
    with a kernel of that name may use that instead. Inputs: query, keys, values. Raises as
    :func:`in_blocks` does.
    """
    onnx = require("onnx", "export", "rewrite position attention")
    helper = onnx.helper
    result = copied(model)
    standard = next(entry for entry in result.opset_import if entry.domain in ("", "ai.onnx"))
    bodies: list[bytes] = []
    for attention in _attentions_of(result):
        names = {attention.query: "query", attention.keys: "keys", attention.values: "values",
                 attention.output: "output"}  # fmt: skip
        nodes = [_in_function(node, names) for node in attention.nodes]
        body = b"".join(node.SerializeToString(deterministic=True) for node in nodes)
        if body not in bodies:
            bodies.append(body)
            name = _function_name(len(bodies))
            result.functions.append(
                helper.make_function(
                    FUNCTION_DOMAIN, name, ["query", "keys", "values"], ["output"], nodes,
                    [helper.make_opsetid("", standard.version)],
                )
            )  # fmt: skip
        name = _function_name(bodies.index(body) + 1)
        call = helper.make_node(
            name, [attention.query, attention.keys, attention.values], [attention.output],
            name=attention.nodes[-1].name.rpartition("/")[0] + "/" + name, domain=FUNCTION_DOMAIN,
        )  # fmt: skip
        _replace(result.graph, attention, [call])
    result.opset_import.append(helper.make_opsetid(FUNCTION_DOMAIN, _FUNCTION_VERSION))
    return result


def expanded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with the bodies of its functions in place of their calls: inverse of :func:`as_function`."""
    inliner = require("onnx.inliner", "export", "rewrite position attention")
    names = {call.output[0]: call.name for call in model.graph.node if call.domain == FUNCTION_DOMAIN}
    result: onnx.ModelProto = inliner.inline_local_functions(model)
    for attention in position_attentions(result):  # operators of a function have no names
        if (name := names.get(attention.output)) is None:
            continue
        seen: Counter[str] = Counter()
        for node in attention.nodes:
            seen[node.op_type] += 1
            number = f"_{seen[node.op_type]}" if seen[node.op_type] > 1 else ""
            node.name = f"{name.rpartition('/')[0]}/{node.op_type}{number}"
    for entry in list(result.opset_import):
        if entry.domain == FUNCTION_DOMAIN:
            result.opset_import.remove(entry)
    return result


def _function_name(number: int) -> str:
    return FUNCTION_NAME if number == 1 else f"{FUNCTION_NAME}{number}"


def _in_function(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    """A copy of a body's node with local names; names of intermediate tensors are numbered as they come."""
    for name in (*node.input, *node.output):
        names.setdefault(name, f"value_{len(names)}")
    copy = renamed(node, names)
    copy.ClearField("name")  # two calls of one function would give two nodes the same name
    return copy


def _attentions_of(model: onnx.ModelProto) -> list[Attention]:
    found = position_attentions(model)
    if not found:
        raise UsageError(
            "this model has no position attention written as MatMul, Softmax, MatMul; export it with --attention matmul"
        )
    return found


def _types(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Element type and size of the last axis (0: unknown) of each tensor."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {}
    for entry in [*graph.input, *graph.value_info, *graph.output]:
        kind = entry.type.tensor_type
        types[entry.name] = (kind.elem_type, kind.shape.dim[-1].dim_value if kind.shape.dim else 0)
    return types


def _blocked(
    graph: onnx.GraphProto, attention: Attention, prefix: str, types: dict[str, tuple[int, int]], rows: int
) -> list[onnx.NodeProto]:
    from onnx import helper, numpy_helper

    def constant(name: str, values: Any, dtype: Any = np.int64) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), f"{prefix}.{name}"))
        return f"{prefix}.{name}"

    nodes: list[onnx.NodeProto] = []

    def add(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        name = f"{stem}/{operator}_block_{len(nodes)}"
        nodes.append(helper.make_node(operator, list(inputs), [f"{prefix}.{output}"], name=name, **attributes))
        return f"{prefix}.{output}"

    stem = attention.nodes[-1].name.rpartition("/")[0]
    element, channels = types[attention.query]
    result_type, _ = types[attention.output]
    if not channels:
        raise UsageError(f"the number of channels of {attention.query!r} is not known; export the model again")
    # Tokens are filled up to whole blocks: -T modulo the rows (the sign of Mod is that of the divisor).
    tokens = add("Shape", [attention.query], "tokens", start=1, end=2)
    negative = add("Neg", [tokens], "minus_tokens")
    missing = add("Mod", [negative, constant("rows", [rows])], "missing")
    pads = add("Concat", [constant("no_pads", [0]), missing], "pads", axis=0)
    zero = constant("zero", 0, helper.tensor_dtype_to_np_dtype(element))
    axis = constant("token_axis", [1])
    padded = add("Pad", [attention.query, pads, zero, axis], "padded")
    blocks = add("Reshape", [padded, constant("blocks_shape", [0, -1, rows, channels])], "blocks")
    block_in, block_out = f"{prefix}.block", f"{prefix}.block_result"
    body = helper.make_graph(
        [renamed(node, {attention.query: block_in, attention.output: block_out}) for node in attention.nodes],
        f"{prefix}.body",
        [helper.make_tensor_value_info(block_in, element, None)],
        [helper.make_tensor_value_info(block_out, result_type, None)],
    )
    mixed = add("Scan", [blocks], "mixed", body=body, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1])
    joined = add("Reshape", [mixed, constant("joined_shape", [0, -1, channels])], "joined")
    add("Slice", [joined, constant("first", [0]), tokens, axis], "result")
    nodes[-1].output[0] = attention.output
    return nodes


def _replace(graph: onnx.GraphProto, attention: Attention, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put ``nodes`` where the attention's last operator stood; what it needs is made before."""
    old = {node.output[0] for node in attention.nodes}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] == attention.output:
            kept.extend(nodes)
        elif node.output[0] not in old:
            kept.append(renamed(node, {}))  # a copy: clearing the list below would empty the original
    del graph.node[:]
    graph.node.extend(kept)
