"""Measuring: engines and precisions against the PyTorch reference, in one interleaved run."""

from __future__ import annotations

from hpddrnet_trt.benchmark.entries import Entry, entries_for
from hpddrnet_trt.benchmark.images import Image, ImageSet, load_images
from hpddrnet_trt.benchmark.result import BenchmarkResult, Settings, load_result, make_settings
from hpddrnet_trt.benchmark.run import run_benchmark
from hpddrnet_trt.benchmark.table import format_table

__all__ = [
    "BenchmarkResult",
    "Entry",
    "Image",
    "ImageSet",
    "Settings",
    "entries_for",
    "format_table",
    "load_images",
    "load_result",
    "make_settings",
    "run_benchmark",
]
