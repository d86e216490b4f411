"""Label maps as OME-TIFF, with physical pixel size, class names and provenance in the OME-XML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from hpddrnet_trt import __version__
from hpddrnet_trt.core.files import atomic_path
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.core.units import micrometres
from hpddrnet_trt.data.labels import check_labels, palette_options, scale_options

CLASSES = "hpddrnet-trt/classes"  # namespaces of the two map annotations
PROVENANCE = "hpddrnet-trt/provenance"
# The OME schema's unit is the micro sign U+00B5. The Greek letter U+03BC looks the same and is no unit to any reader.
MICROMETRE = "\u00b5m"


def write_ome_tiff(
    path: str | Path,
    labels: npt.NDArray[np.uint8],
    classes: Sequence[ClassInfo],
    *,
    pixel_size_m: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write class indices uint8 ``[H, W]`` as an OME-TIFF (schema 2016-06) with the classes' colours as palette.

    ``PhysicalSizeX`` and ``Y`` are in micrometres, absent when the size is unknown. Two map annotations:
    ``hpddrnet-trt/classes`` (index: name) and ``hpddrnet-trt/provenance`` (values that are no text as JSON).
    """
    check_labels(labels)
    names = {str(index): entry.name for index, entry in enumerate(classes)}
    annotations = [{"Namespace": CLASSES, "Description": "class of each pixel value", "Value": names}]
    if provenance:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in provenance.items()}
        annotations.append({"Namespace": PROVENANCE, "Description": "where the labels come from", "Value": texts})
    metadata: dict[str, Any] = {
        "axes": "YX",
        "Creator": f"hpddrnet-trt {__version__}",
        "Name": Path(path).name,
        "Channel": {"Name": "classes"},
        "MapAnnotation": annotations,
    }
    if pixel_size_m is not None:
        size = micrometres(pixel_size_m)
        metadata |= {"PhysicalSizeX": size, "PhysicalSizeXUnit": MICROMETRE}
        metadata |= {"PhysicalSizeY": size, "PhysicalSizeYUnit": MICROMETRE}
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            labels,
            ome=True,
            metadata=metadata,
            **palette_options([entry.color for entry in classes]),
            **scale_options(pixel_size_m),
        )
    return Path(path)
