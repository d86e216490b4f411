"""Whatever is handed in as an image: the right labels, or one sentence."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.data.intensity import Percentiles
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.inference import Segmenter
from tests.toy import ToyEngine, grey_image, manifest, toy_logits

SEGMENTER = Segmenter(ToyEngine(manifest("labels")), tile=16)


def _one_sentence(problem: ContractError) -> bool:
    text = str(problem)
    return 10 < len(text) < 400 and "\n" not in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((5, 0)), "empty"),
        (np.zeros((5, 5, 3), np.uint8), "expected a grey image"),
        (np.full((5, 5), -np.inf, np.float16), "no finite value"),
        (np.full((5, 5), 1e300), "no finite value"),
        (np.zeros((5, 5), np.int16), "got int16"),
        (np.zeros((5, 5), object), "got object"),
        (np.zeros((5, 5), [("grey", "u1")]), "grey"),
        (np.ma.masked_equal(np.arange(6, dtype=np.uint8).reshape(2, 3), 3), "masked"),
        ([[1, 2], [3, 4]], "got list"),
        ("image.png", "got str"),
        (None, "got NoneType"),
        (Micrograph(None), "got NoneType"),  # type: ignore[arg-type]
        (SimpleNamespace(__dlpack_device__=lambda: None), "does not say where its memory is"),
        (SimpleNamespace(__dlpack__=lambda: 1, __dlpack_device__=lambda: (1, 0)), "cannot be used in place"),
    ],
)
def test_what_is_no_image(image: Any, words: str) -> None:
    with pytest.raises(ContractError, match=words) as problem:
        SEGMENTER.segment(image)
    assert _one_sentence(problem.value)


# dtype, layout and content of any kind: labels of the right shape, or one sentence
DTYPES = st.one_of(
    hnp.unsigned_integer_dtypes(endianness="?"), hnp.integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"), hnp.boolean_dtypes(), hnp.complex_number_dtypes(),
    hnp.byte_string_dtypes(), hnp.datetime64_dtypes(),
)  # fmt: skip
LAYOUTS = {
    "contiguous": lambda array: array,
    "fortran": np.asfortranarray,
    "read-only": lambda array: _frozen(array.copy()),
    "every second": lambda array: np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array,
    "backwards": lambda array: array[::-1] if array.ndim else array,
    "one value": lambda array: np.broadcast_to(array.flat[0], array.shape) if array.size else array,
    "unaligned": lambda array: _unaligned(array),
}


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _unaligned(array: np.ndarray) -> np.ndarray:
    if array.dtype.hasobject or not array.nbytes:
        return array
    raw = np.zeros(array.nbytes + 1, np.uint8)
    raw[1:] = np.frombuffer(array.tobytes(), np.uint8)
    return np.frombuffer(raw.data, array.dtype, offset=1).reshape(array.shape)


@settings(deadline=None, max_examples=300)  # machines can be busy
@given(
    image=DTYPES.flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=20))
    ),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_any_array_gives_labels_or_one_sentence(image: np.ndarray, layout: str) -> None:
    array = LAYOUTS[layout](image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a caller's log stays clean
        if not _usable(array):
            with pytest.raises(ContractError) as problem:
                SEGMENTER.segment(array)
            assert _one_sentence(problem.value)
            return
        found = SEGMENTER.segment(array)
    assert found.labels.shape == array.shape
    assert found.labels.flags.c_contiguous


def _usable(array: np.ndarray) -> bool:
    if array.ndim != 2 or not array.size or array.dtype.str[1:] not in ("u1", "u2", "f2", "f4", "f8"):
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32)).any())


@pytest.mark.parametrize("kind", ["u1", "<u2", ">u2", "<f4", ">f4", "f8", "f2"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layout_and_byte_order_change_nothing(layout: str, kind: str) -> None:
    image = grey_image(20, 30)
    array = LAYOUTS[layout](image.astype(kind))
    before = array.copy()
    found = Segmenter(ToyEngine(), window=(0, 255)).segment(array)
    assert np.array_equal(found.labels, toy_logits(np.ascontiguousarray(array.astype(np.uint8))).argmax(axis=0))
    assert found.window == (0.0, 255.0)
    assert np.array_equal(array, before)


def test_a_contiguous_8_bit_image_reaches_the_engine_without_a_copy() -> None:
    class Seeing(ToyEngine):
        def infer(self, images: np.ndarray) -> Any:
            seen.append(images)
            return super().infer(images)

    seen: list[np.ndarray] = []
    image = _frozen(grey_image(40, 24))
    Segmenter(Seeing(manifest("labels"))).segment(image)
    assert np.shares_memory(seen[0], image)



def test_grey_windows() -> None:
    image = grey_image(20, 30).astype(np.uint16) * 257
    plain = Segmenter(ToyEngine()).segment(image)
    assert np.array_equal(plain.labels, Segmenter(ToyEngine()).segment(grey_image(20, 30)).labels)
    assert plain.window == (0, 65535)
    assert "reach 186 only: taken as 8 bits" in Segmenter(ToyEngine()).segment(image // 257 // 2 + 73).remarks[0]
    chosen = Segmenter(ToyEngine(), window=Percentiles(5, 90)).segment(image)
    assert chosen.window == pytest.approx(tuple(np.percentile(image, (5, 90))))
    assert chosen.provenance is not None
    assert chosen.provenance.window == chosen.window
    fixed = Segmenter(ToyEngine(), window=chosen.window).segment(image)
    assert np.array_equal(fixed.labels, chosen.labels)


def test_arrays_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    image = grey_image(20, 30)
    expected = Segmenter(ToyEngine()).segment(image).labels
    segmenter = Segmenter(ToyEngine(), window=(0, 255))
    tensor = torch.from_numpy(image)
    for array in (tensor, tensor.T.contiguous().T, tensor.to(torch.uint16), tensor.float(), Micrograph(tensor)):
        assert np.array_equal(segmenter.segment(array).labels, expected)
    for array, words in (
        (tensor.float().requires_grad_(), "cannot be used in place"),
        (tensor.to(torch.bfloat16), "cannot be used in place"),
        (tensor.to_sparse(), "cannot be used in place"),
        (tensor.to(torch.int32), "got int32"),
        (tensor[None], r"shape \(1, 20, 30\)"),
    ):
        with pytest.raises(ContractError, match=words):
            segmenter.segment(array)
