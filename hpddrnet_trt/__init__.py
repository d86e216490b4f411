"""HPDDRNet-TRT: semantic segmentation of SEM micrographs, from PyTorch training to TensorRT."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpddrnet_trt.core.domain import Domain
    from hpddrnet_trt.data.micrograph import Micrograph, read_micrograph
    from hpddrnet_trt.export.rebuild import rebuild_engine
    from hpddrnet_trt.inference import Segmenter, load_segmenter
    from hpddrnet_trt.inference.result import Provenance, Segmentation
    from hpddrnet_trt.mosaic.cluster import ClusterSettings
    from hpddrnet_trt.mosaic.plan import MosaicPlan, plan_mosaic
    from hpddrnet_trt.mosaic.prepare import MosaicOptions
    from hpddrnet_trt.mosaic.run import MosaicRun, segment_mosaic
    from hpddrnet_trt.packages import PackageSettings, package_model
    from hpddrnet_trt.packages.triton import TritonSettings, export_triton
    from hpddrnet_trt.stream import State, Stream, StreamResult, StreamStatistics

__version__ = "0.1.0"
__all__ = [
    "ClusterSettings",
    "Domain",
    "Micrograph",
    "MosaicOptions",
    "MosaicPlan",
    "MosaicRun",
    "PackageSettings",
    "Provenance",
    "Segmentation",
    "Segmenter",
    "State",
    "Stream",
    "StreamResult",
    "StreamStatistics",
    "TritonSettings",
    "__version__",
    "export_triton",
    "load_segmenter",
    "package_model",
    "plan_mosaic",
    "read_micrograph",
    "rebuild_engine",
    "segment_mosaic",
]

_HOMES = {
    "Domain": "core.domain",
    "Micrograph": "data.micrograph",
    "read_micrograph": "data.micrograph",
    "rebuild_engine": "export.rebuild",
    "ClusterSettings": "mosaic.cluster",
    "MosaicOptions": "mosaic.prepare",
    "MosaicPlan": "mosaic.plan",
    "plan_mosaic": "mosaic.plan",
    "MosaicRun": "mosaic.run",
    "segment_mosaic": "mosaic.run",
    "PackageSettings": "packages",
    "package_model": "packages",
    "TritonSettings": "packages.triton",
    "export_triton": "packages.triton",
    "Provenance": "inference.result",
    "Segmentation": "inference.result",
    "Segmenter": "inference",
    "load_segmenter": "inference",
    "State": "stream",
    "Stream": "stream",
    "StreamResult": "stream",
    "StreamStatistics": "stream",
}


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use, so that a lower layer never loads a higher one."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"hpddrnet_trt.{_HOMES[name]}"), name)
