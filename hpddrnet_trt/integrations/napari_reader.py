"""napari opens a micrograph with its pixel size: scale and units from the microscope's metadata, no info bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tifffile

from hpddrnet_trt.data.micrograph import read_micrograph

LayerData = tuple[Any, dict[str, Any], str]  # as napari takes it: array, layer arguments, kind of layer
METADATA_KEY = "micrograph"  # in ``layer.metadata``


def napari_get_reader(path: str | list[str]) -> Callable[[str], list[LayerData]] | None:
    """:func:`read_layer` for one micrograph, None for what other readers do better: stacks, files that are no TIFF."""
    if not isinstance(path, str):
        return None  # several files, to be stacked
    if Path(path).suffix.lower() in (".tif", ".tiff") and not _is_one_picture(path):
        return None
    return read_layer


def read_layer(path: str) -> list[LayerData]:
    """One image layer; with ``scale`` in nanometres where the pixel size is known, in pixels where it is not.

    ``metadata["micrograph"]`` holds vendor, info-bar rows and remarks of :func:`~hpddrnet_trt.data.read_micrograph`.
    Raises :class:`~hpddrnet_trt.core.errors.BadInputFile`.
    """
    micrograph = read_micrograph(path)
    arguments: dict[str, Any] = {
        "name": Path(path).stem,
        "metadata": {
            METADATA_KEY: {
                "pixel_size_m": micrograph.pixel_size_m,
                "info_bar_rows": micrograph.info_bar_rows,
                "vendor": micrograph.vendor,
                "remarks": list(micrograph.remarks),
            }
        },
    }
    if micrograph.pixel_size_m is not None:
        arguments["scale"] = (micrograph.pixel_size_m * 1e9,) * 2
        arguments["units"] = ("nm", "nm")
    return [(micrograph.pixels, arguments, "image")]


def _is_one_picture(path: str) -> bool:
    try:
        with tifffile.TiffFile(path) as tif:
            series = tif.series
            return len(series) == 1 and len(series[0].keyframe.shape) == len(series[0].shape)
    except Exception:  # a damaged file: napari tells the user what its own reader makes of it
        return False
