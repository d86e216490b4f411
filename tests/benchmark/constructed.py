"""A result with everything in it, made up: what a run on a machine with a GPU would give, and how it scales."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpddrnet_trt.benchmark.images import Image, picture
from hpddrnet_trt.benchmark.machine import Gpu, GpuState, Machine
from hpddrnet_trt.benchmark.result import (
    Accuracy,
    BenchmarkResult,
    Environment,
    LayerGroups,
    Memory,
    Picture,
    RooflineBound,
    Row,
    Settings,
    Start,
    Timing,
)
from hpddrnet_trt.benchmark.timing import Ratio
from hpddrnet_trt.core.intervals import Interval
from hpddrnet_trt.core.manifest import ClassInfo

CLASSES = [
    ClassInfo(name="matrix", color=(68, 1, 84)),
    ClassInfo(name="secondary", color=(253, 231, 37)),
    ClassInfo(name="tertiary", color=(33, 145, 140)),
]
SIZES = ((512, 512), (1024, 1024), (2048, 2048))
ROUNDS = 40
PARTS = {"stem": 0.2, "spatial branch": 0.12, "context branch": 0.16, "bilateral fusion": 0.06,
         "channel attention": 0.02, "position attention": 0.22, "pyramid": 0.04, "head": 0.08, "output": 0.06,
         "conversions": 0.03, "other": 0.01}  # fmt: skip


class Kind(NamedTuple):
    """An entry: median at 1024x1024 end to end, the part around the network, mIoU, megabytes at that size."""

    label: str
    runtime: str
    precision: str
    ms: float
    around: float
    miou: float
    mib: float
    gpu: float | None = None
    quadratic: float = 0.0  # share of the memory that grows with the square of the pixels
    environment: int = 0


KINDS = (
    Kind("PyTorch FP32", "torch 2.13.0 (CPU, 2 threads)", "FP32", 612, 20, 0.8123, 900, quadratic=0.05),
    Kind("PyTorch BF16 channels last", "torch 2.13.0 (CPU, 2 threads)", "BF16", 420, 18, 0.8119, 700, quadratic=0.03),
    Kind("PyTorch FP32 compiled", "torch 2.13.0 (CPU, 2 threads)", "FP32", 330, 12, 0.8123, 1100),
    Kind("ONNX Runtime FP32", "onnxruntime 1.31.1 (CPU, 2 threads)", "FP32", 249, 1.1, 0.8123, 420),
    Kind("OpenVINO FP32", "openvino 2026.4.1 (CPU, 2 threads)", "FP32", 193, 1.3, 0.8123, 510),
    Kind("OpenVINO INT8 Q/DQ", "openvino 2026.4.1 (CPU, 2 threads)", "INT8", 117, 1.2, 0.8098, 380),
    Kind("TensorRT FP16", "tensorrt 10.9 (Example GPU)", "FP16", 1.42, 0.21, 0.8120, 650, 410, environment=1),
)

# Fourteen entries with long names, half of them close together.
MANY = (
    *KINDS[:-1],
    *(Kind(f"TensorRT FP16 attention form {form} with CUDA graphs", "tensorrt 10.9 (Example GPU)", "FP16",
           100 - 3 * form, 2, 0.8121, 500, 300) for form in range(4)),
    Kind("another runtime FP16", "another 2.13", "FP16", 95, 2, 0.8121, 500, 300),
    Kind("ONNX Runtime INT8 (fine-tuned-nasa-super1-u8s8.onnx)", "onnxruntime 1.31.1", "INT8", 130, 1, 0.8050, 300),
    Kind("something else", "unknown", "FP8", 140, 1, 0.8090, 300),
    Kind("TensorRT-RTX BF16", "tensorrt-rtx 1.7", "BF16", 92, 2, 0.8121, 510, 300),
)  # fmt: skip


def result(kinds: tuple[Kind, ...] = KINDS) -> BenchmarkResult:
    """The first entry is the reference; one more, an engine for another GPU, did not run."""
    rng = np.random.default_rng(3)
    rows = [_row(kind, kinds[0], rng) for kind in kinds]
    lonely = Row(
        label="TensorRT INT8", file="int8.engine", file_bytes=8_100_000, runtime="auto", precision="INT8",
        status="not run", reason="int8.engine was built for another GPU; build it on this one",
    )  # fmt: skip
    libraries = {"numpy": "2.4.1", "torch": "2.13.0", "onnxruntime": "1.31.1"}
    return BenchmarkResult(
        created="2031-02-03T04:05:06+00:00",
        command="python benchmarks/benchmark.py runs/demo --data FOLDER --size 1024x1024",
        complete=True,
        settings=Settings(sizes=SIZES, batches=(1, 4), rounds=ROUNDS),
        machine=Machine(
            system="Linux 6.1 (x86_64)", python="3.11.9", cpu="Example CPU", cores_physical=2, cores_usable=2,
            memory_gib=15.6, gpus=[Gpu(name="Example GPU", driver="999.1", memory_mib=141_000)], libraries=libraries,
            load_average=0.1, busy_share=0.01, warnings=[],
        ),
        engines={"torch": "2.13.0", "tensorrt-rtx": "not installed"},
        busy_share=0.02,
        data="nasa-super1/test, 4 images",
        data_notes=["timed frames were cut from the images"],
        classes=CLASSES,
        reference=kinds[0].label,
        rows=[*rows, lonely],
        warnings=["the driver does not report energy"],
        pictures=[_picture(f"image-{index}", [kind.label for kind in kinds], rng) for index in range(2)],
        environments=[
            Environment(created="2031-02-03T04:05:06+00:00", command="python benchmarks/benchmark.py runs/demo",
                        python="3.11.9", libraries=libraries),
            Environment(created="2031-02-03T05:05:06+00:00", command="python benchmarks/benchmark.py runs/demo --merge",
                        python="3.10.2", libraries={"numpy": "2.2.0", "tensorrt": "10.9.0"}),
        ],
        bound_source="Example GPU, from its data sheet",
        gpu_states=[GpuState(name="Example GPU", sm_clock_mhz=(1755, 1980, 1980), power_w=312.0, temperature_c=51,
                             throttled=[], sm_clock_limit_mhz=1980, idle_share=0.02)],
    )  # fmt: skip


def _row(kind: Kind, reference: Kind, rng: np.random.Generator) -> Row:
    shapes = [(*size, batch) for size in SIZES for batch in (1, 4) if size != (2048, 2048) or batch == 1]
    timings = [_timing(kind, reference, shape, kind.ms, rng) for shape in shapes]
    return Row(
        label=kind.label, file=f"{kind.precision.lower()}.onnx", file_bytes=23_400_000, runtime=kind.runtime,
        precision=kind.precision, status="measured", notes=["ran with a workaround"] if "INT8" in kind.label else [],
        attention="fused" if kind.gpu else "row blocks of 1024", build_s=41.5 if kind.gpu else None,
        start=Start(load_s=1.2, first_s=0.8, host_peak_mib=kind.mib * 4, device_mib=kind.gpu, frame="1x2048x2048"),
        memory=[
            Memory(height=edge, width=edge, batch=1, host_peak_mib=_mib(kind.mib, edge, kind.quadratic),
                   device_mib=None if kind.gpu is None else _mib(kind.gpu, edge, 0))
            for edge in (512, 1024, 2048, 4096)
        ],
        end_to_end=timings,
        inference=[_timing(kind, reference, shape, kind.ms - kind.around, rng, by_events=kind.gpu is not None)
                   for shape in shapes],
        throughput=[_timing(kind, reference, shape, 0.9 * kind.ms, rng, joules=0.4) for shape in shapes],
        layers=[LayerGroups(height=1024, width=1024, batch=1,
                            groups={name: 1.1 * kind.ms * share for name, share in PARTS.items()})],
        bounds=[RooflineBound(height=1024, width=1024, batch=1, milliseconds=0.14 if kind.gpu else 88.0)],
        accuracy=Accuracy(images=6, agreement=1 - abs(reference.miou - kind.miou), masked_images=6, miou=kind.miou,
                          miou_interval=Interval(kind.miou, kind.miou - 0.04, kind.miou + 0.03, 6),
                          pixel_accuracy=0.95, iou=[0.9, kind.miou, 0.7]),
        environment=kind.environment,
    )  # fmt: skip


def _mib(at_quoted: float, edge: int, quadratic: float) -> float:
    pixels = edge**2 / 1024**2
    return 120 + at_quoted * ((1 - quadratic) * pixels + quadratic * pixels**2)


def _timing(
    kind: Kind, reference: Kind, shape: tuple[int, int, int], ms: float, rng: np.random.Generator,
    joules: float | None = None, by_events: bool = False,
) -> Timing:  # fmt: skip
    height, width, batch = shape
    scale = height * width / 1024**2 * batch**0.93
    samples = ms * scale * (1 + rng.gamma(1.5, 0.02, ROUNDS))
    p50, p95, p99 = (float(value) for value in np.percentile(samples, [50, 95, 99]))
    ratio = 1.03 * reference.ms * scale / p50
    spread = 0.3 if kind.precision == "BF16" else 0.01
    return Timing(
        height=height, width=width, batch=batch, samples_ms=[round(float(value), 4) for value in samples],
        p50_ms=p50, p95_ms=p95, p99_ms=p99, max_ms=float(samples.max()), images_per_s=1000 * batch / p50,
        ratio=Ratio(value=ratio, low=ratio * (1 - spread), high=ratio * (1 + spread), paired=kind.environment == 0),
        warmup=6, steady="compiled" not in kind.label, joules_per_image=joules, by_events=by_events,
        burst=2, uncounted=2, cold_ms=1.2 * p50,
    )  # fmt: skip


def _picture(name: str, labels: list[str], rng: np.random.Generator) -> Picture:
    mask = np.repeat(np.repeat(rng.integers(0, 3, (8, 12)), 8, 0), 8, 1).astype(np.uint8)
    grey = (60 * mask + rng.integers(0, 60, mask.shape)).astype(np.uint8)
    planes = {label: np.where(rng.random(mask.shape) < 0.02, 1, mask).astype(np.uint8) for label in labels}
    return picture(Image(name, grey, mask), planes)
