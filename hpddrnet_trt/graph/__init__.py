"""ONNX in, ONNX out: graphs checked, rewritten, quantized and counted, below any engine."""
