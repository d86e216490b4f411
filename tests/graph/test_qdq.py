"""The plan of what is quantised, and its restriction to some of the convolutions."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.lint import analyze
from hpddrnet_trt.graph.nodes import name_nodes
from tests.graph.residual_onnx import QUANTIZABLE, STAGE, fusion_model, quantized, residual_model

# Fixtures of module scope are the same for every example.
_shared_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = onnx.load(str(residual_model(tmp_path_factory.mktemp("plan") / "model.onnx")))
    name_nodes(model)
    return model


@pytest.fixture(scope="module")
def fusion() -> Any:
    return fusion_model()


def _scales(model: Any) -> dict[str, float]:
    """Scale of each quantised activation."""
    values = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return {node.input[0]: float(values[node.input[1]]) for node in pairs}


def test_the_block_is_int8_from_end_to_end(model: Any) -> None:
    plan = qdq.plan(model, "tensorrt")
    assert plan.nodes == QUANTIZABLE
    assert set(plan.shortcuts) == {"shortcut", "block"}  # the projection, and what the sum's kernel writes
    assert set(plan.tensors) == {"grey", "stem_out", "first_out", "shortcut", "block", "fused"}


def test_fusion_of_two_branches(fusion: Any) -> None:
    """A sum that a ReLU and the fusion read gets the pair itself, on one scale with what the ReLU writes."""
    plan = qdq.plan(fusion, "tensorrt")
    assert set(plan.shortcuts) == {"x", "stage", "small", "deeper_relu", "upsampled", "pooled"}
    assert plan.shared == (("stage", "stage_relu"),)
    eight = quantized(fusion, plan)
    scales = _scales(eight)
    assert scales["stage"] == scales["stage_relu"]
    assert len(set(scales.values())) == len(scales) - 1
    found = analyze(eight)
    assert not found.all_violations
    assert found.stage_reformats == 0
    assert [stage.name for stage in found.stages] == [STAGE, "deeper"]


def test_shared_ranges_are_the_widest(fusion: Any) -> None:
    plan = qdq.plan(fusion, "tensorrt")
    ranges = dict.fromkeys(plan.tensors, (0.0, 1.0)) | {"stage": (-3.0, 1.0), "stage_relu": (0.0, 4.0)}
    shared = qdq.share_ranges(plan, ranges)
    assert shared["stage"] == shared["stage_relu"] == (-3.0, 4.0)
    assert shared["x"] == ranges["x"]
    assert ranges["stage"] == (-3.0, 1.0)


def test_a_branch_that_meets_floating_point_gets_no_pair(fusion: Any) -> None:
    """Pooling and upsampling are INT8 only where what they lead to is."""
    everything = qdq.plan(fusion, "tensorrt").nodes
    plan = qdq.subset(fusion, "tensorrt", [name for name in everything if name not in ("head", "pool_conv")])
    assert "pooled" not in plan.tensors
    assert "upsampled" not in plan.tensors
    assert "stage" in plan.tensors


@pytest.mark.parametrize("form", ["tensorrt", "onnxruntime"])
def test_all_convolutions_are_the_full_plan(model: Any, form: qdq.Runtime) -> None:
    plan = qdq.plan(model, form)
    convolutions = [name for name in plan.nodes if name in QUANTIZABLE]
    assert qdq.subset(model, form, convolutions) == plan


@_shared_fixtures
@given(data=st.data())
def test_any_subset_is_sound(model: Any, fusion: Any, data: st.DataObject) -> None:
    """Its ranges are among those of the full plan, its convolutions those asked for, and no rule is broken."""
    source = data.draw(st.sampled_from([model, fusion]))
    full = qdq.plan(source, "tensorrt")
    names = data.draw(st.sets(st.sampled_from(full.nodes)))
    plan = qdq.subset(source, "tensorrt", names)
    assert set(plan.nodes) == names
    assert set(plan.tensors) <= set(full.tensors)
    assert {name for group in plan.shared for name in group} <= set(plan.tensors)
    found = analyze(quantized(source, plan), kept=set(full.nodes) - names)
    assert {entry.name for entry in found.convolutions if entry.precision == "int8"} == names
    assert not found.all_violations


@_shared_fixtures
@given(names=st.sets(st.sampled_from(QUANTIZABLE[1:-1])))
def test_any_cpu_subset_is_part_of_the_plan(model: Any, names: set[str]) -> None:
    full, plan = qdq.plan(model, "onnxruntime"), qdq.subset(model, "onnxruntime", names)
    assert {name for name in plan.nodes if name in QUANTIZABLE} == names
    assert set(plan.nodes) <= set(full.nodes)
    assert set(plan.tensors) <= set(full.tensors)


def test_a_convolution_left_out_reads_exact_values(model: Any) -> None:
    plan = qdq.subset(model, "tensorrt", [name for name in QUANTIZABLE if name != "second"])
    assert "first_out" not in plan.tensors
    assert not plan.shortcuts  # the sum belongs to the convolution left out


def test_nothing_to_quantize_leaves_the_graph_alone(model: Any) -> None:
    """An empty list of nodes means every node to ONNX Runtime's quantiser."""
    plan = qdq.subset(model, "tensorrt", [])
    assert plan.nodes == plan.tensors == ()
    assert qdq.quantize(model, "tensorrt", plan, {}).SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize("name", ["gate", "nothing"])
def test_unknown_names_are_refused(model: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"no convolution called {name}"):
        qdq.subset(model, "tensorrt", [name])
