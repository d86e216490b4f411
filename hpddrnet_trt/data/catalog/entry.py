"""What the catalog says about one dataset, and about one of its files."""

from __future__ import annotations

from dataclasses import dataclass

from hpddrnet_trt.data.datasets import DescribedClass


@dataclass(frozen=True)
class RemoteFile:
    """A file to download. ``sha256``, ``md5`` and ``size`` (bytes) are None where nobody published them."""

    name: str  # under which it is kept; entries that share a file name it alike
    url: str
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None

    @property
    def has_checksum(self) -> bool:
        return self.sha256 is not None or self.md5 is not None


@dataclass(frozen=True)
class Entry:
    """One public dataset.

    ``licence`` is None when it is not clear; ``licence_note`` says where the statement stands.
    ``files`` is empty when it must be fetched by hand, which ``how_to_get`` then explains.
    ``verified`` says what was checked of all this, and what was not.
    """

    name: str
    title: str
    classes: tuple[DescribedClass, ...]
    images: str  # count and size, for people
    licence: str | None
    licence_note: str
    citation: str
    homepage: str
    split: str  # where the split comes from
    verified: str
    doi: str | None = None
    files: tuple[RemoteFile, ...] = ()
    how_to_get: str = ""
    notes: str = ""

    @property
    def download_size(self) -> int | None:
        """Bytes of all files; None when a size is not known."""
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if sizes and len(sizes) == len(self.files) else None


def classes(**colours: tuple[int, int, int]) -> tuple[DescribedClass, ...]:
    """The class table in the order of the mask values: ``classes(matrix=(68, 68, 68), ...)``."""
    return tuple(
        DescribedClass(name=name.replace("_", " "), index=index, color=colour)
        for index, (name, colour) in enumerate(colours.items())
    )
