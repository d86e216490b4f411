"""Reading PyTorch's pickle-based files without running anything in them.

A pickle is a program: the standard unpickler imports whatever the file names and calls it. Here a
small interpreter walks the opcodes (as ``pickletools`` decodes them) and *never imports or calls
anything*: a global is only its name, a call is only a record of name and arguments. The few names
that describe tensors and dictionaries are understood; everything else (NumPy scalars, mmengine's
history buffers, ``os.system``) becomes an inert :class:`Record`. Tensor bytes are read separately,
after offsets, sizes and strides were checked against the storage they claim.

Formats: the zip archive written since PyTorch 1.6 (``data.pkl`` + ``data/<key>``) and the older
stream of pickles followed by raw storages, which published mmsegmentation models still use.
"""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from hpddrnet_trt.core.errors import BadInputFile, brief
from hpddrnet_trt.core.files import existing_file

MAX_FILE_BYTES = 4 << 30
MAX_PICKLE_BYTES = 256 << 20
MAX_OPCODES = 5_000_000
ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of PyTorch's older format
_LEGACY_PROTOCOL = 1001

# storage class -> (name of the torch dtype, bytes per element)
_STORAGES = {
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
# What reading damaged bytes raises in zipfile, struct, pickletools and the interpreter below.
_DAMAGE = (
    ValueError, LookupError, TypeError, EOFError, OverflowError, MemoryError, RuntimeError, OSError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Global:
    """The name of a class or function that a file refers to; never resolved."""

    name: str


@dataclass(eq=False, repr=False)
class Record:
    """A call that was *not* made: the name of the callable, its arguments, the state set on it."""

    name: str
    arguments: Any = ()
    state: Any = None

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of ``numel`` elements of a torch dtype, found in the file under ``key``."""

    key: str
    dtype: str
    itemsize: int
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A strided view of a storage; offset and strides in elements, checked to lie inside it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = (self.offset, *self.size, *self.stride)
        if any(type(count) is not int or count < 0 for count in counts) or len(self.size) != len(self.stride):
            raise ValueError("a tensor has an impossible shape")
        if 0 in self.size:
            return
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        # The second test refuses broadcast views, which would unfold to more than the file holds.
        if last >= self.storage.numel or prod(self.size) > self.storage.numel:
            raise ValueError("a tensor reaches beyond its storage")


@dataclass(frozen=True, eq=False)
class TorchFile:
    """Content of a file (plain values, dicts, lists, tuples, :class:`TensorRecord`,
    :class:`Record`, :class:`Global`) and a reader of its storages."""

    path: Path
    content: Any
    size: int
    _read: Callable[[Storage], bytes] = field(repr=False)

    def storage_bytes(self, storage: Storage) -> bytes:
        """The raw little-endian bytes of a storage; raises :class:`BadInputFile` if damaged."""
        try:
            data = self._read(storage)
            if len(data) != storage.numel * storage.itemsize:
                raise ValueError(f"storage {storage.key} has {len(data)} bytes for {storage.numel} elements")
        except _DAMAGE as exc:
            raise _damaged(self.path, exc) from exc
        return data


def read_torch_file(path: str | Path) -> TorchFile:
    """Read a file written by ``torch.save`` and run nothing of it.

    Raises :class:`BadInputFile` when the file is missing, too large, damaged or in another format.
    """
    path = existing_file(path, "checkpoint")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise BadInputFile(f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB, too large for a checkpoint")
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise BadInputFile(f"{path} cannot be read ({exc.strerror}); check its permissions") from exc
    reader = _read_zip if data.startswith(ZIP_MAGIC) else _read_legacy if data.startswith(b"\x80") else None
    if reader is None:
        raise BadInputFile(
            f"{path} is not a PyTorch checkpoint (neither a zip archive nor a pickle); "
            "give the .pth file that training wrote, or save it again with PyTorch 1.6 or newer"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in damaged text
            content, read = reader(data)
    except _DAMAGE as exc:
        raise _damaged(path, exc) from exc
    return TorchFile(path, content, len(data), read)


def _damaged(path: Path, cause: BaseException) -> BadInputFile:
    reason = brief(cause).strip("'\"") or type(cause).__name__
    return BadInputFile(f"{path} is damaged, truncated or no PyTorch checkpoint ({reason}); copy or download it again")


def _read_zip(data: bytes) -> tuple[Any, Callable[[Storage], bytes]]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it holds compressed records, which PyTorch never writes")
    if sum(entry.file_size for entry in entries) > len(data):
        raise ValueError("its records claim more bytes than the file has")
    roots = [entry.filename[: -len("data.pkl")] for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it is a zip archive without the one data.pkl of a PyTorch file")
    names = {entry.filename for entry in entries}
    if f"{roots[0]}byteorder" in names and archive.read(f"{roots[0]}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    content = _Interpreter().run(io.BytesIO(archive.read(f"{roots[0]}data.pkl")))
    return content, lambda storage: archive.read(f"{roots[0]}data/{storage.key}")


def _read_legacy(data: bytes) -> tuple[Any, Callable[[Storage], bytes]]:
    stream = io.BytesIO(data)
    if _Interpreter().run(stream) != _LEGACY_MAGIC or _Interpreter().run(stream) != _LEGACY_PROTOCOL:
        raise ValueError("it is a pickle, but not of PyTorch's format; save it again with PyTorch 1.6 or newer")
    system = _Interpreter().run(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine")
    interpreter = _Interpreter()
    content = interpreter.run(stream)
    spans: dict[str, tuple[int, int]] = {}
    for key in _Interpreter().run(stream):
        storage = interpreter.storages[key]
        (numel,) = struct.unpack("<q", stream.read(8))
        if numel != storage.numel:
            raise ValueError(f"storage {key} has {numel} elements instead of {storage.numel}")
        spans[key] = (stream.tell(), numel * storage.itemsize)
        stream.seek(numel * storage.itemsize, io.SEEK_CUR)
    return content, lambda storage: data[spans[storage.key][0] : sum(spans[storage.key])]


class _Interpreter:
    """Stack machine for one pickle. Calls nothing: see the module docstring."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # stacks set aside by MARK
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Interpret up to STOP; the stream is left behind it."""
        start = stream.tell()
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES or (position or 0) - start > MAX_PICKLE_BYTES:
                raise ValueError("its pickle is too large")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _VALUES:
                self.stack.append(argument)
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, argument)
            else:
                raise ValueError(f"its pickle uses {opcode.name}, which PyTorch never writes")
        raise EOFError("its pickle has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_last(self, count: int) -> list[Any]:
        """The last ``count`` items, in the order they were pushed."""
        if len(self.stack) < count:
            raise ValueError("its pickle takes more than it has stored")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_mark(self) -> list[Any]:
        """Everything above the last MARK."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop(self, _: Any) -> None:
        """POP takes the last item, or the MARK when nothing lies above it."""
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def drop_mark(self, _: Any) -> None:
        self.pop_mark()

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):  # an inert record takes nothing
            self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_plain_items(items))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a class name is not text")
        self.stack.append(Global(f"{module}.{name}"))

    def call(self, _: Any) -> None:
        """REDUCE and NEWOBJ: recognise tensors and dictionaries, record anything else."""
        arguments, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, Global | Record) else type(function).__name__
        build = _KNOWN.get(name) if isinstance(function, Global) and isinstance(arguments, tuple) else None
        self.stack.append(build(*arguments) if build is not None else Record(name, arguments))

    def call_with_keywords(self, _: Any) -> None:
        keywords = self.stack.pop()
        self.stack[-1] = (self.stack[-1], keywords)
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(Record(getattr(function, "name", "object"), arguments))

    def call_marked(self, name: str | None) -> None:
        """INST (the name is in the opcode) and OBJ (the class is the first item)."""
        items = self.pop_mark()
        if name is None:
            name = getattr(items.pop(0), "name", "object")
        self.stack.append(Record(name.replace(" ", "."), tuple(items)))

    def set_state(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def storage(self, _: Any) -> None:
        """BINPERSID: ``("storage", class, key, device, elements[, view])``."""
        kind, storage_class, key, _device, numel, *view = self.stack.pop()
        name = storage_class.name if isinstance(storage_class, Global) else ""
        dtype = _STORAGES.get(name.removeprefix("torch."))
        if kind != "storage" or dtype is None or type(key) is not str or type(numel) is not int or numel < 0:
            raise ValueError(f"it refers to a storage of unknown kind {name or kind!r}"[:200])
        if view not in ([], [None]):
            raise ValueError("it holds views of storages, which PyTorch no longer writes")
        self.storages[key] = Storage(key, *dtype, numel)
        self.stack.append(self.storages[key])


def _plain_items(items: list[Any]) -> dict[Any, Any]:
    # Keys of other types are left out: nothing here needs them, and hashing nested tuples can be
    # made to take for ever.
    pairs = zip(items[::2], items[1::2], strict=True)
    return {key: value for key, value in pairs if key is None or isinstance(key, str | int | float | bytes)}


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    items = [part for pair in pairs for part in pair] if isinstance(pairs, list | tuple) else []
    return _plain_items(items)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRecord:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    return TensorRecord(storage, offset, tuple(size), tuple(stride))


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": lambda *_: {},
    "torch.Size": lambda size=(): tuple(size),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
}

