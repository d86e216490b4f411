"""Foreign files are read and never run, whatever is in them."""

from __future__ import annotations

import builtins
import collections
import contextlib
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.models import unpickle
from hpddrnet_trt.models.unpickle import Global, Record, TensorRecord, TorchFile, read_torch_file


def as_zip(data_pkl: bytes, storages: dict[str, bytes] | None = None, byteorder: str = "little") -> bytes:
    """A file as torch.save writes it, around a pickle of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return buffer.getvalue()


def read(tmp_path: Path, content: bytes) -> TorchFile:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    return read_torch_file(path)


def numbers(file: TorchFile, record: TensorRecord) -> np.ndarray:
    flat = np.frombuffer(file.storage_bytes(record.storage), record.storage.dtype)
    strides = [step * flat.itemsize for step in record.stride]
    return np.lib.stride_tricks.as_strided(flat[record.offset :], record.size, strides)


@pytest.mark.parametrize("new_format", [True, False])
def test_tensors_of_every_type(tmp_path: Path, new_format: bool) -> None:
    """Slices, transposes, shared storages, empty and zero-dimensional tensors, all dtypes."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = [torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    saved: dict[str, Any] = {f"as {kind}": base.to(kind) for kind in kinds}
    saved |= {"base": base, "slice": base[1:3, 2:], "transposed": base.T, "scalar": torch.tensor(3.5)}
    saved |= {"empty": torch.empty(0, 3), "parameter": torch.nn.Parameter(base), "number": 3, "text": "é"}
    saved["nested"] = collections.OrderedDict([("list", [1, (2.5, None, True)]), ("bytes", b"\x00\xff")])
    torch.save(saved, tmp_path / "t.pth", _use_new_zipfile_serialization=new_format)
    file = read_torch_file(tmp_path / "t.pth")
    assert list(file.content) == list(saved)
    for key, value in saved.items():
        if isinstance(value, torch.Tensor):
            expected = value.detach().numpy()
            if value.numel():
                np.testing.assert_array_equal(numbers(file, file.content[key]), expected)
            assert file.content[key].size == expected.shape
    assert file.content["nested"]["list"] == [1, (2.5, None, True)]
    assert (file.content["number"], file.content["text"]) == (3, "é")
    # Pickle protocol 2 writes bytes as a call (of an encoder), and calls are not made.
    assert isinstance(file.content["nested"]["bytes"], Record)


class Reduces:
    """Pickles into a call of ``function`` with ``arguments``, then ``extra``: state, list items, dict items."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], *extra: Any) -> None:
        self.recipe = (function, arguments, *extra)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.recipe


class Innocent:
    """A class with an ordinary state."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class DictWith(dict):  # type: ignore[type-arg]
    """A dictionary subclass: built with NEWOBJ and filled with SETITEMS."""


def attacks(marker: str) -> dict[str, Any]:
    """Objects whose ordinary unpickling creates the folder ``marker``."""
    call = Reduces(os.mkdir, (marker,))
    source = f"__import__('os').mkdir({marker!r})"
    return {
        "os.mkdir": call,
        "os.system": Reduces(os.system, (f"mkdir {marker}",)),
        "subprocess": Reduces(subprocess.check_call, (["mkdir", marker],)),
        "eval": Reduces(builtins.eval, (source,)),
        "exec": Reduces(builtins.exec, (source,)),
        "in a list": [1, [2, (call,)]],
        "among weights": {"state_dict": {"backbone.stem.0.conv.weight": call}},
        "beside weights": {"state_dict": {"w": 1.0}, "meta": call},
        "as an argument": Reduces(Innocent, (call,)),
        "in a state": Reduces(Innocent, (), {"a": call}),
        "as a state": Reduces(Innocent, (), call),
        "dict subclass": DictWith({"a": call}),
        "as list items": Reduces(list, (), None, iter([call])),
        "as dict items": Reduces(dict, (), None, None, iter([("key", call)])),
        "as a dict key": Reduces(dict, (), None, None, iter([((1, call), "value")])),
        "attribute chain": Reduces(eval, ("getattr(__import__('os'), 'mkdir')(" + repr(marker) + ")",)),
        "map": Reduces(list, (Reduces(map, (os.mkdir, [marker])),)),
        "ordered dict": collections.OrderedDict(a=call),
        "extended": [collections.OrderedDict(), torch.Size([1]), call],
    }


