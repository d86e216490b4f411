"""Damage valid micrograph files in a thousand ways and see that reading them ends in one of two ways.

Each case gives a :class:`Micrograph` of sane size and type, or :class:`BadInputFile` in one sentence, within bounds
of time and memory. Anything else is a failure. A case is told by its number: the same number damages the
same file in the same way.

    python -m tests.data.fuzz_micrographs --cases 5000
    python -m tests.data.fuzz_micrographs --first 1234 --cases 1     # one case again, with its traceback
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.data.micrograph import Micrograph, read_micrograph
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

Mutation = Callable[[bytearray, np.random.Generator], None]


# mutations ------------------------------------------------------------------------------------


def truncate(content: bytearray, random: np.random.Generator) -> None:
    del content[int(random.integers(0, len(content))) :]


def flip_bits(content: bytearray, random: np.random.Generator) -> None:
    near = int(random.choice([64, 512, len(content)]))
    for _ in range(int(random.integers(1, 16))):
        content[int(random.integers(min(near, len(content))))] ^= 1 << int(random.integers(8))


def splice(content: bytearray, random: np.random.Generator) -> None:
    length = int(random.integers(1, 400))
    source, target = (int(value) for value in random.integers(0, len(content), 2))
    piece = content[source : source + length]
    kept = bool(random.integers(2))
    content[target : target + (len(piece) if kept else 0)] = piece


def random_block(content: bytearray, random: np.random.Generator) -> None:
    start = int(random.integers(len(content)))
    length = int(random.integers(1, 64))
    content[start : start + length] = random.bytes(length) if random.integers(2) else bytes(length)


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
        field_offset, kind = [(0, "H"), (2, "H"), (4, item), (4 + struct.calcsize(item), item)][int(random.integers(4))]
        old = struct.unpack_from(order + kind, content, place + field_offset)[0]
        new = int(random.choice([*_INTERESTING, old + 1, old * 2, max(old - 1, 0), len(content)]))
        struct.pack_into(order + kind, content, place + field_offset, new % (1 << 8 * struct.calcsize(kind)))
    except struct.error:
        flip_bits(content, random)


def png_chunk(content: bytearray, random: np.random.Generator) -> None:
    """Another header field, or a text chunk that grows a thousandfold, with the right checksums."""
    if content[:4] != b"\x89PNG":
        return number(content, random)
    if random.integers(2):
        place, size = [(16, 4), (20, 4), (24, 1), (25, 1), (26, 1), (27, 1), (28, 1)][int(random.integers(7))]
        value = int(random.choice(_INTERESTING)) % (1 << 8 * size)
        content[place : place + size] = value.to_bytes(size, "big")
        content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
        return None
    kind, head = [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"icc\0\0")][
        int(random.integers(3))
    ]
    body = kind + head + zlib.compress(bytes(1 << int(random.integers(10, 25))))
    content[33:33] = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return None


def dm_tag(content: bytearray, random: np.random.Generator) -> None:
    """Another length or type behind one of DigitalMicrograph's tag marks."""
    marks = [match.end() for match in re.finditer(b"%%%%", bytes(content))]
    if not marks:
        return number(content, random)
    size = 8 if content[:4] == b"\0\0\0\4" else 4
    place = marks[int(random.integers(len(marks)))] + size * int(random.integers(4))
    value = int(random.choice([*_INTERESTING, 15, 18, 20, len(content)]))
    content[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "big")
    return None


def mutations(name: str, is_sidecar: bool) -> list[Mutation]:
    general: list[Mutation] = [truncate, flip_bits, splice, random_block, number]
    if is_sidecar:
        return [*general, text, text, text]
    if name.startswith("png"):
        return [*general, png_chunk, png_chunk]
    if name.startswith("dm"):
        return [*general, dm_tag, dm_tag, text]
    if name == "jpeg":
        return general
    return [*general, tiff_tag, tiff_tag, tiff_tag, text]


# running --------------------------------------------------------------------------------------


