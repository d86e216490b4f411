"""Small mosaics and volumes in every kind of file, written by the libraries of their formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.mosaic.layout import Box

SIZE = 4e-9  # metres per pixel
SPACING = 1e-8


def volume(slices: int = 3, height: int = 150, width: int = 190, dtype: Any = np.uint8) -> npt.NDArray[Any]:
    """Noise without a zero, which would be "never acquired"."""
    return np.random.default_rng(7).integers(1, 250, (slices, height, width)).astype(dtype)


def zarr_store(
    folder: Path,
    pixels: npt.NDArray[Any],
    version: str = "0.5",
    axes: str = "zyx",
    scale: float = SIZE * 1e9,
    unit: str | None = "nanometer",
    **array: Any,
) -> Path:
    """A store of one image with one level; ``array`` goes to zarr."""
    zarr = pytest.importorskip("zarr")
    format_ = 3 if version == "0.5" else 2
    array = {"chunks": tuple(min(32, side) for side in pixels.shape), **array}
    if array["chunks"][0] > 1 and pixels.ndim > 2:
        array["chunks"] = (1, *array["chunks"][1:])
    group = zarr.open_group(str(folder), mode="w", zarr_format=format_)
    level = group.create_array("0", shape=pixels.shape, dtype=pixels.dtype, **{"fill_value": 0, **array})
    level[...] = pixels
    group.attrs.update(metadata(version, axes, scale, unit))
    return folder


def metadata(version: str, axes: str, scale: float, unit: str | None, **more: Any) -> dict[str, Any]:
    steps = {"z": SPACING / SIZE * scale, "y": scale, "x": scale}
    space = {} if unit is None else {"unit": unit}
    image = {
        "axes": [{"name": axis, **({"type": "space", **space} if axis in "zyx" else {})} for axis in axes],
        "datasets": [
            {
                "path": "0",
                "coordinateTransformations": [{"type": "scale", "scale": [steps.get(axis, 1.0) for axis in axes]}],
            }
        ],
        **more,
    }
    return {"ome": {"version": version, "multiscales": [image]}} if version == "0.5" else {"multiscales": [image]}


def whole(source: Any) -> npt.NDArray[Any]:
    """All pixels, none of them unreadable."""
    slices, height, width = source.shape
    pieces = [source.read(Box(z, 0, 0, height, width)) for z in range(slices)]
    assert all(piece.unreadable == () for piece in pieces)
    return np.stack([piece.pixels for piece in pieces])


def tiled_tiff(path: Path, pixels: npt.NDArray[Any], **options: Any) -> Path:
    """OME-TIFF with a pyramid in SubIFDs, or what ``options`` say."""
    import tifffile

    resolution = {"PhysicalSizeX": SIZE * 1e9, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": SIZE * 1e9,
                  "PhysicalSizeYUnit": "nm", "PhysicalSizeZ": SPACING * 1e9, "PhysicalSizeZUnit": "nm"}  # fmt: skip
    options = {"tile": (32, 48), "compression": "zlib", "metadata": {"axes": "ZYX", **resolution}, **options}
    levels = options.pop("levels", 2)
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tif:
        tif.write(pixels, subifds=levels, **options)
        for level in range(1, levels + 1):
            tif.write(pixels[:, :: 2**level, :: 2**level], subfiletype=1, **{**options, "metadata": None})
    return path


def tile_folder(folder: Path, pixels: npt.NDArray[Any], name: str = "r{row:03}_c{column:03}.png") -> Path:
    """``pixels`` ``[H, W]`` as a grid of pictures that do not overlap, the last ones smaller."""
    from PIL import Image

    folder.mkdir()
    for row, top in enumerate(range(0, pixels.shape[0], 60)):
        for column, left in enumerate(range(0, pixels.shape[1], 70)):
            Image.fromarray(pixels[top : top + 60, left : left + 70]).save(folder / name.format(row=row, column=column))
    return folder
