"""HPDDRNet-TRT: semantic segmentation of SEM micrographs, from PyTorch training to TensorRT."""

from hpddrnet_trt.segmentation import Segmentation
from hpddrnet_trt.segmenter import Segmenter, load_segmenter

__version__ = "0.1.0"
__all__ = ["Segmentation", "Segmenter", "__version__", "load_segmenter"]
