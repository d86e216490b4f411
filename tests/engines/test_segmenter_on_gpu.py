"""The segmenter on TensorRT's engine, with images that are on the GPU already: on simulated CUDA."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import DataRecord
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.inference import Segmenter
from tests.engines.conftest import Bench
from tests.engines.simulated_cuda import ForeignArray
from tests.toy import ToyEngine

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name}, which this test uses without a GPU, is missing"
    )
    for name in ("tensorrt_rtx", "cuda.bindings")
]

Start = Callable[..., Bench]


def _image(*shape: int, dtype: Any = np.uint8) -> npt.NDArray[Any]:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


class DLPackImage:
    """An array "on the GPU" as PyTorch or CuPy hold it: DLPack, and reshape without a copy."""

    def __init__(self, bench: Bench, values: npt.NDArray[Any]) -> None:
        self.shape, self.streams = values.shape, list[int]()
        memory = bench.cuda.array(values)
        pointer = memory.__cuda_array_interface__["data"][0]
        raw = (ctypes.c_uint8 * values.nbytes).from_address(pointer)
        self._values: npt.NDArray[Any] = np.frombuffer(raw, values.dtype).reshape(values.shape)

    def reshape(self, *shape: int) -> DLPackImage:
        other = object.__new__(DLPackImage)
        other.shape, other.streams, other._values = shape, self.streams, self._values.reshape(shape)
        return other

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int) -> Any:
        self.streams.append(stream)
        return self._values.__dlpack__()


@pytest.mark.parametrize("kind", ["labels", "logits"])
def test_an_image_on_the_gpu_is_used_in_place(bench: Start, kind: str) -> None:
    started = bench(kind)
    image = _image(64, 128)
    segmenter = Segmenter(started.engine, confidence=kind == "logits")
    host = segmenter.segment(image)
    on_gpu = started.cuda.array(image)
    started.cuda.log.clear()
    found = segmenter.segment(Micrograph(on_gpu, pixel_size_m=5e-9))  # type: ignore[arg-type]
    assert started.count("copy") == (1 if kind == "labels" else 2)  # what comes out, to the host: this one has a guard
    assert np.array_equal(found.labels, host.labels)
    assert (found.confidence is None) == (kind == "labels")
    assert found.confidence is None or np.allclose(found.confidence, host.confidence)
    assert (found.pixel_size_m, found.window) == (5e-9, (0.0, 255.0))
    out = np.empty((64, 128), np.uint8)
    assert segmenter.segment(on_gpu, out).labels is out
    assert np.array_equal(out, host.labels)
    turned = np.empty((128, 64), np.uint8).T
    assert np.array_equal(segmenter.segment(on_gpu, turned).labels, host.labels)
    several = segmenter.segment_batch([on_gpu, image, on_gpu])
    assert all(np.array_equal(each.labels, host.labels) for each in several)


def test_an_image_on_the_gpu_of_another_pixel_size_is_read_as_it_is_and_told(bench: Start) -> None:
    started = bench()
    started.engine.manifest = started.engine.manifest.replace(data=DataRecord(name="a", pixel_size_m=(5e-9, 5e-9)))
    on_gpu = started.cuda.array(_image(64, 128))
    for size, factor, told in ((5e-9, 1.0, 0), (10e-9, None, 1), (None, None, 0)):
        found = Segmenter(started.engine).segment(Micrograph(on_gpu, pixel_size_m=size))  # type: ignore[arg-type]
        assert (found.rescale, len(found.remarks)) == (factor, told)
    assert "copy the image to the host" in Segmenter(started.engine).segment(
        Micrograph(on_gpu, pixel_size_m=10e-9)  # type: ignore[arg-type]
    ).remarks[0]


def test_dlpack_and_the_callers_stream(bench: Start) -> None:
    started = bench()
    image = _image(64, 128)
    segmenter = Segmenter(started.engine)
    on_gpu = DLPackImage(started, image)
    found = segmenter.segment(on_gpu)
    assert np.array_equal(found.labels, started.truth(image[None, None])[0])
    assert on_gpu.streams == [started.engine.stream]  # the producer orders its work before ours
    started.cuda.log.clear()
    segmenter.segment(started.cuda.array(image), stream=77)
    assert ("record", 77) in started.cuda.log
    with pytest.raises(UsageError, match="stream goes with an image on a GPU"):
        segmenter.segment(image, stream=77)


def test_images_on_a_gpu_that_cannot_be_used(bench: Start) -> None:
    started = bench()
    array = started.cuda.array
    segmenter = Segmenter(started.engine)
    for image, words in (
        (array(_image(64, 128, dtype=np.uint16)), "expected dtype uint8, got uint16 on the GPU"),
        (array(_image(64, 100)), "must be multiples of 8, got 64x100"),
        (array(_image(8, 64)), "height 8 is outside this model's range"),
        (array(_image(1, 64, 64)), r"expected a grey image \[height, width\] on the GPU, got shape \(1, 64, 64\)"),
        (array(_image(0, 64)), "on the GPU, got shape"),
        (ForeignArray(1, _image(64, 128), strides=(256, 2)), "not C-contiguous"),
    ):
        with pytest.raises(ContractError, match=words):
            segmenter.segment(image)
    good = array(_image(64, 128))
    for options in ({"window": (0, 100)}, {"resize": (64, 64)}):
        with pytest.raises(ContractError, match="where it runs as it is: without mode, resize and window"):
            Segmenter(started.engine, **options).segment(good)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="ForeignArray on a GPU, which numpy does not read; copy it to the host"):
        Segmenter(ToyEngine()).segment(good)
    with pytest.raises(ContractError, match="out must be a writable uint8 array"):
        segmenter.segment(good, np.empty((64, 64), np.uint8))
