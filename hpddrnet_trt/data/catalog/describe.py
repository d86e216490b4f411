"""The catalog and its entries as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from hpddrnet_trt.data.catalog.converters import CONVERTERS
from hpddrnet_trt.data.catalog.entry import Entry, RemoteFile

_WIDTH = 100


def overview(entries: Iterable[Entry]) -> str:
    """Three lines for each entry: name and title, classes and images, how to have it under which licence."""
    return "\n\n".join(_short(entry) for entry in entries)


def _short(entry: Entry) -> str:
    size = f", {_bytes(entry.download_size)}" if entry.download_size else ""
    names = ", ".join(known.name for known in entry.classes)
    author = entry.citation.split(",")[0].strip('"')
    reference = f"{author}, doi:{entry.doi}" if entry.doi else author
    return "\n".join(
        [
            f"{entry.name}  {entry.title}",
            f"    classes: {names}    images: {entry.images}",
            f"    {_way(entry)}{size}    licence: {entry.licence or 'NOT CLEAR'}    {reference}",
        ]
    )


def _way(entry: Entry) -> str:
    if entry.name not in CONVERTERS:
        return "listed only"
    return "get" if entry.files else "by hand, then convert"


def details(entry: Entry) -> str:
    """Everything the catalog knows about one entry."""
    rows = [
        ("title", entry.title),
        ("classes", ", ".join(f"{known.index} {known.name}" for known in entry.classes)),
        ("images", entry.images),
        ("split", entry.split),
        ("licence", entry.licence or "NOT CLEAR"),
        ("", entry.licence_note),
        ("citation", entry.citation),
        ("doi", entry.doi or ""),
        ("homepage", entry.homepage),
        ("way", _way(entry)),
        *(("file", _file(file)) for file in entry.files),
        ("by hand", entry.how_to_get),
        ("notes", entry.notes),
        ("verified", entry.verified),
    ]
    return "\n".join([entry.name, *(_row(title, text) for title, text in rows if text)])


def _row(title: str, text: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=f"  {title:<10}", subsequent_indent=" " * 12,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _file(file: RemoteFile) -> str:
    checksum = f"sha256 {file.sha256}" if file.sha256 else f"md5 {file.md5}" if file.md5 else "no published checksum"
    size = _bytes(file.size) if file.size is not None else "size not published"
    return f"{file.url} ({size}, {checksum})"


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = round(count / 1000)
    return f"{count} GB"
