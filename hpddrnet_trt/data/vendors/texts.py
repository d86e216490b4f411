"""Bounded reading of metadata texts: TIFF tags, files beside the picture, INI sections, XML."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from xml.parsers import expat

import tifffile

MAX_TEXT_BYTES = 4 << 20  # real ones have 3 to 70 kB; OME-XML of a large stack can have more
MAX_SIDECAR_BYTES = 1 << 20
_HEAD_BYTES = 4096
_TEXT_TYPES = (1, 2, 7)  # BYTE, ASCII, UNDEFINED
_DEEP = 64  # levels of XML elements

Sections = Mapping[str, Mapping[str, str]]


class TooLarge(ValueError):
    """A text that no microscope writes: beyond the limit."""


def tag_bytes(page: tifffile.TiffPage, code: int) -> bytes | None:
    """A tag's bytes as stored, without tifffile's interpretation. Raises :class:`TooLarge`."""
    tag = page.tags.get(code)
    if tag is None or tag.dtype not in _TEXT_TYPES or tag.count < 1:
        return None
    if tag.valuebytecount > MAX_TEXT_BYTES:
        raise TooLarge(f"tag {code} holds {tag.valuebytecount} bytes")
    handle = tag.parent.filehandle
    if tag.valueoffset < 8 or tag.valueoffset + tag.valuebytecount > handle.size:
        return None
    handle.seek(tag.valueoffset)
    return bytes(handle.read(tag.valuebytecount))


def decoded(content: bytes) -> str:
    """Text of unknown encoding: UTF-16 or UTF-8 where it is that, else Windows-1252."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    if content[1:2] == b"\0":
        return content.decode("utf-16-le", errors="replace")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    return text.rstrip("\0")


def sidecar(folder: Path, names: Iterable[str], marks: Collection[bytes]) -> tuple[str, str] | None:
    """Name and text of the first of the ``names`` that is a file in ``folder`` and has a mark near its beginning.

    Only ordinary files are opened. Raises :class:`TooLarge` beyond the limit and OSError when unreadable.
    """
    for name in names:
        path = folder / name
        try:
            if not path.is_file():
                continue
        except OSError:  # a name too long for the file system
            continue
        with path.open("rb") as stream:
            content = stream.read(_HEAD_BYTES)
            if not any(mark in content.replace(b"\0", b"") for mark in marks):  # UTF-16 has zeros between
                continue
            content += stream.read(MAX_SIDECAR_BYTES + 1 - len(content))
        if len(content) > MAX_SIDECAR_BYTES:
            raise TooLarge(f"{name} holds {path.stat().st_size} bytes")
        return name, decoded(content)
    return None


def ini_sections(text: str) -> Sections:
    """``[Section]`` and ``key=value`` lines; a key's first value counts, lines of any other form are passed over."""
    sections: dict[str, dict[str, str]] = {}
    current = sections.setdefault("", {})
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            current = sections.setdefault(line[1:-1], {})
            continue
        key, equals, value = line.partition("=")
        if equals:
            current.setdefault(key.strip(), value.strip())
    return sections


def xml_values(text: str, wanted: Collection[str]) -> dict[str, tuple[dict[str, str], str]]:
    """``{path: (attributes, text)}`` of the first element of each wanted path, such as ``"OME/Image/Pixels"``.

    Namespaces are left out. The document is streamed: no tree is built, and a document type, the only place where
    entities could be declared, ends the reading, as does a damaged document: what was found before counts.
    """
    elements: dict[str, tuple[dict[str, str], str]] = {}
    path: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        path.append(name.rpartition(":")[2])
        if len(path) > _DEEP:
            raise ValueError("too deep")
        here = "/".join(path)
        first = here in wanted and here not in elements
        if first:
            elements[here] = (attributes, "")
        open_paths.append(here if first else "")

    def end(name: str) -> None:
        path.pop()
        if open_paths.pop() and len(elements) == len(wanted):
            raise StopIteration

    def data(characters: str) -> None:
        here = open_paths[-1] if open_paths else ""
        if here:
            attributes, so_far = elements[here]
            elements[here] = (attributes, so_far + characters)

    def refuse(*_: object) -> None:
        raise ValueError("document types are not read")

    open_paths: list[str] = []
    parser = expat.ParserCreate("utf-8")  # whatever the document says of itself: it was decoded already
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = data
    parser.StartDoctypeDeclHandler = refuse
    with suppress(expat.ExpatError, ValueError, StopIteration):
        parser.Parse(text.encode("utf-8", errors="replace"), True)
    return elements
