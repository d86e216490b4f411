"""The one table of precisions."""

from __future__ import annotations

from typing import get_args

import pytest
from onnx import TensorProto

from hpddrnet_trt.core.precisions import PRECISIONS, Half, LowPrecision, Precision, is_calibrated, product_precision


def test_every_precision_has_an_entry_and_every_entry_a_type_name() -> None:
    assert tuple(PRECISIONS) == get_args(Precision)
    assert [name for name in PRECISIONS if is_calibrated(name)] == list(get_args(LowPrecision))
    assert {name for name, entry in PRECISIONS.items() if entry.bits == 16} == set(get_args(Half))


@pytest.mark.parametrize("name", PRECISIONS)
def test_types_are_of_the_size_that_the_table_says(name: str) -> None:
    from onnx import helper

    entry = PRECISIONS[name]
    for kind in entry.onnx_types:
        assert helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind)).itemsize == entry.bytes
    tensorrt = pytest.importorskip("tensorrt_rtx")
    assert hasattr(tensorrt.DataType, entry.tensorrt_type)


@pytest.mark.parametrize(
    ("operands", "precision"),
    [(["int8", "int8"], "int8"), (["fp8", "fp16"], "fp16"), (["fp32", "int8"], "fp32"), (["int32", "int8"], "int32")],
)
def test_a_product_is_of_low_precision_only_if_all_its_operands_are(operands: list[str], precision: str) -> None:
    assert product_precision(operands) == precision
    assert not is_calibrated(None)
