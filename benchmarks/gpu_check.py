"""What this machine's GPU makes of the network, in the minutes there are: figures first, and kept as they come.

    python benchmarks/gpu_check.py [--minutes 8] [--checkpoint nasa-super1] [--data DATASET] [--output runs/gpu]

Works through one list, the most wanted first: frames of 1024, then 512, then 2048 pixels, batches of 1, then 8, at each
PyTorch eager and AMP, the engines, PyTorch compiled, and what runs on the processor. One engine is loaded at a time. A
file is made when its turn comes, unless it is in the output folder already, so a run goes on where the last one ended,
and ONNX files made elsewhere (`--prepare`, which needs no GPU) may come along. What has not begun within the minutes is
dropped and named. `result.json` is written after every case; Ctrl-C and SIGTERM end the run and keep what is finished.

Without TensorRT there are PyTorch's rows, and in `runner.json` what the runner adds around a network: copies from and
to page-locked memory, alone and in a CUDA graph. Without --data micrographs are simulated: speed is the same, accuracy
is then only the agreement with the reference.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from hpddrnet_trt.benchmark.baselines import AMP, COMPILED, export_plain
from hpddrnet_trt.benchmark.entries import Entry, reading_of
from hpddrnet_trt.benchmark.images import load_images
from hpddrnet_trt.benchmark.result import BenchmarkResult, make_settings
from hpddrnet_trt.benchmark.run import run_benchmark
from hpddrnet_trt.benchmark.table import format_table
from hpddrnet_trt.cli.options import parse_size
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import existing_file, sha256_of, write_bytes, write_text
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.data.simulate import write_dataset
from hpddrnet_trt.engines import engine_status
from hpddrnet_trt.engines.cuda import (
    CudaGraph,
    DeviceBuffer,
    PinnedBuffer,
    Stream,
    current_device,
    find_gpu,
)
from hpddrnet_trt.export.calibrate import CalibrationSettings, calibrate
from hpddrnet_trt.export.convert import convert_precision
from hpddrnet_trt.export.onnx import export_onnx
from hpddrnet_trt.export.tensorrt import build_engine
from hpddrnet_trt.graph.attention import in_type
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.weights import DEFAULT, locate

SIZES = ("1024x1024", "512x512", "2048x2048")
BATCHES = (1, 8)
SHAPES = "1x1x512x512:1x1x1024x1024:8x1x1024x1024,1x1x2048x2048:1x1x2048x2048:8x1x2048x2048"
ROUNDS = 10  # a turn is a burst of runs: a hundred samples and more of an engine that takes a millisecond
WANTED = ("fp16", "int8", "fp32")  # precisions of engines before PyTorch compiled; the others come after it
OTHERS = ("bf16", "fp16-fp32-scores", "fp8")
COPIES = 50  # timed copies of a kind


class ModelFiles:
    """The files of one checkpoint in a folder, each made when it is asked for, unless it is there.

    Raises :class:`BadInputFile` for a missing checkpoint or dataset, :class:`UsageError` for a folder with the files
    of another checkpoint.
    """

    def __init__(self, checkpoint: str | Path, data: Path, folder: Path) -> None:
        images = find_images(data, "train")
        self.folder, self.checkpoint = folder, folder / "model.safetensors"
        source = existing_file(locate(checkpoint, ".safetensors"), "checkpoint")
        if self.checkpoint.exists() and sha256_of(self.checkpoint) != sha256_of(source):
            raise UsageError(f"{folder} holds files of another checkpoint; choose another folder, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.checkpoint, source.read_bytes())
        shipped = locate(checkpoint, ".onnx")  # where an exporter is missing a shipped model has this

        def fp32(target: Path) -> object:
            exported = shipped.suffix == ".onnx"
            return write_bytes(target, shipped.read_bytes()) if exported else export_onnx(self.checkpoint, target)

        def typed(kind: Any, target: Path) -> object:
            return convert_precision(self.get("model.onnx"), target, kind, images=images)

        def low(settings: CalibrationSettings, target: Path) -> object:
            return calibrate(self.get("model.onnx"), target, images, settings)

        def older(target: Path) -> object:
            model, manifest = load_model(self.get("model.fp16.onnx"))
            return save_model(in_type(model, "fp32"), target, manifest)

        self._recipes: dict[str, Callable[[Path], object]] = {
            "model.onnx": fp32,
            "model.fp16.onnx": partial(typed, "fp16"),
            "model.bf16.onnx": partial(typed, "bf16"),
            "model.fp16-fp32-scores.onnx": older,
            "model.int8.onnx": partial(low, CalibrationSettings()),
            "model.fp8.onnx": partial(low, CalibrationSettings(precision="fp8")),
            "model.int8-cpu.onnx": partial(low, CalibrationSettings(runtime="onnxruntime")),
        }

    @property
    def graphs(self) -> list[str]:
        """Names of the ONNX files."""
        return list(self._recipes)

    def get(self, name: str) -> Path:
        """The ONNX file of that name; raises what making it raises."""
        path = self.folder / name
        if not path.exists():
            self._recipes[name](path)
        return path

    def build(self, graph: str, runtime: Any, target: Path) -> None:
        """An engine of an ONNX file; raises what building it raises."""
        source = self.get(graph)
        precision: Any = read_manifest(source).precision
        build_engine(source, target, precision=precision, runtime=runtime, shapes=SHAPES)


def entries(files: ModelFiles, size: tuple[int, int]) -> list[Entry]:
    """Everything there is to measure here, the most wanted first; ``size`` is the one that compiled entries run."""
    runtimes = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
    usable = {name: label for name, label in runtimes.items() if engine_status(name).usable}

    def engine(kind: str, runtime: str, **options: Any) -> Entry:
        graph = "model.onnx" if kind == "fp32" else f"model.{kind}.onnx"
        target = files.folder / f"{Path(graph).stem}.{runtime}.engine"
        label = f"{usable[runtime]} {kind.upper().replace('-', ' ')}{' without CUDA graphs' if options else ''}"
        return Entry(label, target, runtime, options, make=partial(files.build, graph, runtime, target))

    def torch(label: str, options: dict[str, Any], once: bool = False) -> Entry:
        only = (*size, 1) if once else None
        return Entry(label, files.checkpoint, "torch", {"output": "labels", **options}, only=only)

    def onnx(label: str, name: str, runtime: str, **options: Any) -> Entry:
        return Entry(label, files.folder / name, runtime, options, make=partial(files.get, name))

    wanted = [torch("PyTorch FP32", {}), torch("PyTorch AMP channels last", AMP)]
    for runtime in usable:
        wanted += [engine(kind, runtime) for kind in WANTED]
        wanted.insert(-len(WANTED) + 1, engine("fp16", runtime, graphs=False))
    # Compiled anew for every size and batch, a minute or two each: one of them.
    wanted += [torch("PyTorch compiled AMP", COMPILED | AMP, True), torch("PyTorch compiled", COMPILED, True)]
    wanted += [engine(kind, runtime) for runtime in usable for kind in OTHERS]
    wanted += [
        onnx("ONNX Runtime FP32", "model.onnx", "onnxruntime"),
        onnx("ONNX Runtime INT8", "model.int8-cpu.onnx", "onnxruntime"),
    ]
    if engine_status("openvino").usable:
        wanted.append(onnx("OpenVINO FP32", "model.onnx", "openvino"))
    plain = files.folder / f"model.plain-{size[0]}x{size[1]}.onnx"
    make = partial(export_plain, files.checkpoint, plain, size=size)
    options = {"defaults": True, "device": "auto"}
    return [*wanted, Entry("ONNX Runtime plain export", plain, "onnxruntime", options, make, (*size, 1))]


def runner_parts(size: tuple[int, int]) -> dict[str, float]:
    """Milliseconds of what the runner adds around a network of a grey frame of ``size``, by the GPU's own events.

    Median of a copy of the frame from page-locked memory to the GPU, of its labels back, and of both in a CUDA graph.
    Raises :class:`NoGpu` or :class:`MissingDependency`.
    """
    nbytes = size[0] * size[1]
    find_gpu()
    with current_device(0):
        stream, host, device = Stream(), PinnedBuffer(nbytes), DeviceBuffer(nbytes)

        def upload() -> None:
            stream.copy(device.pointer, host.pointer, nbytes)

        def download() -> None:
            stream.copy(host.pointer, device.pointer, nbytes)

        def both() -> None:
            upload()
            download()

        graph = CudaGraph(stream, both)
        parts = {"upload": upload, "download": download, "both in a CUDA graph": graph.launch}
        times = {name: 1000 * median(stream.timed(part, 2 * COPIES)[COPIES:]) for name, part in parts.items()}
        graph.close()
        for buffer in (host, device):
            buffer.close()
        stream.close()
    return times


def run(arguments: argparse.Namespace) -> int:
    """Everything, within the minutes; returns the exit code."""
    began, output = time.monotonic(), arguments.output
    sizes = [parse_size(size) for size in arguments.size or SIZES]
    training = measured = arguments.data
    if arguments.data is None:
        training = output / "data"
        measured = training / "images" / "test"  # without masks: their classes are not the model's
        if not training.exists():
            write_dataset(training)
    files = ModelFiles(arguments.checkpoint, training, output)
    if arguments.prepare:
        for name in files.graphs:
            print(files.get(name))
        return 0
    try:
        parts = runner_parts(sizes[0])
        write_text(output / "runner.json", json.dumps(parts, indent=1) + "\n")
        print(", ".join(f"{name} {ms:.3f} ms" for name, ms in parts.items()))
    except UserError as exc:
        print(f"the runner's own parts were not timed: {exc}", file=sys.stderr)
    settings = make_settings(
        sizes=tuple(sizes), batches=tuple(arguments.batch or BATCHES), rounds=arguments.rounds, alone=True, gallery=1,
        minutes=max(0.01, arguments.minutes - (time.monotonic() - began) / 60),
    )  # fmt: skip

    def keep(result: BenchmarkResult) -> None:
        write_text(output / "result.json", result.to_json())

    images = load_images(measured, **reading_of([files.checkpoint])._asdict())
    result = run_benchmark(entries(files, sizes[0]), images, settings, keep=keep)
    keep(result)
    print(format_table(result))
    from hpddrnet_trt.report.benchmark import publish_report, write_report  # the figures are safe: it may fail

    report = write_report(result, output)
    if arguments.publish is not None:
        print(f"published: {publish_report(report, result, arguments.publish)}")
    print(f"report: {report.html}")
    return 0 if result.complete else 130


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing more is begun")
    parser.add_argument("--checkpoint", type=Path, default=Path(DEFAULT), help="file, or a shipped model's name")
    parser.add_argument("--data", type=Path, help="dataset with train and test splits")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--publish", type=Path, help="folder for <gpu>-<date>.json and .html")
    parser.add_argument("--prepare", action="store_true", help="only make the ONNX files, to bring along")
    parser.add_argument("--size", action="append", help=f"timed frame; repeat for several; default: {', '.join(SIZES)}")
    parser.add_argument("--batch", type=int, action="append", help="frames per inference; repeat; default: 1 and 8")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each engine at each size and batch")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return run(arguments)
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print("error: interrupted before anything was measured", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
