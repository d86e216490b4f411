"""HPDDRNet-TRT: semantic segmentation of SEM micrographs, from PyTorch training to TensorRT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpddrnet_trt.segmentation import Segmentation
    from hpddrnet_trt.segmenter import Segmenter, load_segmenter

__version__ = "0.1.0"
__all__ = ["Segmentation", "Segmenter", "__version__", "load_segmenter"]


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use, so that a lower layer never loads a higher one."""
    if name == "Segmentation":
        from hpddrnet_trt import segmentation

        return segmentation.Segmentation
    if name in ("Segmenter", "load_segmenter"):
        from hpddrnet_trt import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