def hand_made(marker: str) -> dict[str, bytes]:
    """Opcodes that ``pickle.dumps`` does not write."""
    name = b"S'" + marker.encode() + b"'\n"
    text = b"\x8c" + bytes([len(marker)]) + marker.encode()
    return {
        "INST": b"(" + name + b"ios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\n" + name + b"o.",
        "REDUCE of getattr": b"cbuiltins\ngetattr\n(cos\nsys\nS'modules'\ntR0cos\nmkdir\n(" + name + b"tR.",
        "REDUCE of a result": b"cfunctools\npartial\n(cos\nmkdir\n" + name + b"tR(tR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text + b"\x85R.",
        "dotted name": b"\x80\x04\x8c\x07pathlib\x8c\x08os.mkdir\x93" + text + b"\x85R.",
        "after a memo": b"cos\nmkdir\nq\x010h\x01(" + name + b"tR.",
        "in an item of a record": b"ccollections\nUserDict\n)RS'k'\ncos\nmkdir\n(" + name + b"tRs.",
        "keyword arguments": b"\x80\x04cpathlib\nPath\n)}\x920cos\nmkdir\n(" + name + b"tR.",
    }


ALL = [*attacks(""), *hand_made("")]


def pickled_attack(name: str, marker: str, protocol: int) -> bytes:
    return hand_made(marker)[name] if name in hand_made(marker) else pickle.dumps(attacks(marker)[name], protocol)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ALL)
def test_nothing_is_executed(tmp_path: Path, name: str, protocol: int) -> None:
    marker = tmp_path / "m"
    attack = pickled_attack(name, str(marker), protocol)
    with contextlib.suppress(Exception):  # it may fail after the harm is done
        pickle.loads(attack)
    assert marker.exists()  # the attack is real
    marker.rmdir()
    for content in (as_zip(attack), legacy(attack), legacy(pickle.dumps(1), head=attack), attack):
        with contextlib.suppress(BadInputFile):
            read(tmp_path, content)
        assert not marker.exists()


def test_nothing_is_imported(tmp_path: Path) -> None:
    """Importing a module runs it, too."""
    (tmp_path / "hpddrnet_bait.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        file = read(tmp_path, as_zip(b"chpddrnet_bait\nThing\n(K\x01tR}S'a'\nK\x02sb."))
    finally:
        sys.path.remove(str(tmp_path))
    record = file.content
    assert (record.name, record.arguments, record.state) == ("hpddrnet_bait.Thing", (1,), {"a": 2})
    assert repr(record) == "<inert hpddrnet_bait.Thing>"
    assert not callable(record)
    assert not callable(Global("os.system"))


def test_foreign_objects_are_inert(tmp_path: Path) -> None:
    """NumPy scalars and arrays, as in mmengine's message hub, keep their place and nothing else."""
    content = {"scalar": np.float64(2.5), "array": np.arange(3), "path": Path("a"), "set": {1, 2}, "weights": [1.5]}
    file = read(tmp_path, as_zip(pickle.dumps(content, 2)))
    assert all(isinstance(file.content[key], Record) for key in ("scalar", "array", "path"))
    assert file.content["scalar"].name.endswith("multiarray.scalar")
    assert file.content["weights"] == [1.5]


SYSTEM = {"little_endian": True, "protocol_version": 1001}


def legacy(pickled: bytes, head: bytes | None = None) -> bytes:
    """A file as torch.save wrote it before PyTorch 1.6."""
    heads = [0x1950A86A20F9469CFC6C, 1001, SYSTEM]
    start = [pickle.dumps(value, 2) for value in heads]
    if head is not None:
        start[0] = head
    return b"".join(start) + pickled + pickle.dumps([], 2)


# --- Files that lie


def tensor_pickle(
    numel: Any = 4,
    offset: Any = 0,
    size: Any = (2, 2),
    stride: Any = (2, 1),
    kind: str = "FloatStorage",
    key: Any = "0",
) -> bytes:
    """A pickle of one tensor with any claims."""
    parts = [pickle.dumps(part, 2)[2:-1] for part in ("storage", key, "cpu", numel, offset, size, stride)]
    tag, key_, device, numel_, offset_, size_, stride_ = parts
    storage = b"(" + tag + b"ctorch\n" + kind.encode() + b"\n" + key_ + device + numel_ + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset_ + size_ + stride_ + hooks + b"tR."


def test_the_lying_tensor_can_tell_the_truth(tmp_path: Path) -> None:
    file = read(tmp_path, as_zip(tensor_pickle(), {"0": struct.pack("<4f", 1, 2, 3, 4)}))
    assert numbers(file, file.content).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "claims",
    [
        {"size": (3, 2)},
        {"offset": 1},
        {"offset": -1},
        {"stride": (3, 1)},
        {"stride": (-2, 1)},
        {"size": (2, -2)},
        {"size": (2, 2, 2)},
        {"size": (1 << 40, 1 << 40), "stride": (0, 0)},
        {"size": (2.0, 2)},
        {"size": (True, 2)},
        {"size": 4},
        {"numel": -4},
        {"numel": "4"},
        {"key": 0},
        {"kind": "QInt8Storage"},
        {"kind": "nn.Module"},
    ],
    ids=str,
)
def test_lying_tensors(tmp_path: Path, claims: dict[str, Any]) -> None:
    with pytest.raises(BadInputFile, match=r"file\.pth is damaged, truncated or no PyTorch checkpoint \("):
        read(tmp_path, as_zip(tensor_pickle(**claims), {"0": bytes(16)}))


