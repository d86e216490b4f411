"""The output of pooled features: the same numbers in every form of a network, whose labels stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

pytest.importorskip("torch", reason="the truth is PyTorch")

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.export.onnx import simplified
from hpddrnet_trt.graph.domain import OUTPUT, domain_nodes, domain_tensor, with_domain
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.graph.rounding import simulate_rounding
from hpddrnet_trt.models.domain import domain_features
from tests.graph.parsed_rtx import Parsed, needs_rtx
from tests.tiny_export import exported, frames, small_model
from tests.tiny_network import lively, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def guarded() -> onnx.ModelProto:
    return with_domain(exported()[0])


def run(model: onnx.ModelProto, image: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    names = [entry.name for entry in model.graph.output]
    return dict(zip(names, runtimes.session(model, "test").run(None, {"image": image}), strict=True))


def test_features_are_pytorchs_at_every_size_and_labels_stay(guarded: onnx.ModelProto) -> None:
    before, network = exported()
    for shape, cells in (((1, 8, 8), (1, 1)), ((2, 64, 264), (1, 2)), ((1, 512, 384), (3, 2))):
        images = frames(*shape) if shape[1] > 8 else np.full((1, 1, 8, 8), 7, np.uint8)
        found = run(guarded, images)
        assert found[OUTPUT].shape == (shape[0], 8, *cells)
        for image, features in zip(images[:, 0], found[OUTPUT], strict=True):
            wanted = domain_features(lively(tiny_network()), image, network.normalization)
            assert features == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        assert (found["labels"] == run(before, images)["labels"]).all()


def test_it_is_added_once_and_outlives_the_simplifier(guarded: onnx.ModelProto) -> None:
    assert with_domain(guarded) is guarded
    image = frames(1, 64, 96)
    assert run(simplified(guarded), image)[OUTPUT] == pytest.approx(run(guarded, image)[OUTPUT], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_pooling_stays_in_fp32_in_half_precision(guarded: onnx.ModelProto, kind: str) -> None:
    half = to_half(guarded, kind=kind)
    assert domain_nodes(half.graph)
    # Of the network itself no more stays in FP32 than without the output.
    counts = [
        sum(node.op_type == "Cast" for node in model.graph.node) for model in (half, to_half(exported()[0], kind=kind))
    ]
    assert counts[0] - counts[1] <= 1
    image = frames(1, 64, 96)
    found = run(simulate_rounding(half), image)[OUTPUT]
    assert found == pytest.approx(run(guarded, image)[OUTPUT], rel=0.02, abs=0.02)


@needs_rtx
def test_tensorrt_builds_it(guarded: onnx.ModelProto) -> None:
    parsed = Parsed(to_half(guarded))
    names = [parsed.network.get_output(number).name for number in range(parsed.network.num_outputs)]
    assert names == ["labels", OUTPUT]
    assert parsed.build((1, 1, 64, 64), (1, 1, 512, 512), (2, 1, 512, 512)) is not None


def test_a_foreign_network_gives_its_last_features(tmp_path: Path) -> None:
    conv = onnx.helper.make_node("Conv", ["image", "kernel"], ["hidden"], "a", pads=[1] * 4)
    last = onnx.helper.make_node("Conv", ["hidden", "scores"], ["logits"], "b")
    weights = {"kernel": np.ones((4, 3, 3, 3), np.float32), "scores": np.ones((3, 4, 1, 1), np.float32)}
    model = small_model([conv, last], weights, (1, 3, 64, 96))
    assert domain_tensor(model) == "hidden"
    assert [entry.name for entry in with_domain(model).graph.output] == ["logits", OUTPUT]
    with pytest.raises(UserError, match="feature map"):
        with_domain(model, "kernel")
    with pytest.raises(UserError, match="convolution"):
        with_domain(small_model([onnx.helper.make_node("Identity", ["image"], ["logits"])], {}, (1, 3, 64, 96)))
