"""A checkpoint as what it adds to the ONNX file that was made from it, so that a package need not hold weights twice.

Export folds batch normalization into the convolutions: a kernel in the ONNX file is the checkpoint's times one factor
for each output channel, rounded to FP16 once more. So an FP16 tensor of the checkpoint is predicted by the initializer
of the ONNX file with its shape that lies closest, divided by the factors that fit best, and what remains are a few
units in the last place. Everything else is kept as it is. No meaning of any tensor is used, and the result is the
checkpoint bit for bit, which its checksum makes sure of.

The file: a line of JSON (checksums, what predicts which tensor), then a zlib stream of the checkpoint's header (as
safetensors has it: 8 bytes of length, JSON), the factors and the remainders, high bytes after low ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, require
from hpddrnet_trt.core.files import read_file

FORMAT = "hpddrnet-trt checkpoint delta 1"
MAX_LINE = 1 << 20
MAX_CHECKPOINT_BYTES = 1 << 30
WORTH = 0.25  # largest norm of a remainder beside that of its tensor: a prediction that is worse is none

Initializers = Mapping[str, npt.NDArray[Any]]


def make(checkpoint: Path, onnx_file: Path) -> bytes:
    """The delta of a ``.safetensors`` file against ``onnx_file``; reads both, writes nothing."""
    content, initializers = read_file(checkpoint, "checkpoint"), _initializers(onnx_file)
    header_end, tensors = _layout(content)
    parts, predicted = [content[:header_end]], {}
    for name, kind, shape, start, end in tensors:
        raw = content[header_end + start : header_end + end]
        partner, factors = None, np.empty(0)
        if kind == "F16" and len(shape) > 1 and raw:
            partner, factors = _closest(np.frombuffer(raw, np.float16).reshape(shape), initializers)
        if partner is None:
            parts.append(raw)
            continue
        predicted[name] = partner
        wanted = np.frombuffer(raw, np.uint16)
        remainder = _in_order(wanted) - _in_order(_predict(initializers[partner], factors))
        parts += [factors.tobytes(), (remainder & 0xFF).astype(np.uint8).tobytes(),
                  (remainder >> 8).astype(np.uint8).tobytes()]  # fmt: skip
    line = {
        "format": FORMAT, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
        "header": header_end, "predicted": predicted,
    }  # fmt: skip
    return json.dumps(line).encode() + b"\n" + zlib.compress(b"".join(parts), 9)


def checksum(delta: Path) -> str:
    """SHA-256 of the checkpoint that a delta gives."""
    return str(_line(read_file(delta, "delta"), delta)["sha256"])


def restore(delta: Path, onnx_file: Path) -> bytes:
    """The checkpoint's content; :class:`BadInputFile` where a file is missing, damaged, or is not the other's."""
    content = read_file(delta, "delta")
    try:
        line = _line(content, delta)
        stream = zlib.decompressobj()
        body = stream.decompress(content[content.index(b"\n") + 1 :], MAX_CHECKPOINT_BYTES)
        made = _restored(body, line, _initializers(onnx_file))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, zlib.error) as exc:
        raise _damaged(delta, onnx_file) from exc
    if hashlib.sha256(made).hexdigest() != line["sha256"]:
        raise _damaged(delta, onnx_file)
    return made


def _restored(body: bytes, line: Mapping[str, Any], initializers: Initializers) -> bytes:
    header_end, tensors = _layout(body[: line["header"]])
    place, parts = header_end, [body[:header_end]]

    def take(size: int) -> bytes:
        nonlocal place
        place += size
        if place > len(body):
            raise ValueError("it ends early")
        return body[place - size : place]

    for name, _, shape, start, end in tensors:
        partner = line["predicted"].get(name)
        if partner is None:
            parts.append(take(end - start))
            continue
        count = math.prod(shape)
        factors = np.frombuffer(take(8 * shape[0]), np.float64)
        remainder = np.frombuffer(take(count), np.uint8) + np.uint16(256) * np.frombuffer(take(count), np.uint8)
        parts.append(_out_of_order(_in_order(_predict(initializers[partner], factors)) + remainder).tobytes())
    return b"".join(parts)


def _line(content: bytes, delta: Path) -> dict[str, Any]:
    try:
        line = json.loads(content[: content.index(b"\n", 0, MAX_LINE)])
        if line["format"] != FORMAT:
            raise ValueError("another format")
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise BadInputFile(f"{delta} is damaged; install hpddrnet-trt again") from exc
    return dict(line)


def _damaged(delta: Path, onnx_file: Path) -> BadInputFile:
    return BadInputFile(
        f"{delta} and {onnx_file.name} do not give the checkpoint that they were made from: one of them is damaged; "
        "install hpddrnet-trt again"
    )


def _layout(content: bytes) -> tuple[int, list[tuple[str, str, list[int], int, int]]]:
    """End of a safetensors file's header, and name, type, shape, first and last byte of its tensors, in their order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    tensors = [
        (name, entry["dtype"], entry["shape"], *entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return end, sorted(tensors, key=lambda entry: entry[3])


def _initializers(onnx_file: Path) -> Initializers:
    onnx = require("onnx", "export", "restore the checkpoint of a shipped model")
    model = onnx.load_model_from_string(read_file(onnx_file, "ONNX file"))
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def _closest(tensor: npt.NDArray[Any], initializers: Initializers) -> tuple[str | None, npt.NDArray[Any]]:
    """The initializer that predicts ``tensor`` best, and its factors; None where none does."""
    wanted = tensor.reshape(len(tensor), -1).astype(np.float64)
    found: tuple[str | None, npt.NDArray[Any]] = (None, np.empty(0))
    best = WORTH * float(np.linalg.norm(wanted))
    for name, array in initializers.items():
        if array.dtype != np.float16 or array.shape != tensor.shape:
            continue
        folded = array.reshape(len(array), -1).astype(np.float64)
        with np.errstate(invalid="ignore"):
            products, energy = (folded * wanted).sum(1), (wanted**2).sum(1)
            factors = np.divide(products, energy, out=np.ones(len(energy)), where=energy > 0)
            factors[~(np.abs(factors) > 0)] = 1
            left = float(np.linalg.norm(wanted - folded / factors[:, None]))
        if left < best:  # not where a number is infinite or none
            best, found = left, (name, factors)
    return found


def _predict(array: npt.NDArray[Any], factors: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """One division in FP64 and one rounding, which are the same on every machine; bits of FP16."""
    with np.errstate(over="ignore"):
        quotient = array.reshape(len(array), -1).astype(np.float64) / factors[:, None]
        return quotient.astype(np.float16).ravel().view(np.uint16)


def _in_order(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """FP16's bits as whole numbers in the order of their values, so that neighbours differ by one (modulo 2^16)."""
    return np.where(bits & 0x8000, np.uint16(0xFFFF) - bits, bits | np.uint16(0x8000)).astype(np.uint16)


def _out_of_order(numbers: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    return np.where(numbers & 0x8000, numbers & np.uint16(0x7FFF), np.uint16(0xFFFF) - numbers).astype(np.uint16)