@pytest.mark.parametrize("storages", [{}, {"0": bytes(12)}, {"0": bytes(20)}, {"1": bytes(16)}], ids=str)
def test_lying_storages(tmp_path: Path, storages: dict[str, bytes]) -> None:
    file = read(tmp_path, as_zip(tensor_pickle(), storages))
    with pytest.raises(BadInputFile, match="damaged"):
        file.storage_bytes(file.content.storage)


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"\x80\x02r\xff\xff\xff\xff.", "list index"),  # memo slot four thousand million
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "expected"),  # bytes of 2**63
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "expected|not enough"),  # integer of 2**31 bytes
        (b"\x80\x02K\x01", "exhausted"),  # no STOP
        (b"\x80\x02.", "pop from empty"),
        (b"\x80\x02t.", "pop from empty"),
        (b"\x80\x02\x86.", "takes more than it has"),
        (b"\x80\x02h\x07.", "7"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02Pkey\n.", "PERSID"),
        (b"\x80\x02}K\x01Q.", "unpack|storage"),
        (b"\x80\x02(K\x01K\x02K\x03d.", "zip"),  # a dictionary with a key too many
        (b"\xfe.", "opcode"),
        (b"\x80\x04K\x01K\x02\x93.", "class name is not text"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR.", "has no storage"),
        (b"", "exhausted"),
    ],
)
def test_broken_pickles(tmp_path: Path, pickled: bytes, reason: str) -> None:
    with pytest.raises(BadInputFile, match=reason):
        read(tmp_path, as_zip(pickled))


def test_too_many_opcodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 100)
    with pytest.raises(BadInputFile, match="too large"):
        read(tmp_path, as_zip(b"\x80\x02" + b"]" * 200 + b"."))


def test_deep_and_branching_content(tmp_path: Path) -> None:
    """Nesting beyond Python's own limits, and a small pickle that unfolds to 2**60 items, are harmless."""
    deep = read(tmp_path, as_zip(b"\x80\x02" + b")" + b"\x85" * 100_000 + b"."))
    assert isinstance(deep.content, tuple)
    doubled = b"\x80\x02)" + b"2\x86" * 60
    assert len(read(tmp_path, as_zip(doubled + b".")).content) == 2
    as_key = b"\x80\x02}" + doubled[2:] + b"K\x01s."  # hashing this key would never end
    assert read(tmp_path, as_zip(as_key)).content == {}


