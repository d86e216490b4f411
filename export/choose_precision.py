"""FP32 ONNX to the fastest INT8 or FP8 ONNX, with layers in FP16 where needed, that keeps an accuracy budget.

Same as `hpddrnet-trt choose-precision`; `--help` lists the options.
"""

from hpddrnet_trt.cli import choose_precision, run

if __name__ == "__main__":
    run(choose_precision)
