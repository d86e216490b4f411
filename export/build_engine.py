"""ONNX to TensorRT engine in FP32, FP16 or INT8.

Same as `hpddrnet-trt build`; `--help` lists the options.
"""

from hpddrnet_trt.cli import build, run

if __name__ == "__main__":
    run(build)
