"""From a checkpoint to an engine file: exact rewrites, ONNX export, precision, calibration, build."""
