"""Model files that something has happened to: seeded damage to small valid ones, of each kind that is loaded.

Case ``number`` of a kind is the same file on every run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.manifest import METADATA_KEY, EngineRecord, read_manifest, sidecar_path

KINDS = ("onnx", "build", "safetensors", "pth", "engine", "description")  # build: ONNX files to build engines from
HUGE = (0, -1, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
_WEIRD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, 1e-308, float("nan"), float("inf"), 10**30, -(10**30), 2**31, 2**63,
    "", "x", "0", "NaN", "../../etc/passwd", "/dev/zero", "\0", "\u202e", "\ud800", "🔬" * 50, "x" * 70_000, "²",
    "9" * 5000,
    [], {}, [[]], [None], {"": {}}, [1, 2, 3, 4], {"minimum": 10**9}, {"minimum": 8, "maximum": 4}, [0] * 1000,
)  # fmt: skip


# --- valid files


Seeds = dict[str, list[Path]]


def write_seeds(folder: Path) -> Seeds:
    """Small valid files of each kind."""
    import torch

    from hpddrnet_trt.graph.attention import as_function
    from hpddrnet_trt.models.checkpoints import save_checkpoint
    from tests.tiny_export import exported, write_fp16, write_fp32, write_int8
    from tests.tiny_network import tiny_manifest, tiny_network
    from tests.toy import manifest, write_toy_onnx

    network = tiny_network()
    checkpoint = save_checkpoint(folder / "network.safetensors", network, tiny_manifest(network))
    half = save_checkpoint(folder / "half.safetensors", network, tiny_manifest(network, name="half"), half=True)
    torch.save({"state_dict": network.state_dict(), "meta": {"CLASSES": ["a", "b", "c"]}}, folder / "new.pth")
    torch.save({"state_dict": network.state_dict()}, folder / "old.pth", _use_new_zipfile_serialization=False)
    graph, described = exported()
    function = folder / "function.onnx"
    called = as_function(graph)
    helper.set_model_props(called, {METADATA_KEY: described.replace(attention="function").to_json()})
    onnx.save(called, str(function))
    labels = write_toy_onnx(folder / "labels.onnx", manifest())
    anywhere = [
        labels, write_toy_onnx(folder / "confidence.onnx", manifest("labels", confidence=True)),
        write_toy_onnx(folder / "static.onnx", manifest(size=64)),
        write_fp32(folder / "network.onnx"), write_fp16(folder / "half.onnx"), function,
    ]  # fmt: skip
    int8 = manifest(precision="int8", quantized_for="tensorrt")
    return {
        "onnx": [
            *anywhere, labels, write_toy_onnx(folder / "logits.onnx", manifest("logits")),
            write_toy_onnx(folder / "int8.onnx", int8, symmetric_int8=True),
        ],
        "build": [*anywhere, write_int8(folder / "network.int8.onnx")],
        "safetensors": [checkpoint, half],
        "pth": [folder / "new.pth", folder / "old.pth"],
        "engine": [write_engine(folder / "model.engine", labels)],
        "description": [labels, checkpoint, folder / "model.engine"],
    }  # fmt: skip


def write_engine(path: Path, source: Path) -> Path:
    """A file with the description of an engine beside it, for a simulated TensorRT that runs ``source``."""
    content = b"a plan " * 400
    path.write_bytes(content)
    profiles = [{"min": [1, 1, 8, 8], "opt": [1, 1, 64, 64], "max": [2, 1, 128, 128]}]
    record = EngineRecord(
        runtime="tensorrt", version="10.9.0.34", compute_capabilities=["8.9"], gpu="Simulated 0", profiles=profiles,
        sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), build_seconds=1.0,
        layer_precision={"convolutions": {"fp32": 1}, "macs_share": {"fp32": 1.0}, "source": "simulated"},
    )  # fmt: skip
    sidecar_path(path).write_text(read_manifest(source).replace(engine=record).to_json(), encoding="utf-8")
    return path


# --- damage to bytes


def damaged_bytes(rng: Random, content: bytes) -> bytes:
    """One to three accidents: bits, bytes, pieces lost, doubled, moved, overwritten."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        # The beginning and the end are where a file says what it is.
        at = rng.randrange(min(len(data), 256) if rng.random() < 0.4 else len(data))
        other, length = rng.randrange(len(data)), rng.choice([1, 2, 4, 8, 16, 100, 1000])
        end = min(at + length, len(data))
        piece = bytes(data[at:end])
        lie = rng.choice(HUGE) & (2**64 - 1)
        accident = rng.randrange(8)
        if accident == 0:
            for _ in range(rng.choice([1, 1, 1, 8, 64])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif accident == 1:
            del data[at : rng.choice([end, len(data)])]
        elif accident == 2:
            data[at:end] = rng.randbytes(len(piece))
        elif accident == 3:
            data[at:end] = rng.choice([b"\xff", b"\0", b"\x80", b"\x7f"]) * len(piece)
        elif accident == 4:
            data[other:other] = piece * rng.choice([1, 1, 5])
        elif accident == 5:
            data[other : other + len(piece)] = piece
        elif accident == 6:  # a length or a number that lies
            data[at : at + 8] = rng.choice([struct.pack("<Q", lie), _varint(lie), struct.pack(">I", lie & 0xFFFFFFFF)])
        else:
            data[at] = rng.randrange(256)
    return bytes(data)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


# --- damage to descriptions


def damaged_description(rng: Random, text: str) -> bytes:
    """A JSON description with wrong types, numbers, keys, nesting, or encoding."""
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        value = _damaged_json(rng, value)
    written = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:
        depth = rng.choice([50, 1000, 100_000])
        deep = "[" * depth + "]" * depth
        written = deep if rng.random() < 0.3 else written.replace("{", '{"deep": ' + deep + ", ", 1)
    if rng.random() < 0.1:  # twice, the second time with another value
        written = written.replace("{", '{"classes": 3, "format_version": 1e400, ', 1)
    if rng.random() < 0.2:
        return damaged_bytes(rng, written.encode("utf-8", errors="surrogatepass"))
    encoding = rng.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig", "utf-32", "latin-1"])
    return written.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")


def _damaged_json(rng: Random, value: Any) -> Any:
    """One place, anywhere in the tree, replaced, removed, doubled or added."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        action = rng.random()
        if action < 0.75:
            value[key] = _damaged_json(rng, value[key])
        elif action < 0.85:
            del value[key]
        elif isinstance(value, list):
            value.extend(copy.deepcopy(value[key]) for _ in range(rng.choice([1, 5, 300])))
        else:
            value[rng.choice(["", "x" * 5000, "name", "engine"])] = copy.deepcopy(value[key])
        return value
    if rng.random() < 0.6:  # of the right type
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return rng.choice([*HUGE, 1, 2, 7, 8, 64, 254, 255, 4096, 0.5])
        if isinstance(value, str):
            return rng.choice(["", "x", "fp16", "int8", "labels", "logits", "none", "float32", "²", "x" * 900, "8.9"])
    return copy.deepcopy(rng.choice(_WEIRD))


def with_description(path: Path, text: bytes) -> bytes:
    """The content of a ``.onnx`` or ``.safetensors`` file with another description in it."""
    content = path.read_bytes()
    if path.suffix == ".onnx":
        model = onnx.load_from_string(content)
        del model.metadata_props[:]
        pair = _field(1, METADATA_KEY.encode()) + _field(2, text)
        return bytes(model.SerializeToString()) + _field(14, pair)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {METADATA_KEY: text.decode("utf-8", errors="replace")}
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + content[8 + length :]


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


# --- damage to graphs


def damaged_graph(rng: Random, content: bytes) -> bytes:
    """An ONNX file that parses, and means something else. What is refused for one reason: tests/graph/test_check.py."""
    model = onnx.load_from_string(content)
    for _ in range(rng.randint(1, 2)):
        with suppress(ValueError):  # the second one may find the tensor that the first has damaged
            rng.choice(_GRAPH_DAMAGES)(rng, model)
    return bytes(model.SerializeToString())


def _node(rng: Random, model: onnx.ModelProto) -> onnx.NodeProto:
    return rng.choice(model.graph.node) if model.graph.node else model.graph.node.add()


def _operator(rng: Random, model: onnx.ModelProto) -> None:
    kinds = ["Loop", "If", "Scan", "ConstantOfShape", "Expand", "Tile", "Range", "Identity", "MatMul", "Softmax",
             "Conv", "Resize", "Reshape", "Gather", "Transpose", "NonZero", "Einsum", "EyeLike", "RandomNormal",
             "Nothing", "", "EPContext", "Concat", "Pad", "QuantizeLinear", "SequenceMap", "Split",
             "OneHot"]  # fmt: skip
    _node(rng, model).op_type = rng.choice(kinds)


def _domain(rng: Random, model: onnx.ModelProto) -> None:
    domains = ["com.microsoft", "hpddrnet", "ai.onnx.ml", "trt", "evil", "ai.onnx.training"]
    _node(rng, model).domain = rng.choice(domains)


def _attribute(rng: Random, model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if nodes:
        entry = rng.choice(rng.choice(nodes).attribute)
        value = rng.choice([*HUGE, 1, 2, 3, 7, 1000])
        if entry.ints:
            entry.ints[rng.randrange(len(entry.ints))] = value
        elif entry.type == onnx.AttributeProto.FLOAT:
            entry.f = rng.choice([float("nan"), float("inf"), 1e30, -1.0])
        else:
            entry.i = value


def _wiring(rng: Random, model: onnx.ModelProto) -> None:
    names = [name for node in model.graph.node for name in [*node.input, *node.output]] or [""]
    node = _node(rng, model)
    side = rng.choice([node.input, node.output])
    action = rng.random()
    if side and action < 0.6:
        side[rng.randrange(len(side))] = rng.choice(names)
    elif side and action < 0.8:
        del side[rng.randrange(len(side))]
    else:
        side.append(rng.choice([*names, ""]))


def _order(rng: Random, model: onnx.ModelProto) -> None:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes if rng.random() < 0.5 else nodes[: len(nodes) // 2])


def _weights(rng: Random, model: onnx.ModelProto) -> None:
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    action = rng.randrange(6)
    if action == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([*HUGE, 7, 1000, 100_000])
    elif action == 1:
        tensor.data_type = rng.randrange(30)
    elif action == 2:
        tensor.raw_data = damaged_bytes(rng, tensor.raw_data)
    elif action == 3:  # its numbers are in another file
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice(["../../etc/passwd", "", "/dev/zero", "\0"]))
    elif action == 4:
        tensor.dims.append(rng.choice([0, 1, 2**40]))
    elif tensor.data_type == TensorProto.INT64:  # shapes, axes
        values = numpy_helper.to_array(tensor).copy()
        values[...] = rng.choice([*HUGE, 3, 1000, 70_000])
        tensor.raw_data = values.tobytes()


def _interface(rng: Random, model: onnx.ModelProto) -> None:
    """The type or shape of an input or output."""
    side = rng.choice([model.graph.input, model.graph.output])
    if not side:
        return
    entry = rng.choice(side)
    kind = entry.type.tensor_type
    action = rng.randrange(5)
    if action == 0:
        kind.elem_type = rng.randrange(25)
    elif action == 1 and kind.shape.dim:
        rng.choice(kind.shape.dim).dim_value = rng.choice([*HUGE, 64, 65])
    elif action == 2:
        kind.shape.dim.add().dim_value = 1
    elif action == 3:
        entry.name = rng.choice(["image", "labels", "logits", "confidence", "x", ""])
    else:
        side.append(onnx.ValueInfoProto.FromString(entry.SerializeToString()))


def _versions(rng: Random, model: onnx.ModelProto) -> None:
    if rng.random() < 0.5:
        model.ir_version = rng.choice([*HUGE, 3, 99])
    elif model.opset_import:
        rng.choice(model.opset_import).version = rng.choice([*HUGE, 1, 7, 13, 99])


def _metadata(rng: Random, model: onnx.ModelProto) -> None:
    """What ONNX Runtime could read its own settings from, and more."""
    entry = model.metadata_props.add()
    entry.key = rng.choice(["ort_config", METADATA_KEY, "", "x"])
    entry.value = rng.choice(['{"session_options": {"intra_op_num_threads": 999999}}', "{}", "x" * 100_000])


_GRAPH_DAMAGES: tuple[Callable[[Random, onnx.ModelProto], None], ...] = (
    _operator, _operator, _domain, _attribute, _attribute, _wiring, _wiring, _order, _weights, _weights, _weights,
    _interface, _versions, _metadata,
)  # fmt: skip


# --- cases


def write_case(kind: str, number: int, seeds: Seeds, folder: Path) -> Path:
    """Write case ``number`` of ``kind`` into ``folder``; returns the model file."""
    rng = Random(f"{kind} {number}")
    source = rng.choice(seeds[kind])
    target = folder / f"case{source.suffix}"
    content = source.read_bytes()
    if source.suffix == ".engine":
        description = sidecar_path(source).read_text(encoding="utf-8").encode()
        if kind == "description" or rng.random() < 0.5:
            description = damaged_description(rng, description.decode())
        else:
            content = damaged_bytes(rng, content)
            if rng.random() < 0.5:  # by someone who knows how to write descriptions
                fields = json.loads(description)
                fields["engine"] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                description = json.dumps(fields).encode()
        sidecar_path(target).write_bytes(description)
    elif kind == "description":
        content = with_description(source, damaged_description(rng, read_manifest(source).to_json()))
    elif kind in ("onnx", "build") and rng.random() < 0.6:
        content = damaged_graph(rng, content)
    else:
        content = damaged_bytes(rng, content)
    target.write_bytes(content)
    return target
