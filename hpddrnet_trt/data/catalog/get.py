"""``datasets get`` and ``datasets convert``: from an entry, or from files at hand, to a dataset folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.data.catalog.archives import is_archive, unpack
from hpddrnet_trt.data.catalog.converters import CONVERTERS
from hpddrnet_trt.data.catalog.download import download
from hpddrnet_trt.data.catalog.entry import Entry
from hpddrnet_trt.data.catalog.writer import require_new, write_converted
from hpddrnet_trt.data.datasets import FolderDataset


def get_dataset(
    entry: Entry, folder: str | Path, *, downloads: str | Path | None = None, accept_unclear_licence: bool = False
) -> FolderDataset:
    """Download ``entry``, convert it into ``folder`` (new or empty) and open the result.

    What is downloaded stays in ``downloads`` (default: ``downloads`` beside ``folder``), where an
    interrupted download continues and where several entries share a file. Raises
    :class:`UsageError` for an entry that must be fetched by hand, and for one without a clear
    licence unless ``accept_unclear_licence``.
    """
    folder = Path(folder)
    require_new(folder)
    if not entry.files:
        raise UsageError(f"{entry.name} cannot be downloaded by itself: {entry.how_to_get}")
    if entry.licence is None and not accept_unclear_licence:
        raise UsageError(
            f"the licence of {entry.name} is not clear ({entry.licence_note}); ask its authors, or give "
            "--accept-unclear-license if you may use it"
        )
    store = Path(downloads) if downloads is not None else folder.parent / "downloads"
    fetched = [download(file, store) for file in entry.files]
    record = [{"url": file.url, "sha256": sha256_of(path)} for file, path in zip(entry.files, fetched, strict=True)]
    return _convert(entry, fetched, folder, record)


def convert_dataset(entry: Entry, source: str | Path, folder: str | Path) -> FolderDataset:
    """Convert what is already at hand, a folder or an archive, into ``folder`` and open the result."""
    source, folder = Path(source), Path(folder)
    require_new(folder)
    if not source.is_dir() and not is_archive(source):
        raise BadInputFile(f"{source} is neither a folder nor a ZIP or TAR archive; give what the authors publish")
    return _convert(entry, [source], folder, [])


def _convert(entry: Entry, sources: Sequence[Path], folder: Path, record: list[dict[str, Any]]) -> FolderDataset:
    if entry.name not in CONVERTERS:
        raise UsageError(
            f"{entry.name} is listed only, its files cannot be converted: {entry.how_to_get}; arrange them as "
            "images|masks/{train,val,test}/NAME.png with a dataset.json"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _as_one_folder(sources, folder) as root:
        write_converted(entry, CONVERTERS[entry.name](root), folder, downloads=record)
    return FolderDataset.open(folder)


@contextmanager
def _as_one_folder(sources: Sequence[Path], beside: Path) -> Iterator[Path]:
    """A folder with everything in it: the source itself, or a temporary one with archives unpacked."""
    if len(sources) == 1 and sources[0].is_dir():
        yield sources[0]
        return
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as temporary:
        root = Path(temporary)
        for path in sources:
            if is_archive(path):
                unpack(path, root / path.stem)
            else:
                shutil.copy2(path, root / path.name)
        yield root
