"""Measuring: engines and precisions against the PyTorch reference, in one interleaved run."""
