"""Which files a comparison takes from a folder, and where a report worth keeping is put."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hpddrnet_trt.benchmark.result import BenchmarkResult
from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.files import write_bytes
from hpddrnet_trt.report.benchmark import ReportFiles
from hpddrnet_trt.weights import locate

MODEL_SUFFIXES = (".safetensors", ".onnx", ".engine")


def model_files(paths: Sequence[str | Path]) -> list[Path]:
    """Model files meant by ``paths``: files as given, those lying directly in given folders, and both of a
    model that comes with the package.

    Checkpoints come first, so that the reference is the first row, then by name. Raises
    :class:`BadInputFile` for a folder without any.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found += dict.fromkeys(locate(path, suffix) for suffix in (".safetensors", ".onnx"))
            continue
        inside = [item for item in path.iterdir() if item.suffix in MODEL_SUFFIXES and not item.name.startswith(".")]
        if not inside:
            raise BadInputFile(f"{path} holds no model file ({', '.join(MODEL_SUFFIXES)}); train or export one first")
        found += sorted(inside, key=lambda item: (MODEL_SUFFIXES.index(item.suffix), item.name))
    return found


def publish_report(files: ReportFiles, result: BenchmarkResult, folder: str | Path) -> Path:
    """Copy the JSON and HTML to ``folder`` as ``<gpu or cpu>-<date>.json|html``; returns the HTML's path."""
    machine = result.machine
    device = machine.gpus[0].name if machine.gpus else machine.cpu
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = f"{name}-{result.created[:10]}"
    write_bytes(Path(folder) / f"{stem}.json", files.json.read_bytes())
    return write_bytes(Path(folder) / f"{stem}.html", files.html.read_bytes())
