"""The fields of a protobuf message (an ONNX file is one), read in place: no import, and tensors are passed over.

The onnx package does the same for more time: its import and its parser cost a start on ONNX Runtime about a tenth of
its processor time. Field numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple


class ProtobufField(NamedTuple):
    """One field of a protobuf message: its content lies at ``start`` to ``end`` of the stream; ``value`` of a varint.

    ``wire``: 0 a varint, 1 eight bytes, 2 bytes or another message, 5 four bytes.
    """

    number: int
    wire: int
    start: int
    end: int
    value: int = 0

    def read(self, stream: BinaryIO, limit: int) -> bytes:
        """The first ``limit`` bytes of the content."""
        stream.seek(self.start)
        return stream.read(min(self.end - self.start, limit))


def protobuf_fields(stream: BinaryIO, start: int, end: int) -> Iterator[ProtobufField]:
    """Fields of the protobuf message from ``start`` to ``end``, in order; contents are passed over.

    Raises :class:`ValueError` for bytes that are no such message.
    """
    while start < end:
        stream.seek(start)  # whoever takes the fields may read elsewhere in between
        key = _varint(stream)
        number, wire = key >> 3, key & 7
        if number == 0 or wire not in _WIRE_BYTES:
            raise ValueError("it is damaged or another kind of file")
        length = _varint(stream) if wire == 2 else _WIRE_BYTES[wire]
        value = _varint(stream) if wire == 0 else 0
        content = stream.tell()
        start = content + length
        if start > end:
            raise ValueError("it is cut off in the middle")
        yield ProtobufField(number, wire, content, start, value)


_WIRE_BYTES = {0: 0, 1: 8, 2: 0, 5: 4}  # of a content; that of kind 2 says its length first


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it is cut off in the middle")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("it is damaged or another kind of file")
