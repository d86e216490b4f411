"""What this machine reaches at most: multiply-accumulates per second by precision, and bytes moved.

The two ceilings of a roofline (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model
for multicore architectures", Commun. ACM 52(4), 2009), measured instead of read from a data sheet. On a
CPU every runtime that is installed multiplies large matrices and runs 3x3 convolutions, and the
fastest counts, since a ceiling is what can be reached; on an NVIDIA GPU it is PyTorch. Candidates take
turns, so that a disturbance hits all of them, and of each the best run counts: disturbances only
ever slow a run down.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpddrnet_trt.benchmark.machine import describe_machine, usable_cores
from hpddrnet_trt.benchmark.result import Ceilings
from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import NoGpu, UsageError, require

if TYPE_CHECKING:
    import onnx

_Kind = Literal["matrix product", "3x3 convolution"]

BUDGET_S = 2.0  # of all timed products together, at least ROUNDS of each
ROUNDS = 3
# Products in a row, so that getting data in and out is a small part; more where they are faster.
CHAINS: dict[_Kind, int] = {"matrix product": 3, "3x3 convolution": 16}
_GIB = 1 << 30
_SIDE = 1024  # of a matrix
_CHANNELS, _IMAGE = 256, 64  # of a convolution: as its data fits into a core's cache, only computing counts


@dataclass(frozen=True)
class Candidate:
    """One way to multiply: ``run`` does ``macs`` multiply-accumulates in ``precision`` and returns when they are done.

    ``how``: for people, e.g. ``OpenVINO 3x3 convolution``. ``clock``: seconds of one run, where the host's clock
    would not do.
    """

    precision: str
    how: str
    macs: int
    run: Callable[[], object]
    clock: Callable[[Callable[[], object]], float] | None = None

    def seconds(self) -> float:
        if self.clock is not None:
            return self.clock(self.run)
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


def measure_ceilings(threads: int | None = None, device: str = "cpu") -> Ceilings:
    """Measure this machine's ceilings; takes some seconds, during which nothing else should run.

    ``threads``: of the CPU, default what each library takes by itself (copies: all usable cores). ``device``: ``cpu``,
    or ``cuda`` (``cuda:1`` ...), which needs PyTorch with CUDA. FP32 is plain FP32, without TF32. A
    precision without hardware or without a library that uses it is left out. Raises :class:`UsageError` for
    another device or less than one thread, :class:`MissingDependency` or :class:`NoGpu` for a GPU
    that PyTorch cannot use.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"ceilings are measured on cpu or cuda, not on {device!r}")
    with ExitStack() as stack:
        if device == "cpu":
            candidates = _cpu_candidates(threads, stack)
            name = f"{describe_machine().cpu}, {_threads_text(threads)}"
            rate, copied = _cpu_bandwidth(threads or usable_cores())
        else:
            torch = _torch_with_cuda()
            stack.enter_context(_plain_fp32(torch))
            candidates = _cuda_candidates(torch, device)
            name = torch.cuda.get_device_name(device)
            rate, copied = _cuda_bandwidth(torch, device)
        best = fastest(candidates)
    return Ceilings(
        device=name,
        gmacs_per_s={precision: rate for precision, (rate, _) in best.items()},
        gigabytes_per_s=rate,
        how=_how(best, copied),
    )


def fastest(candidates: list[Candidate], budget_s: float = BUDGET_S) -> dict[str, tuple[float, str]]:
    """By precision the best candidate's 10^9 multiply-accumulates per second, and how it did it.

    One untimed run each, then rounds in which each candidate runs once, until ``budget_s`` is spent.
    """
    for candidate in candidates:
        candidate.run()
    least = [float("inf")] * len(candidates)
    begin, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - begin < budget_s:
        for index, candidate in enumerate(candidates):
            least[index] = min(least[index], candidate.seconds())
        rounds += 1
    best: dict[str, tuple[float, str]] = {}
    for candidate, seconds in zip(candidates, least, strict=True):
        rate = candidate.macs / seconds / 1e9
        if rate > best.get(candidate.precision, (0.0, ""))[0]:
            best[candidate.precision] = (rate, candidate.how)
    return best


def _how(best: Mapping[str, tuple[float, str]], copied: int) -> str:
    products = ", ".join(f"{precision} {how}" for precision, (_, how) in best.items())
    return f"{products}; copy of {copied / _GIB:.2g} GiB; best of at least {ROUNDS} runs each, taken in turns"


