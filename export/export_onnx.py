"""Checkpoint to one self-describing ONNX file, compared with PyTorch.

Same as `hpddrnet-trt export`; `--help` lists the options.
"""

from hpddrnet_trt.cli import export, run

if __name__ == "__main__":
    run(export)
