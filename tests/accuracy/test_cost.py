"""Costs of layers: the estimate's rules on a small network, and measured times shared out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpddrnet_trt.accuracy.candidates import QuantizationConfig
from hpddrnet_trt.accuracy.cost import DEVICES, Device, Estimate, Measured, by_convolution, check_device, cost_model
from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.graph.work import macs_and_bytes

SHAPE = (1, 1, 2048, 2048)


def estimate(config: QuantizationConfig, device: Device) -> Estimate:
    return Estimate(config.model, macs_and_bytes(config.model, SHAPE), device)


@pytest.mark.parametrize("name", ["l4", "agx-orin"])  # on an H200 this network is nothing but kernel launches
def test_floating_point_costs_time(config: QuantizationConfig, name: str) -> None:
    cost = estimate(config, DEVICES[name])
    everything = set(config.layers)
    assert 0 < cost(everything) < min(cost(everything - {layer}) for layer in everything)
    assert cost(everything) < cost([])
    assert DEVICES[name].name in cost.source


def test_a_quantised_layer_between_floating_point_ones_needs_a_conversion(config: QuantizationConfig) -> None:
    """`second` alone in INT8: a kernel must quantise what `first` writes."""
    cost = estimate(config, Device("launches only", {"fp32": 1e9, "fp16": 1e9, "int8": 1e9}, 1e9, launch_us=1000))
    assert cost({"second"}) - cost([]) == pytest.approx(1.0, abs=1e-6)
    assert cost({"first", "second"}) - cost({"first"}) == pytest.approx(0.0, abs=1e-6)


def test_compute_and_bandwidth_bind_where_they_should(config: QuantizationConfig) -> None:
    """Without launches: twice the rate halves a compute-bound time, twice the bandwidth a memory-bound one."""
    rates = {"fp32": 0.1, "fp16": 0.1, "int8": 0.2}
    compute = Device("slow arithmetic", rates, 1e9, launch_us=0)
    macs = {name: work.macs for name, work in macs_and_bytes(config.model, SHAPE).items()}
    others = sum(count for name, count in macs.items() if name not in config.layers)
    quantized = sum(macs[name] for name in config.layers)
    expected = 1e3 * 2 * (others / 0.1e12 + quantized / 0.2e12)
    assert estimate(config, compute)(config.layers) == pytest.approx(expected, rel=1e-3)
    memory = [Device("slow memory", dict.fromkeys(rates, 1e9), rate, launch_us=0) for rate in (100, 200)]
    slow, fast = (estimate(config, device)(config.layers) for device in memory)
    assert slow == pytest.approx(2 * fast, rel=1e-6)


def test_a_tensor_between_two_int8_layers_is_moved_in_bytes(config: QuantizationConfig) -> None:
    """``first_out`` (first -> second) is written and read at one byte; alone, `first` writes it in two."""
    memory = Device("slow memory", {"fp32": 1e9, "fp16": 1e9, "int8": 1e9}, 1, launch_us=0)
    cost = estimate(config, memory)
    elements = 16 * 512 * 512
    both, alone = cost({"first", "second"}), cost({"first"})
    weights = 16 * 16 * 9 + 16  # and biases
    assert alone - both == pytest.approx(1e3 * (2 * elements + weights) / 1e9, rel=1e-6)


def test_measured_times_go_to_the_convolutions_that_a_layer_names() -> None:
    times = {"a/Conv + b/Conv": 2.0, "c/Conv + relu": 1.0, "Reformatting CopyNode": 0.5}
    layers = ("a/Conv", "b/Conv", "c/Conv")
    assert by_convolution(times, layers) == {"a/Conv": 1.0, "b/Conv": 1.0, "c/Conv": 1.0}
    cost = Measured(times, {"a/Conv": 3.0, "b/Conv": 1.0, "c/Conv": 4.0}, layers, "a GPU")
    assert cost(layers) == 3.5
    assert cost(("a/Conv", "b/Conv")) == 3.5 + 3.0
    # A name within another one is not confused with it.
    assert by_convolution({"stem.1.conv/Conv": 1.0}, ("1.conv/Conv", "stem.1.conv/Conv")) == {
        "1.conv/Conv": 0.0, "stem.1.conv/Conv": 1.0,
    }  # fmt: skip


def test_cost_models_by_name(config: QuantizationConfig, tmp_path: Path) -> None:
    work = macs_and_bytes(config.model, SHAPE)
    with pytest.raises(UsageError, match=r"'gtx' is known; choose one of: l4, agx-orin, h200"):
        cost_model(config, work, device="gtx")
    with pytest.raises(UsageError, match="has no FP8"):
        check_device("agx-orin", "fp8")
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps({"gpu": "a GPU", "milliseconds": {"stem": 1.0}}))
    bad.write_text("[1]")
    assert cost_model(config, work, layer_times=(good, good)).source == "layer times measured on a GPU"
    with pytest.raises(BadInputFile, match=r"bad\.json holds no layer times"):
        cost_model(config, work, layer_times=(good, bad))
    bad.write_text(json.dumps({"gpu": "a GPU", "milliseconds": {"a layer of another network": 1.0}}))
    with pytest.raises(BadInputFile, match=r"bad\.json names no layer of this network"):
        cost_model(config, work, layer_times=(good, bad))