@dataclass
class Report:
    """Counts by kind of file and outcome, and what must not be."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def __str__(self) -> str:
        kinds = sorted({kind for kind, _ in self.outcomes})
        ends = sorted({end for _, end in self.outcomes})
        lines = [f"{'':14}" + "".join(f"{end:>14}" for end in ends)]
        lines += [f"{kind:14}" + "".join(f"{self.outcomes[kind, end]:14}" for end in ends) for kind in kinds]
        totals = [sum(self.outcomes[kind, end] for kind in kinds) for end in ends]
        lines.append(f"{'all':14}" + "".join(f"{total:14}" for total in totals))
        lines.append(f"slowest case {self.slowest_s:.2f} s, peak memory {_peak_megabytes():.0f} MB")
        return "\n".join([*lines, *self.failures])


def fuzz(folder: Path, cases: int, first: int = 0) -> Report:
    """Run the cases ``first`` to ``first + cases - 1``; files are made in ``folder``."""
    report = Report()
    made = folder / "valid"
    made.mkdir(parents=True)
    samples = {name: write() for name, write in vendor_files.samples(made, _PICTURE).items()}
    for path in samples.values():
        assert isinstance(read_micrograph(path), Micrograph)
    memory = _peak_megabytes()
    for case in range(first, first + cases):
        name = list(samples)[case % len(samples)]
        random = np.random.default_rng([case, 6])
        path = _damaged_copy(name, samples[name], folder / "case", random)
        began = time.perf_counter()
        outcome, reason = _read(path)
        seconds = time.perf_counter() - began
        report.slowest_s = max(report.slowest_s, seconds)
        report.outcomes[name, outcome] += 1
        if seconds > SECONDS:
            reason = reason or f"took {seconds:.1f} s"
        if _peak_megabytes() - memory > MEGABYTES:
            reason = reason or f"took {_peak_megabytes() - memory:.0f} MB"
            memory = _peak_megabytes()
        if reason is not None:
            report.failures.append(f"case {case} ({name}): {reason}")
    return report


def _damaged_copy(name: str, valid: Path, folder: Path, random: np.random.Generator) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    beside = [path for path in valid.parent.glob(f"{valid.stem}*") if path.suffix in (".txt", ".hdr")]
    for path in (valid, *beside):
        shutil.copy(path, folder)
    target = beside[0] if beside and random.random() < 0.8 else valid
    content = bytearray(target.read_bytes())
    choices = mutations(name, target != valid)
    for _ in range(int(random.integers(1, 4))):
        if content:
            choices[int(random.integers(len(choices)))](content, random)
    (folder / target.name).write_bytes(content)
    return folder / valid.name


def _read(path: Path) -> tuple[str, str | None]:
    """Outcome, and what is wrong with it."""
    try:
        micrograph = read_micrograph(path)
    except BadInputFile as exc:
        sentence = str(exc)
        if "\n" in sentence or path.name not in sentence or len(sentence) > 700 + len(str(path)):
            return "refused", f"not one sentence: {sentence!r}"
        if isinstance(exc.__cause__, MemoryError):
            return "refused", "ran out of memory"
        return "refused", None
    except Exception:  # the very thing that is looked for
        return "exception", traceback.format_exc()
    jpeg = path.read_bytes()[:3] == b"\xff\xd8\xff"
    return "read", _insane(micrograph, _JPEG_PIXELS_PER_BYTE * path.stat().st_size if jpeg else _MOST_PIXELS)


def _insane(micrograph: Micrograph, most: int) -> str | None:
    pixels, size = micrograph.pixels, micrograph.pixel_size_m
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16, np.float32) or not 0 < pixels.size <= most:
        return f"a picture of {pixels.dtype} {pixels.shape}"
    if size is not None and not 1e-12 <= size <= 1e-3:
        return f"a pixel size of {size} m"
    if (size is None) != (micrograph.pixel_size_source is None):
        return "a pixel size without its source"
    return None


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the reading of micrographs.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        report = fuzz(Path(folder), arguments.cases, arguments.first)
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