# ------------------------------------------------------------------------------------- CPU


def _threads_text(threads: int | None) -> str:
    count = threads or usable_cores()
    return f"{count} thread{'s' if count > 1 else ''}"


def _cpu_candidates(threads: int | None, stack: ExitStack) -> list[Candidate]:
    found: list[Candidate] = []
    kinds: tuple[_Kind, ...] = ("matrix product", "3x3 convolution")
    for kind in kinds:
        if importlib.util.find_spec("onnxruntime") is not None:
            found += _onnxruntime_candidates(kind, threads)
        if importlib.util.find_spec("openvino") is not None:
            found += _openvino_candidates(kind, threads)
    if importlib.util.find_spec("torch") is not None:
        found += _torch_cpu_candidates(threads, stack)
    if threads is None:  # its number of threads is fixed before it is imported
        found.append(_numpy_candidate())
    return found


def product_model(kind: _Kind, quantised: bool) -> onnx.ModelProto:
    """:data:`CHAINS` equal products in a row as an ONNX model: float32 ``x`` in, float32 ``y`` out.

    ``quantised``: in INT8, data and weights symmetric around zero, by Q/DQ pairs before each product as in the
    package's own INT8 files.
    """
    onnx = require("onnx", "export", "measure the machine's ceilings")
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    shape = (_SIDE, _SIDE) if kind == "matrix product" else (_CHANNELS, _CHANNELS, 3, 3)
    weights = rng.normal(0, (_SIDE if len(shape) == 2 else 9 * _CHANNELS) ** -0.5, shape).astype(np.float32)
    constants: dict[str, Any] = {"w": weights}
    if quantised:
        step = np.float32(np.abs(weights).max() / 127)
        whole = np.round(weights / step).astype(np.int8)
        constants = {"w": whole, "w_step": step, "x_step": np.float32(4 / 127), "zero": np.int8(0)}
    nodes, x = [], "x"
    if quantised:
        nodes.append(helper.make_node("DequantizeLinear", ["w", "w_step", "zero"], ["w_float"]))
    for turn in range(CHAINS[kind]):
        if quantised:
            nodes.append(helper.make_node("QuantizeLinear", [x, "x_step", "zero"], [f"q{turn}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{turn}", "x_step", "zero"], [f"d{turn}"]))
            x = f"d{turn}"
        y = "y" if turn == CHAINS[kind] - 1 else f"y{turn}"
        operands = [x, "w_float" if quantised else "w"]
        if kind == "matrix product":
            nodes.append(helper.make_node("MatMul", operands, [y]))
        else:
            nodes.append(helper.make_node("Conv", operands, [y], pads=[1, 1, 1, 1]))
        x = y
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, _input_shape(kind)) for name in ("x", "y")
    ]
    initialisers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "products", ports[:1], ports[1:], initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _input_shape(kind: _Kind) -> list[int]:
    return [_SIDE, _SIDE] if kind == "matrix product" else [1, _CHANNELS, _IMAGE, _IMAGE]


def _macs(kind: _Kind) -> int:
    return CHAINS[kind] * (_SIDE**3 if kind == "matrix product" else _IMAGE**2 * _CHANNELS**2 * 9)


def _input(kind: _Kind) -> Any:
    # Random, not zeros: some hardware is faster on zeros.
    return np.random.default_rng(1).normal(size=_input_shape(kind)).astype(np.float32)


def _onnxruntime_candidates(kind: _Kind, threads: int | None) -> Iterator[Candidate]:
    x = _input(kind)
    for precision in ("fp32", "int8"):
        model = product_model(kind, precision == "int8")
        session = runtimes.session(model, "measure the machine's ceilings", threads=threads)
        yield Candidate(precision, f"ONNX Runtime {kind}", _macs(kind), partial(session.run, None, {"x": x}))


def _openvino_candidates(kind: _Kind, threads: int | None) -> Iterator[Candidate]:
    openvino = runtimes.load_openvino("measure the machine's ceilings")

    core = openvino.Core()
    capable = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    hints = {"FP32": "f32", "BF16": "bf16", "FP16": "f16", "INT8": "f32"}
    for capability, hint in hints.items():
        if capability not in capable:
            continue
        model = core.read_model(product_model(kind, capability == "INT8").SerializeToString())
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(_input(kind)))
        yield Candidate(capability.lower(), f"OpenVINO {kind}", _macs(kind), request.infer)