def test_compressed_and_overlapping_archives(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(BadInputFile, match="compressed records"):
        read(tmp_path, buffer.getvalue())
    # Many directory entries for the same bytes: add up to more than the file.
    content = bytearray(as_zip(tensor_pickle(), {str(index): bytes(1000) for index in range(4)}))
    directory = zipfile.ZipFile(io.BytesIO(bytes(content))).start_dir
    for entry in range(4):
        place = content.index(b"archive/data/%d" % entry, directory) - 46
        content[place + 20 : place + 28] = struct.pack("<II", 9000, 9000)
    with pytest.raises(BadInputFile, match="claim more bytes"):
        read(tmp_path, bytes(content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a PyTorch checkpoint"),
        (b"hello", "not a PyTorch checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a PyTorch checkpoint"),
        (b"storages\x00" + bytes(600), "not a PyTorch checkpoint"),  # tar, PyTorch 0.1
        (pickle.dumps({"a": 1}, 2), "not of PyTorch's format"),
        (b"PK\x03\x04" + bytes(50), "damaged"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(BadInputFile, match=reason):
        read(tmp_path, content)


def test_other_archives(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "text")
    with pytest.raises(BadInputFile, match=r"without the one data\.pkl"):
        read(tmp_path, buffer.getvalue())
    two = as_zip(tensor_pickle(), {"x/data.pkl": b""})
    with pytest.raises(BadInputFile, match=r"without the one data\.pkl"):
        read(tmp_path, two)


def test_big_endian_files(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="big-endian"):
        read(tmp_path, as_zip(tensor_pickle(), {"0": bytes(16)}, byteorder="big"))
    little, big = pickle.dumps({"little_endian": True}, 2), pickle.dumps({"little_endian": False}, 2)
    old = legacy(pickle.dumps(1)).replace(pickle.dumps(SYSTEM, 2), big)
    with pytest.raises(BadInputFile, match="big-endian"):
        read(tmp_path, old)
    assert read(tmp_path, old.replace(big, little)).content == 1


def test_lying_storages_of_the_older_format(tmp_path: Path) -> None:
    keys = pickle.dumps(["0"], 2)
    content = legacy(tensor_pickle()).removesuffix(pickle.dumps([], 2)) + keys
    good = read(tmp_path, content + struct.pack("<q4f", 4, 1, 2, 3, 4))
    assert numbers(good, good.content).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(BadInputFile, match="storage 0 has 5 elements instead of 4"):
        read(tmp_path, content + struct.pack("<q5f", 5, 1, 2, 3, 4, 5))
    short = read(tmp_path, content + struct.pack("<q3f", 4, 1, 2, 3))
    with pytest.raises(BadInputFile, match="storage 0 has 12 bytes for 4 elements"):
        short.storage_bytes(short.content.storage)
    view = pickle.dumps(("storage", None, "0", "cpu", 4, ("0", 0, 2)), 2)[2:-1]
    view = view.replace(b"N", b"ctorch\nFloatStorage\n", 1)
    with pytest.raises(BadInputFile, match="views of storages"):
        read(tmp_path, as_zip(b"\x80\x02" + view + b"Q."))


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (tmp_path / "file.pth").touch()
    with pytest.raises(BadInputFile, match=r"file\.pth cannot be read \(Permission denied\)"):
        read_torch_file(tmp_path / "file.pth")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="does not exist"):
        read_torch_file(tmp_path / "none.pth")
    with pytest.raises(BadInputFile, match="is not a file"):
        read_torch_file(tmp_path)


def test_too_large_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MAX_FILE_BYTES", 1 << 10)
    with pytest.raises(BadInputFile, match="too large for a checkpoint"):
        read(tmp_path, as_zip(tensor_pickle(), {"0": bytes(2000)}))


# --- Damaged files: success or one readable error, nothing else


def saved(new_format: bool) -> bytes:
    buffer = io.BytesIO()
    weights = {"w": torch.ones(3, 2), "b": torch.ones(2)}
    content = {"meta": {"a": [1, (2, None)], "n": np.float64(1)}, "state_dict": weights}
    torch.save(content, buffer, _use_new_zipfile_serialization=new_format)
    return buffer.getvalue()


INTACT = {new_format: saved(new_format) for new_format in (True, False)}


def read_everything(path: Path) -> None:
    file = read_torch_file(path)
    state = file.content.get("state_dict") if isinstance(file.content, dict) else None
    for record in state.values() if isinstance(state, dict) else []:
        if isinstance(record, TensorRecord):
            numbers(file, record)


@settings(max_examples=300, deadline=None)
@given(new_format=st.booleans(), data=st.data())
def test_flipped_bits(tmp_path_factory: pytest.TempPathFactory, new_format: bool, data: st.DataObject) -> None:
    content = bytearray(INTACT[new_format])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "flipped.pth"
    path.write_bytes(content)
    with contextlib.suppress(BadInputFile):
        read_everything(path)


@settings(max_examples=100, deadline=None)
@given(new_format=st.booleans(), share=st.floats(0, 1, exclude_max=True))
def test_truncated_files(tmp_path_factory: pytest.TempPathFactory, new_format: bool, share: float) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.pth"
    path.write_bytes(INTACT[new_format][: int(share * len(INTACT[new_format]))])
    with pytest.raises(BadInputFile):
        read_everything(path)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*(op.code.encode("latin1") for op in pickletools.opcodes), b"\x01", b"os\n", b"\n"])))
def test_random_programs(tmp_path_factory: pytest.TempPathFactory, opcodes: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pth"
    path.write_bytes(as_zip(b"\x80\x04" + b"".join(opcodes) + b"."))
    with contextlib.suppress(BadInputFile):
        read_torch_file(path)
