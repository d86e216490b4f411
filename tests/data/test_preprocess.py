"""Sizes, padding and the way back, against the authors' pipeline where it gives figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import AxisRange, InputContract, Normalization
from hpddrnet_trt.data.preprocess import (
    TtaTransform,
    keep_ratio_size,
    network_input,
    pad,
    padded_size,
    plan_tta,
    scaled_size,
)
from tests.toy import grey_image

SIZES = st.integers(1, 70)


def test_sizes_of_the_authors_pipeline(golden: Path) -> None:
    tables = json.loads((golden / "pipeline" / "pipeline.json").read_text())
    rows = tables["resize_table_scale_2048x1024_keep_ratio"]
    for row in rows:
        assert keep_ratio_size(row["h"], row["w"], (2048, 1024)) == (row["out_h"], row["out_w"]), row
    for row in tables["tta_resize_table"]:
        assert scaled_size(row["h"], row["w"], row["ratio"]) == (row["out_h"], row["out_w"]), row
    assert len(rows) == 16


def test_transforms_of_each_mode() -> None:
    assert plan_tta("single", 5, 7) == [TtaTransform(5, 7)]
    assert plan_tta("flip", 5, 7) == [TtaTransform(5, 7), TtaTransform(5, 7, True)]
    wide = plan_tta("multiscale", 128, 64)
    assert [(transform.height, transform.flip) for transform in wide] == [
        (height, flip) for height in (64, 96, 128, 160, 192, 224) for flip in (False, True)
    ]
    assert plan_tta("single", 60, 30, (20, 10)) == [TtaTransform(20, 10)]
    with pytest.raises(UsageError, match="unknown mode 'double'"):
        plan_tta("double", 5, 7)


@settings(deadline=None)  # machines can be busy
@given(height=SIZES, width=SIZES, bottom=st.integers(0, 200), right=st.integers(0, 200))
def test_padding_is_reflection(height: int, width: int, bottom: int, right: int) -> None:
    image = grey_image(height, width)
    padded = pad(image, height + bottom, width + right)
    assert np.array_equal(padded, np.pad(image, ((0, bottom), (0, right)), mode="reflect"))
    filled = pad(image, height + bottom, width + right, fill=255)
    assert np.array_equal(filled, np.pad(image, ((0, bottom), (0, right)), constant_values=255))


@settings(deadline=None)  # machines can be busy
@given(size=st.integers(1, 300), minimum=st.integers(1, 100), multiple=st.sampled_from([1, 8, 32]))
def test_padded_size_is_the_smallest_admitted(size: int, minimum: int, multiple: int) -> None:
    found = padded_size(size, AxisRange(minimum=minimum), multiple, "width")
    assert found % multiple == 0
    assert found >= max(size, minimum)
    assert found - multiple < max(size, minimum)


def test_padded_size_beyond_the_model() -> None:
    axis = AxisRange(minimum=64, maximum=64)
    assert padded_size(1, axis, 8, "height") == 64
    with pytest.raises(ContractError, match="image height of 65 pixels does not fit this model, which takes 64"):
        padded_size(65, axis, 8, "height")


@settings(deadline=None)  # machines can be busy
@given(height=SIZES, width=SIZES, flip=st.booleans())
def test_way_back_is_exact_without_resize(height: int, width: int, flip: bool) -> None:
    image, transform = grey_image(height, width), TtaTransform(height, width, flip)
    padded = network_input([transform.apply(image)], InputContract(), Normalization())
    assert padded.shape[2] % 8 == padded.shape[3] % 8 == 0
    restored = transform.restore_scores(padded[0].astype(np.float32), height, width)
    assert np.array_equal(restored[0], image)
    if not flip:
        assert np.array_equal(transform.restore_plane(padded[0, 0], height, width), image)


def test_scores_return_by_bilinear_interpolation() -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch's interpolation")
    scores = np.random.default_rng(0).normal(size=(3, 40, 56)).astype(np.float32)
    for height, width in ((90, 33), (38, 55), (200, 300)):
        found = TtaTransform(38, 54).restore_scores(scores, height, width)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(scores[None, :, :38, :54]), size=(height, width), mode="bilinear", align_corners=False
        )[0].numpy()
        assert np.abs(found - expected).max() < 5e-5


def test_labels_return_by_nearest_neighbour() -> None:
    labels = np.repeat(np.repeat(np.array([[0, 1], [2, 255]], np.uint8), 8, 0), 8, 1)
    assert np.array_equal(TtaTransform(16, 16).restore_plane(labels, 2, 2), [[0, 1], [2, 255]])


@pytest.mark.parametrize("colour", [False, True])
def test_float_input_is_normalised_as_torch_does(colour: bool) -> None:
    image = np.random.default_rng(1).integers(0, 256, (12, 10, 3) if colour else (12, 10)).astype(np.uint8)
    found = network_input([image], InputContract(dtype="float32", channels=3), Normalization())
    assert found.dtype == np.float32
    assert found.shape == (1, 3, 16, 16)
    channels = image.transpose(2, 0, 1) if colour else np.stack([image] * 3)
    for channel, (mean, std) in enumerate(zip(Normalization().mean, Normalization().std, strict=True)):
        expected = (channels[channel].astype(np.float32) - np.float32(mean)) / np.float32(std)
        assert np.array_equal(found[0, channel, :12, :10], expected)


def test_fitting_image_is_not_copied() -> None:
    image = grey_image(16, 24)
    assert np.shares_memory(network_input([image], InputContract(), Normalization()), image)
