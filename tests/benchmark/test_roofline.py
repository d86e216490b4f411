"""The floor under an entry's time: from counted kernels and ceilings, and whose graph is counted."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.benchmark.result import Ceilings
from hpddrnet_trt.benchmark.roofline import graph_of, roof, roofs
from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import CalibrationRecord, Manifest, read_manifest
from hpddrnet_trt.graph.work import TypedWork, typed_work
from tests.tiny_onnx import tiny_model

WEIGHTS = Path(__file__).resolve().parents[2] / "hpddrnet_trt" / "weights"


def machine(gigabytes: float = 10.0, **rates: float) -> Ceilings:
    return Ceilings(device="paper", gmacs_per_s={"fp32": 100.0, **rates}, gigabytes_per_s=gigabytes, how="invented")


WORK = {
    "computes": TypedWork("fp32", 10**9, 10**6, 0, 0),  # 10 ms at 100 GMAC/s, 0.1 ms at 10 GB/s
    "moves": TypedWork(None, 0, 2 * 10**7, 0, 3 * 10**7),  # 5 ms
    "both": TypedWork("int8", 10**8, 0, 10**7, 0),  # 1 ms in FP32, 0.25 ms in INT8; 1 ms moves
}


def test_each_kernel_takes_the_longer_of_two_times() -> None:
    found = roof(WORK, machine(int8=400.0), 2, 64, 32)
    assert (found.batch, found.height, found.width) == (2, 64, 32)
    assert found.gmac == pytest.approx(1.1)
    assert found.megabytes == pytest.approx(1 + 50 + 10)
    assert found.compute_ms == pytest.approx(10 + 0.25)
    assert found.floor_ms == pytest.approx(10 + 5 + 1)
    assert found.note is None


@pytest.mark.parametrize("rates", [{}, {"int8": 50.0}])
def test_a_precision_without_a_ceiling_counts_as_fp32(rates: dict[str, float]) -> None:
    found = roof(WORK, machine(gigabytes=1e6, **rates), 1, 64, 64)
    assert found.compute_ms == pytest.approx(10 + 1)
    assert found.note == "INT8 at the rate of FP32"


@given(
    st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 10**9)), min_size=1, max_size=8),
    st.floats(1, 1e4), st.floats(1, 1e4),
)  # fmt: skip
def test_the_floor_lies_between_its_parts_and_their_sum(
    kernels: list[tuple[int, int]], rate: float, gigabytes: float
) -> None:
    work = {str(i): TypedWork("fp16" if macs else None, macs, size, 0, 0) for i, (macs, size) in enumerate(kernels)}
    found = roof(work, machine(gigabytes, fp16=100 + rate), 1, 8, 8)
    moving = found.megabytes / gigabytes
    low, high = max(found.compute_ms, moving), found.compute_ms + moving
    assert low * (1 - 1e-9) <= found.floor_ms <= high * (1 + 1e-9)


def test_roofs_of_the_trained_network() -> None:
    path = WEIGHTS / "nasa-super1.onnx"
    found = roofs(path, read_manifest(path), [(512, 512), (512, 1024)], [1, 2], machine())
    assert [(entry.height, entry.width, entry.batch) for entry in found] == [
        (512, 512, 1), (512, 512, 2), (512, 1024, 1), (512, 1024, 2),
    ]  # fmt: skip
    work = typed_work(onnx.load(str(path)), (2, 1, 512, 1024))
    assert found[3].gmac == sum(kernel.macs for kernel in work.values()) / 1e9
    assert found[1].gmac == 2 * found[0].gmac
    assert found[1].megabytes < 2 * found[0].megabytes  # weights once
    assert all(entry.floor_ms >= entry.compute_ms for entry in found)


def test_roofs_of_autocast() -> None:
    path, ceilings = WEIGHTS / "nasa-super1.onnx", machine(bf16=400.0)
    (full,), (half,) = (
        roofs(path, read_manifest(path), [(512, 512)], [1], ceilings, autocast=kind) for kind in (None, "bf16")
    )
    assert half.gmac == full.gmac
    assert half.compute_ms == pytest.approx(full.compute_ms / 4)
    assert half.megabytes == pytest.approx(full.megabytes / 2, rel=1e-5)


def test_sizes_that_the_file_does_not_take_have_no_roof(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "static.onnx", shape=(1, 32, 48))
    found = roofs(path, read_manifest(path), [(32, 48), (64, 64)], [1, 4], machine())
    assert [(entry.height, entry.width, entry.batch) for entry in found] == [(32, 48, 1)]


# --- whose graph


def described(path: Path) -> Manifest:
    return read_manifest(path)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine's name; none of these tests looks into the file."""
    folder = tmp_path / "engines"
    folder.mkdir()
    path = folder / "model.engine"
    path.write_bytes(b"plan")
    return path


def test_an_engine_does_the_work_of_the_file_it_was_built_from(tmp_path: Path, engine: Path) -> None:
    record = {"method": "max", "images": 4, "source": "noise", "tool": "test"}
    own = tiny_model(tmp_path / "int8.onnx", typing="int8", checkpoint_sha256="c",
                     calibration=CalibrationRecord(images_sha256="a", **record))  # fmt: skip
    other = tiny_model(tmp_path / "other.onnx", typing="int8", checkpoint_sha256="c",
                       calibration=CalibrationRecord(images_sha256="b", **record))  # fmt: skip
    plain = tiny_model(tmp_path / "fp32.onnx", checkpoint_sha256="c")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(BadInputFile):
        read_manifest(broken)
    manifest = read_manifest(own)
    assert graph_of(engine, manifest, [broken, plain, other, own]) == own
    assert graph_of(engine, manifest, [plain, other]) is None
    assert roofs(engine, manifest, [(32, 32)], [1], machine(), [plain, other]) == []
    (found,) = roofs(engine, manifest, [(32, 32)], [1], machine(int8=1e3), [own])
    assert found.gmac == sum(work.macs for work in typed_work(onnx.load(str(own)), (1, 1, 32, 32)).values()) / 1e9
    beside = Path(shutil.copy(own, engine.with_suffix(".onnx")))
    assert graph_of(engine, manifest) == beside


def test_a_checkpoint_does_the_work_of_its_fp32_export(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"weights")
    digest = sha256_of(checkpoint)
    eight = tiny_model(tmp_path / "a.onnx", typing="int8", checkpoint_sha256=digest)
    strange = tiny_model(tmp_path / "b.onnx", checkpoint_sha256="another")
    manifest = read_manifest(eight)
    assert graph_of(checkpoint, manifest) is None
    own = tiny_model(tmp_path / "c.onnx", checkpoint_sha256=digest)
    assert graph_of(checkpoint, manifest, [eight, strange]) == own
    assert graph_of(tmp_path / "foreign.pth", manifest, [own]) is None
    assert graph_of(own, manifest) == own
