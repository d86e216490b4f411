"""HPDDRNet-TRT: semantic segmentation of SEM micrographs, from PyTorch training to TensorRT."""

__version__ = "0.1.0"
