"""What a mosaic or volume may lie in: :data:`KINDS`, the one list of them, and :func:`open_source`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.magnification import plausible
from hpddrnet_trt.mosaic.layout import Source
from hpddrnet_trt.mosaic.ome_zarr import is_zarr, open_ome_zarr
from hpddrnet_trt.mosaic.reading import Options
from hpddrnet_trt.mosaic.tiff import is_tiff, open_tiff
from hpddrnet_trt.mosaic.tiles import open_folder, open_picture

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # also what Path makes of ://


@dataclass(frozen=True)
class Kind:
    """``fits``: whether a path is of this kind; ``open``: how it is opened; ``options``: what may be said beside it."""

    name: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, Options], Source]
    options: frozenset[str]


KINDS = (
    Kind("an OME-Zarr", is_zarr, open_ome_zarr, frozenset({"image", "channel"})),
    Kind("a TIFF", is_tiff, open_tiff, frozenset({"channel"})),
    Kind("a folder of tiles or slices", Path.is_dir, open_folder, frozenset({"positions"})),
    Kind("a picture", Path.is_file, open_picture, frozenset()),
)


def open_source(
    path: str | Path,
    *,
    image: str | None = None,
    positions: str | Path | None = None,
    channel: int | None = None,
    pixel_size: float | None = None,
    spacing: float | None = None,
) -> Source:
    """Open a mosaic or volume; nothing of its pixels is read before :meth:`~hpddrnet_trt.mosaic.layout.Source.read`.

    ``image``: which image of an OME-Zarr store that holds several. ``positions``: where the tiles of a folder lie.
    ``channel``: counted from 0, where there are several. ``pixel_size``, ``spacing``: metres from pixel to pixel and
    from slice to slice; they come before what the file says.

    Raises :class:`BadInputFile` for what is missing, damaged or of no known kind, :class:`UsageError` for an option
    that makes no sense there, :class:`~hpddrnet_trt.core.errors.MissingDependency` without the extra ``mosaic``.
    """
    if _ADDRESS.match(str(path)):
        raise UsageError(
            f"{path} is an address; mosaics are read from folders and mounted file systems: mount or copy it"
        )
    options = Options(image, positions, channel, pixel_size, spacing)
    for name in ("pixel_size", "spacing"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and plausible(value)):
            raise UsageError(f"no microscope has a {name.replace('_', ' ')} of {value:g} m; give it in metres")
    path = Path(path)
    try:
        exists = path.exists()
        kind = next((kind for kind in KINDS if kind.fits(path)), None)
    except OSError as exc:
        raise BadInputFile(f"{path} cannot be read ({exc.strerror}); check its permissions") from exc
    if not exists:
        raise BadInputFile(f"{path} does not exist; check the path")
    if kind is None:
        raise BadInputFile(f"{path} is no mosaic that can be read; there are: {', '.join(kind.name for kind in KINDS)}")
    for field in fields(Options)[:3]:
        if getattr(options, field.name) is not None and field.name not in kind.options:
            raise UsageError(f"{path} is {kind.name}, for which --{field.name} means nothing; leave it out")
    return kind.open(path, options)
