"""FP32 ONNX to INT8 ONNX, with ranges measured on micrographs.

Same as `hpddrnet-trt calibrate`; `--help` lists the options.
"""

from hpddrnet_trt.cli import calibrate, run

if __name__ == "__main__":
    run(calibrate)
