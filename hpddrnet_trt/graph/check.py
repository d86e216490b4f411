"""What an ONNX file must not hold, looked up once, where the file enters.

A model file is data: it names no other files to read, calls nothing outside the ONNX operators, ends
by itself, and holds the numbers that it says it holds. None of our exports needs more. Runtimes rely on
some of this without a check: OpenVINO 2026.4 does not come back from a graph with a circle, counts down
from any operator version, and crashes where a constant does not fit the memory or an operator lacks an
input; TensorRT-RTX 1.7 divides by a block size of 0 or 2^62 and crashes where a shape is no whole numbers.

Whoever opens a file calls :func:`check_onnx`; a file that this process has checked, or written itself
(:func:`trust`), is not looked at again.

Why not the onnx package for all of it: its import and its parser cost a start on ONNX Runtime 0.08 s of
0.7 s of processor time, this reader 0.04 s. The layout is that of onnx.proto
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); contents of tensors are passed over. How much
memory and time a graph of permitted operators takes when it runs is not limited here.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, get_args

from hpddrnet_trt.core.errors import BadInputFile, UserError, one_line, require
from hpddrnet_trt.core.protobuf import ProtobufField, protobuf_fields
from hpddrnet_trt.graph.attention import expanded

if TYPE_CHECKING:
    import onnx

MAX_GRAPH_DEPTH = 8  # graphs inside operators inside graphs
MAX_NODES = 100_000  # with functions written out; the largest of ours has some 500
MAX_FUNCTIONS = 256
MAX_FIELDS = 2_000_000  # of all messages; the largest of ours have some 10 000
MAX_OPSET = 1000
MAX_TEXT = 4096  # bytes of a name or a shape
MAX_MADE = 1 << 31  # numbers that one operator makes of a constant shape
MAX_SETTING = 1 << 31  # of an operator's whole-number attributes
POSITIVE = {"blocksize", "dilations", "group", "kernel_shape", "num_groups", "num_outputs", "strides"}  # attributes
# Loop runs as often as a number in the file says. EPContext names a compiled program, often in another file.
REFUSED = {
    "Loop": "it has a loop, which need not end",
    "EPContext": "it refers to a compiled program of an execution provider",
}
_SHAPED_BY = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Resize": 3}  # input with the shape of the result
_EXTERNAL = 1  # TensorProto.data_location
_INT64 = 7  # TensorProto.data_type

Depth = Literal["structure", "operators", "types"]
Name = tuple[str, str]  # of an operator or function: its domain, and its name there
Calls = Counter[Name]  # how often a graph, or the body of a function, calls each
Numbers = list[int] | None  # those in a tensor, where they are constant whole ones, and few
Scope = ChainMap[str, Numbers]  # tensors made so far, in a graph and in those around it

_DEPTHS: tuple[str, ...] = get_args(Depth)
_known: dict[tuple[int, ...], int] = {}  # identity of a file: how deep it was checked


def check_onnx(path: Path, depth: Depth = "structure") -> None:
    """Raise :class:`BadInputFile` in one sentence for what this page's first paragraph excludes.

    ``operators``: also for operators without the inputs and attributes that ONNX asks for, by the onnx package's
    own checker (20 ms to 130 ms); ``types``: also for inputs of types and shapes that do not go together.
    """
    wanted = _DEPTHS.index(depth)
    try:
        identity = _identity(path)
        done = _known.get(identity, -1)
        if done < 0:
            with path.open("rb") as stream:
                _Reader(stream).model(path.stat().st_size)
    except ValueError as exc:
        raise BadInputFile(f"{path} is refused: {exc}; export it again with this package") from exc
    except OSError as exc:
        raise BadInputFile(f"{path} cannot be read ({exc.strerror}); check its permissions and the disk") from exc
    if done < wanted and wanted > 0:
        library = require("onnx", "export", "check ONNX files")
        try:
            library.checker.check_model(str(path), full_check=depth == "types")
        except Exception as exc:  # its own error, or one of protobuf, whose classes differ between versions
            raise BadInputFile(f"{path} is refused: {one_line(exc)}; export it again with this package") from exc
    _known[identity] = max(done, wanted)


def trust(path: Path) -> None:
    """Note that this process has just written ``path``, from a graph that it has made or checked."""
    _known[_identity(path)] = len(_DEPTHS)


def _identity(path: Path) -> tuple[int, ...]:
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def load_checked(path: Path, depth: Depth = "structure") -> onnx.ModelProto:
    """The graph of a file, after :func:`check_onnx`; raises :class:`BadInputFile`."""
    check_onnx(path, depth)
    library = require("onnx", "export", "read ONNX files")
    try:
        model: onnx.ModelProto = library.load(str(path), load_external_data=False)
        return model
    except Exception as exc:  # protobuf's own error classes differ between its versions
        raise _damaged(path, exc) from exc


def _damaged(path: Path, exc: Exception) -> BadInputFile:
    return BadInputFile(f"{path} is damaged or no ONNX file of this package ({one_line(exc)}); export it again")


def rewritten(path: Path, change: Callable[[onnx.ModelProto], onnx.ModelProto | None]) -> bytes | None:
    """The file's graph, functions written out, after ``change``; None where that changes nothing.

    Raises :class:`BadInputFile` where the graph is not what ``change`` understands.
    """
    try:
        model = load_checked(path)
        plain = expanded(model) if model.functions else model
        changed = change(plain)
        if changed is None:
            return bytes(plain.SerializeToString()) if model.functions else None
        return bytes(changed.SerializeToString())
    except UserError:
        raise
    except Exception as exc:  # whatever a pass stumbles over
        raise _damaged(path, exc) from exc


# ------------------------------------------------------------------------------- the reader


class _Reader:
    """Walks the messages of one file. Its methods raise :class:`ValueError` that says what is wrong."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._seen = 0

    def model(self, size: int) -> None:
        calls: Calls = Counter()
        functions: dict[Name, Calls] = {}
        for part in self._fields(ProtobufField(0, 2, 0, size)):
            if part.number == 7:
                self._graph(part, calls, MAX_GRAPH_DEPTH, ChainMap({}))
            elif part.number == 25:
                name, body = self._function(part)
                if name in functions:
                    raise ValueError(f"it defines the function {name[1][:100]!r} twice")
                functions[name] = body
                if len(functions) > MAX_FUNCTIONS:
                    raise ValueError(f"it defines more than {MAX_FUNCTIONS} functions")
            elif part.number == 8:
                self._opset(part)
            elif part.number == 20:
                raise ValueError("it holds instructions for training")
        nodes = _written_out(calls, functions)
        if nodes > MAX_NODES:
            raise ValueError(f"its functions, written out, have {nodes} operators, more than {MAX_NODES}")

    def _graph(self, graph: ProtobufField, calls: Calls, depth: int, outer: Scope) -> None:
        if depth == 0:
            raise ValueError(f"its graphs lie more than {MAX_GRAPH_DEPTH} deep in each other")
        scope = outer.new_child({"": None})  # an input that is left out
        for part in self._fields(graph):  # weights come after the operators that read them
            if part.number == 5:
                name, numbers = self._tensor(part)
                scope[name] = numbers
            elif part.number == 11:
                scope[self._texts(part, 1)[0]] = None
            elif part.number == 12:
                self._texts(part, 1)
            elif part.number == 15:
                raise ValueError("it holds sparse tensors, which may become of any size")
        for part in self._fields(graph):
            if part.number == 1:
                self._node(part, calls, depth, scope)

    def _function(self, function: ProtobufField) -> tuple[Name, Calls]:
        calls: Calls = Counter()
        scope: Scope = ChainMap(dict.fromkeys(["", *self._texts(function, 4)]))
        for part in self._fields(function):
            if part.number == 7:
                self._node(part, calls, MAX_GRAPH_DEPTH, scope)
            elif part.number == 9:
                self._opset(part)
            elif part.number == 11:
                self._attribute(part, calls, MAX_GRAPH_DEPTH, scope)
        return _name(self._texts(function, 10), self._texts(function, 1)), calls

    def _opset(self, opset: ProtobufField) -> None:
        for part in self._fields(opset):
            if part.number == 2 and part.value > MAX_OPSET:
                raise ValueError(f"it asks for version {part.value} of ONNX's operators")

    def _node(self, node: ProtobufField, calls: Calls, depth: int, scope: Scope) -> None:
        texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: [], 7: []}
        constant: Numbers = None
        for part in self._fields(node):
            if part.number in texts:
                texts[part.number].append(self._text(part))
            elif part.number == 5:
                constant = self._attribute(part, calls, depth, scope)
        domain, operator = _name(texts[7], texts[4])
        if operator in REFUSED:
            raise ValueError(REFUSED[operator])
        if unmade := next((name for name in texts[1] if name not in scope), None):
            raise ValueError(f"an operator reads {unmade[:100]!r}, which no operator before it makes")
        place = _SHAPED_BY.get(operator)
        if place is not None and place < len(texts[1]):
            made = prod(max(abs(size), 1) for size in scope[texts[1][place]] or [])
            if made > MAX_MADE:
                raise ValueError(f"an operator {operator} makes {made:.1e} numbers of a shape in the file")
        for name in texts[2]:
            if name and name in scope.maps[0]:
                raise ValueError(f"the tensor {name[:100]!r} is made twice")
            scope[name] = constant if operator == "Constant" else None
        calls[domain, operator] += 1

    def _attribute(self, attribute: ProtobufField, calls: Calls, depth: int, scope: Scope) -> Numbers:
        """Whole numbers that it holds, where they are few."""
        held: Numbers = None
        setting = self._texts(attribute, 1)[-1]
        lowest, given = (1 if setting in POSITIVE else -MAX_SETTING), False
        for part in self._fields(attribute):
            if part.number in (5, 10):
                _, held = self._tensor(part)
            elif part.number in (6, 11):
                self._graph(part, calls, depth - 1, scope)
            elif part.number in (3, 8):
                numbers, given = self._numbers(part), True
                wrong = [value for value in numbers if not lowest <= value <= MAX_SETTING]
                if wrong:
                    raise ValueError(f"{setting[:100]!r} of an operator is {wrong[0]}")
                held = [*(held or []), *numbers] if part.number == 8 else held
            elif part.number == 21:  # refers to one of the function that it is in
                given = True
            elif part.number in (22, 23):
                raise ValueError("it holds sparse tensors, which may become of any size")
        if lowest == 1 and not given:  # which counts as 0
            raise ValueError(f"{setting!r} of an operator has no value")
        return held

    def _tensor(self, tensor: ProtobufField) -> tuple[str, Numbers]:
        """Its name, and its numbers where they are whole and few."""
        elements, kind, name = 1, 0, ""
        numbers: Numbers = None
        for part in self._fields(tensor):
            if part.number == 13 or (part.number == 14 and part.value == _EXTERNAL):
                raise ValueError("some of its numbers are in another file")
            if part.number == 1:
                for size in self._numbers(part):
                    if size < 0:
                        raise ValueError("a tensor has a negative size")
                    elements = min(elements * size, 1 << 63)
            elif part.number == 2:
                kind = part.value
            elif part.number == 8:
                name = self._text(part)
            elif part.number == 7 and part.end - part.start <= MAX_TEXT:
                numbers = [*(numbers or []), *self._numbers(part)]
            elif part.number == 9 and part.end - part.start <= MAX_TEXT:
                raw = self._bytes(part)
                places = range(0, len(raw) - 7, 8)
                numbers = [int.from_bytes(raw[at : at + 8], "little", signed=True) for at in places]
        # The smallest numbers are half a byte.
        if elements > 2 * (tensor.end - tensor.start):
            raise ValueError(f"a tensor of {tensor.end - tensor.start} bytes is said to hold {elements} numbers")
        return name, numbers if kind == _INT64 else None

    def _numbers(self, part: ProtobufField) -> list[int]:
        """One number, or several in a row ("packed"), of 64 bits with sign."""
        numbers = []
        if part.wire != 2:
            numbers = [part.value]
        else:
            value, shift = 0, 0
            for byte in self._bytes(part):
                value |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    numbers.append(value)
                    value, shift = 0, 0
        return [value - (1 << 64) if value >= 1 << 63 else value for value in numbers]

    def _texts(self, message: ProtobufField, number: int) -> list[str]:
        """The texts in the fields of that number; at least one, which may be empty."""
        return [self._text(part) for part in self._fields(message) if part.number == number] or [""]

    def _text(self, part: ProtobufField) -> str:
        return self._bytes(part).decode("utf-8")

    def _bytes(self, part: ProtobufField) -> bytes:
        if part.end - part.start > MAX_TEXT:
            raise ValueError(f"it has a name or a shape of {part.end - part.start} bytes")
        return part.read(self._stream, MAX_TEXT)

    def _fields(self, message: ProtobufField) -> Iterator[ProtobufField]:
        if message.wire != 2:
            raise ValueError("it is damaged or another kind of file")
        for part in protobuf_fields(self._stream, message.start, message.end):
            self._seen += 1
            if self._seen > MAX_FIELDS:
                raise ValueError(f"it has more than {MAX_FIELDS} entries")
            yield part


def _name(domains: list[str], names: list[str]) -> Name:
    """What protobuf takes of a field that is there twice: the last one."""
    domain = domains[-1] if domains else ""
    return ("" if domain == "ai.onnx" else domain), (names[-1] if names else "")


def _written_out(graph: Calls, functions: dict[Name, Calls]) -> int:
    """Number of operators when every call of a function is replaced by its body; functions must not call themselves."""
    running: set[Name] = set()

    @cache
    def size(name: Name) -> int:
        if name not in functions:
            return 1
        if name in running:
            raise ValueError(f"its function {name[1][:100]!r} calls itself")
        running.add(name)
        total = sum(count * size(called) for called, count in functions[name].items())
        running.remove(name)
        return total

    return sum(count * size(called) for called, count in graph.items())
