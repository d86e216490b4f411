"""One export of a tiny network with lively attention, made once per test session, in the forms that engines run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.export.calibrate import CalibrationSettings, calibrate
from hpddrnet_trt.export.onnx import ExportOptions, export_network, trace
from hpddrnet_trt.graph.model import save_model
from hpddrnet_trt.graph.precision import to_half
from tests.tiny_network import lively, tiny_manifest, tiny_network


@cache
def _exported() -> tuple[bytes, Manifest]:
    network, options = lively(tiny_network()), ExportOptions()
    manifest = tiny_manifest(
        network, input=options.input_contract, output=options.output_contract, attention="matmul", precision="fp32"
    )
    return trace(network, manifest, options).SerializeToString(), manifest


def exported() -> tuple[onnx.ModelProto, Manifest]:
    """The FP32 graph with dynamic sizes, and its description."""
    content, manifest = _exported()
    return onnx.load_from_string(content), manifest


def write_fp32(path: Path, **manifest: Any) -> Path:
    """``manifest`` overrides fields of the description; with ``attention="function"`` the graph follows."""
    model, described = exported()
    return save_model(model, path, described.replace(**manifest))


def write_fp16(path: Path) -> Path:
    """FP16 with position attention in BF16."""
    model, manifest = exported()
    return save_model(to_half(model), path, manifest.replace(precision="fp16"))


def write_int8(path: Path, **options: Any) -> Path:
    """INT8 Q/DQ in TensorRT's form, the rest FP16, position attention in BF16; ``options`` go to calibrate."""
    source = write_fp32(path.with_name(f"{path.stem}.source.onnx"))
    settings = CalibrationSettings(min_agreement=0.5, cache=None, **options)
    calibrate(source, path, pictures(path.with_name(f"{path.stem}.pictures"), 2), settings)
    return path


def pictures(folder: Path, count: int, height: int = 64, width: int = 96) -> list[Path]:
    """Simulated micrographs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed:02d}.png" for seed in range(count)]
    for seed, path in enumerate(paths):
        Image.fromarray(simulate(height, width, seed)[0]).save(path)
    return paths


def frames(batch: int, height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Simulated micrographs ``[batch, 1, height, width]``."""
    return np.stack([simulate(height, width, [seed, number])[0] for number in range(batch)])[:, None]


def write_loud(path: Path) -> Path:
    """A static FP32 file whose attention scores pass the end of FP16."""
    network = tiny_network()
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.25)
    for name, module in network.named_modules():
        if name.endswith("pa.fc_q"):
            module.weight.data *= 3000.0
    torch.nn.init.normal_(network.decode_head.conv_seg.weight, std=0.05)
    options = ExportOptions(batch=1, height=64, width=96, confidence=True)
    # Scores this large make the attention a choice of one position, which rounding can flip: the
    # comparison with PyTorch belongs to the export's own tests.
    export_network(network, tiny_manifest(network), path, options, verify=False)
    return path


def small_model(
    nodes: list[onnx.NodeProto], constants: Mapping[str, npt.ArrayLike], shape: tuple[int, ...], channels: int = 3
) -> onnx.ModelProto:
    """FP32 ``image`` of ``shape`` in, ``logits`` out."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (shape[0], channels, *shape[2:]))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
