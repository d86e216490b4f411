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
from hpddrnet_trt.models import foreign
from hpddrnet_trt.models.foreign import StandIn, read_foreign, read_torch_file

SYSTEM = {"little_endian": True, "protocol_version": 1001}
NO_KEYS = pickle.dumps([], 2)


def archive_of(names: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def as_zip(data_pkl: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A file as torch.save writes it, around a pickle of one's own."""
    names = {"archive/data.pkl": data_pkl, "archive/byteorder": b"little", "archive/version": b"3\n"}
    return archive_of(names | {f"archive/data/{key}": data for key, data in (storages or {}).items()})


def legacy(pickled: bytes, head: bytes | None = None, system: Any = SYSTEM, keys: bytes = NO_KEYS) -> bytes:
    """A file as torch.save wrote it before PyTorch 1.6."""
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    return b"".join([head or start[0], *start[1:], pickled, keys])


def read(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    return read_torch_file(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_tensors_of_every_type(tmp_path: Path, new_format: bool) -> None:
    """Slices, transposes, shared storages, empty and zero-dimensional tensors, all dtypes."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
             torch.uint8, torch.bool]  # fmt: skip
    saved: dict[str, Any] = {f"as {kind}": base.to(kind) for kind in kinds}
    saved |= {"base": base, "slice": base[1:3, 2:], "transposed": base.T, "scalar": torch.tensor(3.5)}
    saved |= {"empty": torch.empty(0, 3), "parameter": torch.nn.Parameter(base)}
    others = {"number": 3, "text": "é", "nested": collections.OrderedDict(a=[1, (2.5, None, True)], b=b"\x00\xff")}
    torch.save({"state_dict": saved, **others}, tmp_path / "t.pth", _use_new_zipfile_serialization=new_format)
    content = read_torch_file(tmp_path / "t.pth")
    assert {key: content[key] for key in others} == others
    weights = read_foreign(tmp_path / "t.pth").state_dict
    assert list(weights) == list(saved)
    for key, value in saved.items():
        assert torch.equal(weights[key], value.float() if value.is_floating_point() else value)
        assert weights[key].is_contiguous()
        assert not weights[key].requires_grad


class Reduces:
    """Pickles into a call of ``function`` with ``arguments``, then ``extra``: state, list items, dict items."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], *extra: Any) -> None:
        self.recipe = (function, arguments, *extra)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.recipe


class Innocent:
    """A class with an ordinary state."""


class DictWith(dict):  # type: ignore[type-arg]
    """A dictionary subclass: built with NEWOBJ and filled with SETITEMS."""


def attacks(marker: str) -> dict[str, Any]:
    """Objects whose ordinary unpickling creates the folder ``marker``."""
    call = Reduces(os.mkdir, (marker,))
    source = f"__import__('os').mkdir({marker!r})"
    return {
        "os.mkdir": call,
        "subprocess": Reduces(subprocess.check_call, (["mkdir", marker],)),
        "eval": Reduces(builtins.eval, (source,)),
        "in a list": [1, [2, (call,)]],
        "beside weights": {"state_dict": {"w": 1.0}, "meta": call},
        "as an argument": Reduces(Innocent, (call,)),
        "in a state": Reduces(Innocent, (), {"a": call}),
        "dict subclass": DictWith({"a": call}),
        "as list items": Reduces(list, (), None, iter([call])),
        "as dict items": Reduces(dict, (), None, None, iter([("key", call)])),
        "as a dict key": Reduces(dict, (), None, None, iter([((1, call), "value")])),
        "map": Reduces(list, (Reduces(map, (os.mkdir, [marker])),)),
        "ordered dict": collections.OrderedDict(a=call),
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


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ALL)
def test_nothing_is_executed(tmp_path: Path, name: str, protocol: int) -> None:
    marker = tmp_path / "m"
    made = hand_made(str(marker))
    attack = made[name] if name in made else pickle.dumps(attacks(str(marker))[name], protocol)
    with contextlib.suppress(Exception):  # it may fail after the harm is done
        pickle.loads(attack)
    assert marker.exists()  # the attack is real
    marker.rmdir()
    for content in (as_zip(attack), legacy(attack), legacy(pickle.dumps(1, 2), head=attack), attack):
        with contextlib.suppress(BadInputFile):
            read(tmp_path, content)
        assert not marker.exists()


def test_nothing_is_imported(tmp_path: Path) -> None:
    """Importing a module runs it, too."""
    (tmp_path / "hpddrnet_bait.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        thing = read(tmp_path, as_zip(b"\x80\x02chpddrnet_bait\nThing\n(K\x01tR}X\x01\x00\x00\x00aK\x02sb."))
    finally:
        sys.path.remove(str(tmp_path))
    assert type(thing) is StandIn
    assert not callable(thing)


@pytest.mark.parametrize("new_format", [True, False])
def test_foreign_objects_are_inert(tmp_path: Path, new_format: bool) -> None:
    """NumPy scalars and arrays, as in mmengine's message hub, keep their place and nothing else."""
    content = {"scalar": np.float64(2.5), "array": np.arange(3), "path": Path("a"), "set": {1, 2}, "weights": [1.5],
               "default": collections.defaultdict(list, a=[1])}  # fmt: skip
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=new_format)
    read_back = read_torch_file(tmp_path / "file.pth")
    assert all(type(read_back[key]) is StandIn for key in ("scalar", "array", "path"))
    assert (read_back["set"], read_back["weights"], read_back["default"]) == ({1, 2}, [1.5], {"a": [1]})


# --- Files that lie


def tensor_pickle(
    numel: Any = 4,
    offset: Any = 0,
    size: Any = (2, 2),
    stride: Any = (2, 1),
    kind: str = "FloatStorage",
    key: Any = "0",
    old: bool = False,
) -> bytes:
    """A pickle of one tensor, named ``w``, with any claims."""
    parts = [pickle.dumps(part, 2)[2:-1] for part in ("w", "storage", key, "cpu", numel, offset, size, stride)]
    name, tag, key_, device, numel_, offset_, size_, stride_ = parts
    storage = b"(" + tag + b"ctorch\n" + kind.encode() + b"\n" + key_ + device + numel_ + b"N" * old + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset_ + size_ + stride_ + hooks + b"tR"
    return b"\x80\x02}" + name + tensor + b"s."


@pytest.mark.parametrize(
    "claims",
    [
        {"size": (3, 2)},
        {"offset": 1},
        {"offset": -1},
        {"stride": (-2, 1)},
        {"size": (2, -2)},
        {"size": (1 << 20, 1 << 20), "stride": (0, 0)},
        {"size": (1 << 40, 1 << 40), "stride": (0, 0)},
        {"size": 4},
        {"numel": 1 << 60},
        {"numel": "4"},
        {"key": 1},
        {"kind": "nn.Module"},
        {"kind": "ComplexFloatStorage", "numel": 2, "size": (2,), "stride": (1,)},
    ],
    ids=str,
)
def test_lying_tensors(tmp_path: Path, claims: dict[str, Any]) -> None:
    content = read(tmp_path, as_zip(tensor_pickle(), {"0": struct.pack("<4f", 1, 2, 3, 4)}))
    assert content["w"].tolist() == [[1, 2], [3, 4]]  # the truth
    path = tmp_path / "file.pth"
    path.write_bytes(as_zip(tensor_pickle(**claims), {"0": bytes(16)}))
    with pytest.raises(BadInputFile, match=r"file\.pth (is damaged, truncated or no PyTorch|claims|holds no weights)"):
        read_foreign(path)


def test_lying_storages_of_the_older_format(tmp_path: Path) -> None:
    content = legacy(tensor_pickle(old=True), keys=pickle.dumps(["0"], 2))
    assert read(tmp_path, content + struct.pack("<q4f", 4, 1, 2, 3, 4))["w"].tolist() == [[1, 2], [3, 4]]
    for storage in (struct.pack("<q5f", 5, 1, 2, 3, 4, 5), struct.pack("<q3f", 4, 1, 2, 3), b""):
        with pytest.raises(BadInputFile, match="damaged"):
            read(tmp_path, content + storage)


DEEP = b")" + b"\x85" * 100_000  # nested beyond what hashing survives
DOUBLED = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60  # a small pickle that unfolds to 2**60 items


@pytest.mark.parametrize("keyed", [DEEP, DOUBLED, b"c__builtin__\nset\n]" + DOUBLED + b"a\x85R"])
@pytest.mark.parametrize("layout", [b"\x80\x02%b.", b"\x80\x02}%bK\x01s.", b"\x80\x02}(%bK\x01u."])
@pytest.mark.parametrize("pack", [as_zip, legacy])
def test_tuples_that_cannot_be_hashed(tmp_path: Path, keyed: bytes, layout: bytes, pack: Callable[..., bytes]) -> None:
    """They would end the process, or keep it busy for ever."""
    with pytest.raises(BadInputFile, match="a tuple in its pickle unfolds to too many items"):
        read(tmp_path, pack(layout % keyed))


def test_content_that_is_read(tmp_path: Path) -> None:
    """Lists nested beyond Python's own limits; the older format, of this machine's byte order."""
    assert read(tmp_path, legacy(pickle.dumps(1, 2), system={"little_endian": True})) == 1
    assert isinstance(read(tmp_path, as_zip(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")), list)


def overlapping() -> bytes:
    """Many directory entries for the same bytes, which add up to more than the file."""
    content = bytearray(as_zip(tensor_pickle(), {str(index): bytes(1000) for index in range(4)}))
    directory = zipfile.ZipFile(io.BytesIO(bytes(content))).start_dir
    for entry in range(4):
        place = content.index(b"archive/data/%d" % entry, directory) - 46
        content[place + 20 : place + 28] = struct.pack("<II", 9000, 9000)
    return bytes(content)


BROKEN = [
    b"\x80\x02r\xff\xff\xff\xff.",  # memo slot four thousand million
    b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",  # bytes of 2**63
    b"\x80\x02\x8b\xff\xff\xff\x7f.",  # integer of 2**31 bytes
    b"\x80\x02K\x01",  # no STOP
    b"\x80\x02.", b"\x80\x02t.", b"\x80\x02\x86.", b"\x80\x02h\x07.", b"\x80\x02\x82\x01.", b"\x80\x05\x97.",
    b"\x80\x02Pkey\n.", b"\x80\x02}K\x01Q.",
    b"\x80\x02}(K\x01K\x02K\x03u.",  # a dictionary with a key too many
    b"\xfe.", b"\x80\x04K\x01K\x02\x93.", b"",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR.",
]  # fmt: skip
REFUSED = [
    *((as_zip(pickled), r"pth is damaged, truncated or no PyTorch checkpoint \(.+\); copy") for pickled in BROKEN),
    *((as_zip(tensor_pickle(), storages), "damaged")
      for storages in ({}, {"0": bytes(12)}, {"0": bytes(20)}, {"1": bytes(16)})),
    (b"", "not a PyTorch checkpoint"),
    (as_zip(pickle.dumps(Reduces(os.system, ("true",)), 2)), f"GLOBAL {os.name}.system whose module .* is blocked"),
    (b"hello", "not a PyTorch checkpoint"),
    (b"storages\x00" + bytes(600), "not a PyTorch checkpoint"),  # tar, PyTorch 0.1
    (pickle.dumps({"a": 1}, 2), "no PyTorch checkpoint"),
    (pickle.dumps({"a": 1}, 2) * 5, "Invalid magic number"),
    (b"PK\x03\x04" + bytes(50), "damaged"),
    (archive_of({"word/document.xml": b"text"}), r"without the one data\.pkl"),
    (archive_of({"a/data.pkl": b"text", "b/data.pkl": b"text"}), r"without the one data\.pkl"),
    (archive_of({"archive/data.pkl": bytes(10_000_000)}, zipfile.ZIP_DEFLATED), "compressed records"),
    (overlapping(), "claim more bytes"),
    (legacy(pickle.dumps(1, 2), system={"little_endian": False}), "big-endian"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(BadInputFile, match=reason):
        read(tmp_path, content)


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MAX_OPCODES", 100)
    with pytest.raises(BadInputFile, match="its pickle is too large"):
        read(tmp_path, as_zip(b"\x80\x02" + b"]" * 200 + b"."))
    monkeypatch.setattr(foreign, "MAX_FILE_BYTES", 1 << 10)
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


def flipped(content: bytes, data: st.DataObject) -> bytes:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(damaged)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["zip", "stream", "pickle"]), data=st.data())
def test_flipped_bits(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    """Anywhere in a file, or in the pickle only, with the archive's checksums made right again."""
    path = tmp_path_factory.getbasetemp() / "flipped.pth"
    if kind == "pickle":
        with zipfile.ZipFile(io.BytesIO(INTACT[True])) as intact:
            names = {name: intact.read(name) for name in intact.namelist()}
        content = archive_of({name: flipped(c, data) if name.endswith(".pkl") else c for name, c in names.items()})
    else:
        content = flipped(INTACT[kind == "zip"], data)
    path.write_bytes(content)
    with contextlib.suppress(BadInputFile):
        read_foreign(path)


@settings(max_examples=100, deadline=None)
@given(new_format=st.booleans(), share=st.floats(0, 1, exclude_max=True))
def test_truncated_files(tmp_path_factory: pytest.TempPathFactory, new_format: bool, share: float) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.pth"
    path.write_bytes(INTACT[new_format][: int(share * len(INTACT[new_format]))])
    with pytest.raises(BadInputFile):
        read_foreign(path)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*(op.code.encode("latin1") for op in pickletools.opcodes), b"\x01", b"os\n", b"\n"])))
def test_random_programs(tmp_path_factory: pytest.TempPathFactory, opcodes: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pth"
    path.write_bytes(as_zip(b"\x80\x02" + b"".join(opcodes) + b"."))
    with contextlib.suppress(BadInputFile):
        read_torch_file(path)