# Opcodes whose decoded argument is the value itself.
_VALUES = frozenset(
    ["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
     "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
     "BINBYTES8", "BYTEARRAY8"]
)  # fmt: skip
_ACTIONS: dict[str, Callable[[_Interpreter, Any], None]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "MARK": _Interpreter.mark,
    "POP": _Interpreter.pop,
    "POP_MARK": _Interpreter.drop_mark,
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "PUT": _Interpreter.memoize,
    "BINPUT": _Interpreter.memoize,
    "LONG_BINPUT": _Interpreter.memoize,
    "MEMOIZE": _Interpreter.memoize,
    "GET": lambda m, index: m.push(m.memo[index]),
    "BINGET": lambda m, index: m.push(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.push(m.memo[index]),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_SET": lambda m, _: m.push([]),  # sets are kept as lists: order is all that differs here
    "TUPLE1": lambda m, _: m.push(tuple(m.pop_last(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop_last(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop_last(3))),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "FROZENSET": lambda m, _: m.push(m.pop_mark()),
    "DICT": lambda m, _: m.push(_plain_items(m.pop_mark())),
    "APPEND": lambda m, _: m.append(m.pop_last(1)),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.append(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop_last(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": lambda m, name: m.push(Global(name.replace(" ", "."))),
    "STACK_GLOBAL": _Interpreter.stack_global,
    "REDUCE": _Interpreter.call,
    "NEWOBJ": _Interpreter.call,
    "NEWOBJ_EX": _Interpreter.call_with_keywords,
    "INST": _Interpreter.call_marked,
    "OBJ": _Interpreter.call_marked,
    "BUILD": _Interpreter.set_state,
    "BINPERSID": _Interpreter.storage,
}
