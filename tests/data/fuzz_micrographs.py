"""Damage valid micrograph files in a thousand ways and see that reading them ends in one of two ways.

Each case gives a :class:`Micrograph` of sane size and type, or :class:`BadInputFile` in one sentence, within bounds
of time and memory. Anything else is a failure. A case is told by its number: the same number damages the same file in
the same way.

    python -m tests.data.fuzz_micrographs 5000           # cases 0 to 4999
    python -m tests.data.fuzz_micrographs 1 1234         # case 1234 again
"""

from __future__ import annotations

import logging
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.data.micrograph import read_micrograph
from tests.data import vendor_files

SECONDS = 5.0
MEGABYTES = 256
_PICTURE = vendor_files.draw_bar(vendor_files.grains(172, 256), 20)
_MOST_PIXELS = 4 * _PICTURE.size  # damage may enlarge a picture a little, never beyond what its bytes can hold
_JPEG_PIXELS_PER_BYTE = 600  # libjpeg fills with grey what the data do not reach, and nobody can tell
_INTERESTING = (0, 1, 2, 7, 8, 255, 256, 4095, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
_TEXTS = (
    b"nan", b"inf", b"-1", b"0", b"1e999", b"9" * 40, b"1e-300", b"", b"\0", b"=", b"%s", b"\xff\xfe",
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"<a>", b"</a>", b"[Image]", b"\xe9" * 9,
)  # fmt: skip


def truncate(content: bytearray, random: np.random.Generator) -> None:
    del content[int(random.integers(0, len(content))) :]


def flip_bits(content: bytearray, random: np.random.Generator) -> None:
    near = int(random.choice([64, 512, len(content)]))
    for _ in range(int(random.integers(1, 16))):
        content[int(random.integers(min(near, len(content))))] ^= 1 << int(random.integers(8))


def splice(content: bytearray, random: np.random.Generator) -> None:
    """A piece of the file, noise or zeros, in place of another or between."""
    length = int(random.integers(1, 400))
    source, target = (int(value) for value in random.integers(0, len(content), 2))
    piece = (content[source : source + length], random.bytes(length), bytes(length))[int(random.integers(3))]
    content[target : target + (len(piece) if random.integers(2) else 0)] = piece


def number(content: bytearray, random: np.random.Generator) -> None:
    """A number that programmers forget, at any place, in any size and byte order."""
    kind = str(random.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"]))
    size = struct.calcsize(kind)
    near = int(random.choice([64, 512, len(content)]))
    start = int(random.integers(max(1, min(near, len(content) - size))))
    value = int(random.choice(_INTERESTING)) % (1 << 8 * size)
    content[start : start + size] = struct.pack(kind, value)


def text(content: bytearray, random: np.random.Generator) -> None:
    """A hostile text in place of a number or a name."""
    words = [match.span() for match in re.finditer(rb"[0-9][0-9.e+-]*|[A-Za-z_]{4,}", bytes(content))]
    if words:
        start, end = words[int(random.integers(len(words)))]
        content[start:end] = _TEXTS[int(random.integers(len(_TEXTS)))]


def tiff_tag(content: bytearray, random: np.random.Generator) -> None:
    """Another code, type, count or value of one entry of a directory, or another next directory."""
    order = "<" if content[:2] == b"II" else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    entry, item = (20, "Q") if big else (12, "I")
    try:
        start = struct.unpack_from(order + item, content, 8 if big else 4)[0]
        count = struct.unpack_from(order + ("Q" if big else "H"), content, start)[0]
        first = start + (8 if big else 2)
        place = first + entry * int(random.integers(min(count, 64) + 1))
        if place == first + entry * count or random.integers(8) == 0:  # the link to the next directory
            values = [start, first, len(content) - 4, 0, 2**32 - 1]
            struct.pack_into(order + item, content, first + entry * count, int(random.choice(values)))
            return
        offset, kind = [(0, "H"), (2, "H"), (4, item), (4 + struct.calcsize(item), item)][int(random.integers(4))]
        old = struct.unpack_from(order + kind, content, place + offset)[0]
        new = int(random.choice([*_INTERESTING, old + 1, old * 2, max(old - 1, 0), len(content)]))
        struct.pack_into(order + kind, content, place + offset, new % (1 << 8 * struct.calcsize(kind)))
    except struct.error:
        flip_bits(content, random)


def png_chunk(content: bytearray, random: np.random.Generator) -> None:
    """Another header field, or a text chunk that grows a thousandfold, with the right checksums."""
    if content[:4] != b"\x89PNG":
        number(content, random)
    elif random.integers(2):
        place, size = [(16, 4), (20, 4), (24, 1), (25, 1), (26, 1), (27, 1), (28, 1)][int(random.integers(7))]
        value = int(random.choice(_INTERESTING)) % (1 << 8 * size)
        content[place : place + size] = value.to_bytes(size, "big")
        content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    else:
        heads = [b"zTXtComment\0\0", b"iTXtComment\0\1\0\0\0", b"iCCPicc\0\0"]
        body = heads[int(random.integers(3))] + zlib.compress(bytes(1 << int(random.integers(10, 25))))
        content[33:33] = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def dm_tag(content: bytearray, random: np.random.Generator) -> None:
    """Another length or type behind one of DigitalMicrograph's tag marks."""
    marks = [match.end() for match in re.finditer(b"%%%%", bytes(content))]
    if not marks:
        number(content, random)
        return
    size = 8 if content[:4] == b"\0\0\0\4" else 4
    place = marks[int(random.integers(len(marks)))] + size * int(random.integers(4))
    value = int(random.choice([*_INTERESTING, 15, 18, 20, len(content)]))
    content[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "big")


# By the beginning of a sample's name; the file beside a picture is damaged with "text".
_SPECIAL: dict[str, list[Callable[[bytearray, np.random.Generator], None]]] = {
    "png": [png_chunk, png_chunk], "dm": [dm_tag, dm_tag, text], "jpeg": [], "": [tiff_tag, tiff_tag, tiff_tag, text]
}  # fmt: skip


def damaged_copy(name: str, valid: Path, folder: Path, random: np.random.Generator) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    beside = [path for path in valid.parent.glob(f"{valid.stem}*") if path.suffix in (".txt", ".hdr")]
    for path in (valid, *beside):
        shutil.copy(path, folder)
    target = beside[0] if beside and random.random() < 0.8 else valid
    special = next(kinds for start, kinds in _SPECIAL.items() if name.startswith(start))
    choices = [truncate, flip_bits, splice, number, *(special if target == valid else [text] * 3)]
    content = bytearray(target.read_bytes())
    for _ in range(int(random.integers(1, 4))):
        if content:
            choices[int(random.integers(len(choices)))](content, random)
    (folder / target.name).write_bytes(content)
    return folder / valid.name


def outcome(path: Path) -> tuple[str, str | None]:
    """How reading ends ("read", "refused"), and what is wrong with it."""
    try:
        micrograph = read_micrograph(path)
    except BadInputFile as exc:
        sentence = str(exc)
        if "\n" in sentence or path.name not in sentence or len(sentence) > 700 + len(str(path)):
            return "refused", f"not one sentence: {sentence!r}"
        return "refused", "ran out of memory" if isinstance(exc.__cause__, MemoryError) else None
    except Exception:  # the very thing that is looked for
        return "exception", traceback.format_exc()
    pixels, size = micrograph.pixels, micrograph.pixel_size_m
    jpeg = path.read_bytes()[:3] == b"\xff\xd8\xff"
    most = _JPEG_PIXELS_PER_BYTE * path.stat().st_size if jpeg else _MOST_PIXELS
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16, np.float32) or not 0 < pixels.size <= most:
        return "read", f"a picture of {pixels.dtype} {pixels.shape}"
    if (size is None) != (micrograph.pixel_size_source is None) or not (size is None or 1e-12 <= size <= 1e-3):
        return "read", f"a pixel size of {size} m from {micrograph.pixel_size_source}"
    return "read", None


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)


def main(cases: int, first: int = 0) -> int:
    """Run the cases, print counts of how they end and every failure; 1 when there is one."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    ends: Counter[str] = Counter(read=0, refused=0)
    failures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "valid").mkdir()
        samples = {kind: write() for kind, write in vendor_files.samples(folder / "valid", _PICTURE).items()}
        assert {outcome(path) for path in samples.values()} == {("read", None)}
        memory = peak_megabytes()
        for case in range(first, first + cases):
            kind = list(samples)[case % len(samples)]
            path = damaged_copy(kind, samples[kind], folder / "case", np.random.default_rng([case, 6]))
            began = time.perf_counter()
            end, reason = outcome(path)
            ends[end] += 1
            if (seconds := time.perf_counter() - began) > SECONDS:
                reason = reason or f"took {seconds:.1f} s"
            if peak_megabytes() - memory > MEGABYTES:
                reason = reason or f"took {peak_megabytes() - memory:.0f} MB"
                memory = peak_megabytes()
            if reason is not None:
                failures.append(f"case {case} ({kind}): {reason}")
    print("all", *(f"{count} {end}" for end, count in ends.items()), *failures, sep="\n" if failures else " ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