def _torch_cpu_candidates(threads: int | None, stack: ExitStack) -> Iterator[Candidate]:
    import torch

    if threads is not None:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
    hardware = torch.cpu.get_capabilities()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if precision == "bf16" and not any(hardware.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")):
            continue  # emulated
        a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
        yield Candidate(precision, "PyTorch matrix product", _SIDE**3, partial(torch.mm, a, b))


def _numpy_candidate() -> Candidate:
    a, b = (_input("matrix product") for _ in range(2))
    return Candidate("fp32", "NumPy matrix product", _SIDE**3, lambda: a @ b)


def _cpu_bandwidth(threads: int) -> tuple[float, int]:
    """10^9 bytes per second read and written by copying, and the bytes copied, shared out to ``threads``."""
    psutil = require("psutil", "benchmark", "measure memory bandwidth")
    # Source and target together are four times the last cache, within what is quickly had and leaves others room.
    size = min(max(2 * _last_cache(), _GIB // 4), _GIB // 2, int(psutil.virtual_memory().available) // 8)
    source, target = (np.full(size // 8, value) for value in (1.0, 0.0))  # written once, so that memory is there
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    least = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))  # releases the interpreter's lock
            least = min(least, time.perf_counter() - start)
    return 2 * source.nbytes / least / 1e9, int(source.nbytes)


def _last_cache() -> int:
    """Bytes of the largest cache of the first core; 64 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1] in units:
            found.append(int(text[:-1]) * units[text[-1]])
    return max(found, default=64 << 20)


# ------------------------------------------------------------------------------------ CUDA


def _torch_with_cuda() -> Any:
    torch = require("torch", "export", "measure a GPU's ceilings")
    if not torch.cuda.is_available():
        raise NoGpu("PyTorch sees no NVIDIA GPU; check its CUDA build and the driver, or measure the cpu's ceilings")
    return torch


@contextmanager
def _plain_fp32(torch: Any) -> Iterator[None]:
    """FP32 products in FP32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _cuda_candidates(torch: Any, device: str) -> list[Candidate]:
    """Matrix products of a side that fills the GPU; precisions it does not have are left out."""
    total = torch.cuda.get_device_properties(device).total_memory
    side = 8192 if total >= 12 * _GIB else 4096

    def matrix(dtype: Any) -> Any:
        return torch.randn(side, side, device=device).to(dtype)

    def whole() -> Any:
        return torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8)

    def floating(dtype: Any) -> Callable[[], object]:
        a, b = matrix(dtype), matrix(dtype)
        return lambda: torch.mm(a, b)

    def int8() -> Callable[[], object]:
        a, b = whole(), whole().t()  # the second operand column by column, as the kernels want it
        return lambda: torch._int_mm(a, b)

    def fp8() -> Callable[[], object]:
        a, b = matrix(torch.float8_e4m3fn), matrix(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "fp32": lambda: floating(torch.float32),
        "fp16": lambda: floating(torch.float16),
        "int8": int8,
    }
    if torch.cuda.is_bf16_supported(including_emulation=False):
        makers["bf16"] = lambda: floating(torch.bfloat16)
    if torch.cuda.get_device_capability(device) >= (8, 9):
        makers["fp8"] = fp8
    found = []
    for precision, make in makers.items():
        try:
            run = make()
            run()
            torch.cuda.synchronize(device)
        except (RuntimeError, NotImplementedError, AttributeError):
            continue  # not in this build of PyTorch
        clock = _cuda_clock(torch, device)
        found.append(Candidate(precision, "PyTorch matrix product", side**3, run, clock))
    return found


def _cuda_clock(torch: Any, device: str, repeats: int = 5) -> Callable[[Callable[[], object]], float]:
    """Seconds of one of ``repeats`` runs that follow each other on the GPU."""

    def clock(run: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / repeats

    return clock


def _cuda_bandwidth(torch: Any, device: str) -> tuple[float, int]:
    """10^9 bytes per second read and written by a copy on the GPU, and the bytes copied."""
    free, _ = torch.cuda.mem_get_info(device)
    size = min(_GIB, free // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    clock = _cuda_clock(torch, device)
    least = min(clock(lambda: target.copy_(source)) for _ in range(ROUNDS + 1))
    return 2 * size / least / 1e9, int(size)
