"""``datasets get`` and ``datasets convert``: from an address, an archive or a folder to a dataset folder."""

from __future__ import annotations

import errno
import json
import lzma
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError, one_line, require
from hpddrnet_trt.core.files import atomic_folder, sha256_of, write_text
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.catalog import Entry, RemoteFile
from hpddrnet_trt.data.converters import CONVERTERS, Labelled
from hpddrnet_trt.data.datasets import FolderDataset, unknown_values
from hpddrnet_trt.data.description import FILE_NAME, DatasetDescription, DescribedFile
from hpddrnet_trt.data.labels import write_pair

MAX_BYTES = 64 << 30  # unpacked; the largest set of the catalog is far below
MAX_MEMBERS = 200_000
_BLOCK = 1 << 20
_MAX_PADDING = 64 << 20
_DRIVE = re.compile("[A-Za-z]:")


def get_dataset(entry: Entry, folder: str | Path, *, downloads: str | Path | None = None) -> FolderDataset:
    """Download ``entry``, convert it into ``folder`` (new or empty) and open the result.

    What is downloaded stays in ``downloads`` (default: ``downloads`` beside ``folder``), where several entries share a
    file. Raises :class:`UsageError` for an entry that must be fetched by hand, and what :func:`download` raises.
    """
    folder = Path(folder)
    require_new(folder)
    if entry.file is None:
        raise UsageError(f"{entry.name} cannot be downloaded by itself: {entry.how_to_get}")
    archive = download(entry.file, Path(downloads) if downloads is not None else folder.parent / "downloads")
    return _convert(entry, archive, folder, [{"url": entry.file.url, "sha256": sha256_of(archive)}])


def convert_dataset(entry: Entry, source: str | Path, folder: str | Path) -> FolderDataset:
    """Convert what is already at hand, a folder or an archive, into ``folder`` and open the result."""
    source, folder = Path(source), Path(folder)
    require_new(folder)
    return _convert(entry, source, folder, [])


def _convert(entry: Entry, source: Path, folder: Path, downloads: list[dict[str, Any]]) -> FolderDataset:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with as_folder(source, folder) as root:
        write_converted(entry, CONVERTERS[entry.name](root), folder, downloads=downloads)
    return FolderDataset.open(folder)


@contextmanager
def as_folder(source: Path, beside: Path) -> Iterator[Path]:
    """The source itself, or a temporary folder with the archive unpacked; :class:`BadInputFile` if it is neither."""
    if source.is_dir():
        yield source
        return
    if not is_archive(source):
        raise BadInputFile(f"{source} is neither a folder nor a ZIP or TAR archive; give what the authors publish")
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as temporary:
        unpack(source, Path(temporary) / source.stem)
        yield Path(temporary)


def download(file: RemoteFile, folder: Path, *, timeout_s: float = 30) -> Path:
    """Download ``file`` into ``folder`` with pooch and return its path; a complete one is not fetched again.

    It arrives whole or not at all. Raises :class:`BadInputFile` when another file of that name is there already, or
    when what arrives is not what was published, :class:`UserError` when the server cannot be reached or refuses, and
    :class:`~hpddrnet_trt.core.errors.MissingDependency` without pooch.
    """
    target = folder / file.name
    if target.exists():
        if not is_archive(target) or (file.sha256 is not None and sha256_of(target) != file.sha256):
            raise BadInputFile(f"{target} is there already but is another file; move it away, it is not overwritten")
        return target
    pooch = require("pooch", "datasets", "download datasets")
    requests = require("requests", "datasets", "download datasets")
    pooch.get_logger().setLevel("WARNING")
    headers = {"User-Agent": f"hpddrnet-trt/{__version__} (dataset download)", "Accept-Encoding": "identity"}
    fetch = pooch.HTTPDownloader(progressbar=True, chunk_size=_BLOCK, timeout=timeout_s, headers=headers)
    known = None if file.sha256 is None else f"sha256:{file.sha256}"
    by_hand = f"or take it from {file.url} by hand and use 'datasets convert'"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as temporary:
            path = Path(pooch.retrieve(file.url, known, fname=file.name, path=temporary, downloader=fetch))
            if not is_archive(path):
                raise BadInputFile(f"{file.url} sent no ZIP or TAR archive (a web page?); look at it, {by_hand}")
            path.rename(target)
    except requests.exceptions.HTTPError as exc:
        exc.response.close()  # pooch leaves it open
        answer = f"the server answers {exc.response.status_code} {exc.response.reason}"
        raise UserError(f"{file.url} cannot be downloaded: {answer}; try again later, {by_hand}") from exc
    except requests.exceptions.RequestException as exc:
        raise UserError(
            f"{file.url} cannot be downloaded ({one_line(exc)}); check the connection and call again, {by_hand}"
        ) from exc
    except ValueError as exc:  # how pooch says that the checksum is another one
        raise BadInputFile(f"what {file.url} sent is not the published file ({one_line(exc)}); try again") from exc
    return target


# Archives that came from elsewhere: nothing lands outside the folder, nothing grows without bound


class _Member(NamedTuple):
    name: str
    size: int  # bytes, as declared
    is_folder: bool
    is_plain: bool  # a file or folder: no link, device or pipe


def is_archive(path: Path) -> bool:
    """True for a ZIP or (compressed) TAR, told by the content."""
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def unpack(path: Path, folder: Path, *, max_bytes: int = MAX_BYTES, max_members: int = MAX_MEMBERS) -> None:
    """Unpack ``path`` into ``folder``, which is new or empty.

    Every member is checked before the first is written: names that lead outside, links, devices, names that
    occur twice, and declared sizes beyond ``max_bytes`` or the free space raise :class:`BadInputFile`, as do
    damaged and encrypted archives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limits = (path, folder, max_bytes, max_members)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                kinds = ((info, info.external_attr >> 28 in {0, 0o4, 0o10}) for info in archive.infolist())
                members = (_Member(info.filename, info.file_size, info.is_dir(), plain) for info, plain in kinds)
                _check_members(members, *limits)
                archive.extractall(folder)  # of each member no more than the declared size
        else:
            with tarfile.open(path) as tar:
                # Python before 3.11.4 has no filter; what that one refuses is refused here already.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                members = (_Member(info.name, info.size, info.isdir(), info.isreg() or info.isdir()) for info in tar)
                _check_members(members, *limits)
                _read_to_the_end(tar, path)
                tar.extractall(folder)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as exc:
        raise BadInputFile(f"archive {path} is damaged ({exc}); download it again") from exc
    except (RuntimeError, NotImplementedError) as exc:  # how zipfile says "encrypted" and "unknown method"
        raise BadInputFile(f"archive {path} cannot be unpacked here ({exc}); unpack it by hand") from exc
    except (FileExistsError, NotADirectoryError) as exc:
        raise BadInputFile(f"archive {path} holds the file {exc.filename} twice; unpack it by hand") from exc
    except OSError as exc:
        # Without a number: gzip's and bz2's own. EINVAL: a place before the file's start, from a wrong offset.
        if exc.errno not in {None, errno.EINVAL}:
            raise
        raise BadInputFile(f"archive {path} is damaged ({exc}); download it again") from exc


def _check_members(
    members: Iterable[_Member], path: Path, folder: Path, max_bytes: int, max_members: int
) -> None:
    """Look at the members one by one: a compressed tar must be read to find the next one."""
    free = shutil.disk_usage(folder).free
    total = 0
    names: set[PurePosixPath] = set()
    for count, member in enumerate(members, 1):
        total += member.size
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name or _DRIVE.match(member.name):
            raise BadInputFile(f"archive {path} wants to write to {member.name!r}, outside its folder; do not use it")
        if not member.is_plain:
            raise BadInputFile(
                f"archive {path} holds {member.name!r}, a link or device; unpack it by hand if you trust it"
            )
        if count > max_members:
            raise BadInputFile(f"archive {path} holds more files than the limit of {max_members}")
        if total > max_bytes:
            raise BadInputFile(f"archive {path} would unpack to more bytes than the limit of {max_bytes}")
        if total > free:
            raise BadInputFile(f"archive {path} needs more than the {free} bytes that {folder} has; free some space")
        if not member.is_folder:
            if name in names:
                raise BadInputFile(f"archive {path} holds the file {member.name} twice; unpack it by hand")
            names.add(name)


def _read_to_the_end(archive: tarfile.TarFile, path: Path) -> None:
    """A tar ends before its compressed stream does, and only there is the stream's checksum compared."""
    assert archive.fileobj is not None
    padding = 0
    while block := archive.fileobj.read(_BLOCK):
        padding += len(block)
        if padding > _MAX_PADDING:
            raise BadInputFile(f"archive {path} goes on after its end; unpack it by hand if you trust it")


# Writing


def write_converted(
    entry: Entry, samples: Iterable[Labelled], folder: Path, *, downloads: Iterable[dict[str, Any]] = ()
) -> None:
    """Write ``images|masks/SPLIT/NAME.png`` and ``dataset.json`` into ``folder``, whose content is replaced.

    Everything is written beside it and renamed at the end. ``downloads`` goes into ``dataset.json``
    (address, SHA-256). Raises :class:`BadInputFile` for masks that do not fit their image or the
    classes, for two samples of one name, and when there is none.
    """
    palette = [known.color or (0, 0, 0) for known in entry.classes]
    with atomic_folder(folder) as temporary:
        files: dict[tuple[str, str], dict[str, Any]] = {}
        for sample in progress_bar(samples, desc=f"converting {entry.name}", unit="image"):
            _check_sample(entry, sample)
            if (sample.split, sample.name) in files:
                raise BadInputFile(f"{entry.name}: two images are called {sample.name} in the split {sample.split}")
            write_pair(temporary, sample.split, sample.name, sample.image, sample.mask, palette)
            known = DescribedFile(split=sample.split, name=sample.name, group=sample.group)
            files[sample.split, sample.name] = {**known.model_dump(exclude_none=True), "source": sample.source}
        if not files:
            raise BadInputFile(f"{entry.name}: no labelled image was found; give what the authors publish")
        # What the package reads back, and around it what people want to know; their keys are left alone.
        read_back = DatasetDescription(name=entry.name, license=entry.license, classes=list(entry.classes))
        description = {
            **read_back.model_dump(exclude_none=True, exclude={"files"}),
            **{key: getattr(entry, key) for key in ("title", "license_note", "citation", "doi", "homepage", "split")},
            "notes": entry.notes,
            "downloads": list(downloads),
            "files": list(files.values()),
        }
        write_text(temporary / FILE_NAME, json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def require_new(folder: Path) -> None:
    """Raise :class:`UsageError` when ``folder`` exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; choose a new one, nothing is overwritten")


def _check_sample(entry: Entry, sample: Labelled) -> None:
    if sample.image.shape != sample.mask.shape:
        (height, width), (mask_height, mask_width) = sample.image.shape, sample.mask.shape
        raise BadInputFile(
            f"{entry.name}: {sample.source}: the image has {width} x {height} pixels, its mask "
            f"{mask_width} x {mask_height}; are they the authors' files?"
        )
    unknown = unknown_values(np.bincount(sample.mask.ravel(), minlength=256), len(entry.classes))
    if unknown:
        raise BadInputFile(f"{entry.name}: {sample.source}: the mask holds {unknown[0]}, which is no class")
