"""Torch-TensorRT without the package and without a GPU: what it is asked for, and what runs around it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hpddrnet_trt.core.errors import ContractError, NoGpu, UsageError, UserError
from hpddrnet_trt.engines import torch_tensorrt as engine_module
from hpddrnet_trt.engines.base import Engine
from hpddrnet_trt.engines.torch import TorchEngine
from hpddrnet_trt.engines.torch_tensorrt import TorchTensorRTEngine
from hpddrnet_trt.models.checkpoints import save_checkpoint
from tests.tiny_network import lively, tiny_manifest, tiny_network
from tests.toy import grey_image


class StandIn(ModuleType):
    """``torch_tensorrt`` as documented, which "compiles" to the module itself."""

    __version__ = "2.99"

    def __init__(self) -> None:
        super().__init__("torch_tensorrt")
        self.asked: dict[str, Any] = {}
        self.graphs = 0
        self.fails: Exception | None = None
        self.runtime = self

    def compile(self, module: torch.nn.Module, *, ir: str, arg_inputs: list[torch.Tensor], **settings: Any) -> Any:
        if self.fails is not None:
            raise self.fails
        self.asked = {"ir": ir, "arg_inputs": arg_inputs, **settings}
        exported = torch.export.export(module, tuple(arg_inputs))  # what ir="dynamo" does first
        return exported.module()

    @contextmanager
    def enable_cudagraphs(self, module: Any) -> Iterator[Any]:
        self.graphs += 1
        yield module
        self.graphs -= 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", stand_in)
    monkeypatch.setattr(engine_module, "gpu", lambda name: torch.device("cpu"))
    return stand_in


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = lively(tiny_network())
    return save_checkpoint(tmp_path_factory.mktemp("trt") / "tiny.safetensors", network, tiny_manifest(network))


IMAGES = np.stack([grey_image(64, 96, seed) for seed in range(2)])[:, None]


@pytest.mark.usefixtures("one_thread")
def test_compiled_for_one_size_in_fp16(library: StandIn, checkpoint: Path) -> None:
    with TorchEngine(checkpoint, device="cpu") as reference:
        expected = reference.infer(IMAGES)
    with TorchTensorRTEngine(checkpoint, height=64, width=96, batch=2, output="logits") as engine:
        assert isinstance(engine, Engine)
        found = engine.infer(IMAGES)
        assert engine.runtime == "torch_tensorrt 2.99 (CPU, FP16, CUDA graph)"
        assert library.graphs == 1
        assert engine.layer_times(IMAGES) == {}
        with pytest.raises(ContractError, match="outside this model's range 64"):
            engine.infer(IMAGES[:, :, :32])
        with pytest.raises(ContractError, match="batch 1"):
            engine.bind(IMAGES[:1])
    assert library.graphs == 0
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    (example,) = library.asked.pop("arg_inputs")
    assert (example.shape, example.dtype) == ((2, 3, 64, 96), torch.float32)
    assert library.asked == {
        "ir": "dynamo", "use_explicit_typing": True, "min_block_size": 1, "enable_autocast": True,
        "autocast_low_precision_type": torch.float16, "autocast_excluded_nodes": engine_module.KEPT_IN_FP32,
    }  # fmt: skip


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\):FutureWarning")  # of PyTorch's exporter
@pytest.mark.usefixtures("one_thread")
def test_products_of_attention_are_among_those_kept(library: StandIn, checkpoint: Path) -> None:
    """The patterns name the nodes of the exported graph, as exported and as decomposed."""
    import re

    from hpddrnet_trt.models.checkpoints import load_any_checkpoint

    network, _ = load_any_checkpoint(checkpoint)
    program = torch.export.export(engine_module._Logits(network), (torch.zeros(1, 3, 64, 96),))
    # Decomposed, the six projections of transposed tokens are batched products as well.
    for graph, most in ((program.graph, 4), (program.run_decompositions().graph, 10)):
        kept = [node.name for node in graph.nodes if node.op == "call_function"
                and any(re.search(pattern, node.name) for pattern in engine_module.KEPT_IN_FP32)]
        products = [name for name in kept if re.match("matmul|bmm", name)]
        assert 4 <= len(products) <= most  # two of each of the two attentions
        assert len([name for name in kept if "softmax" in name]) == 2
        assert not any("conv" in name for name in kept)


@pytest.mark.usefixtures("one_thread")
def test_fp32_is_not_tf32(library: StandIn, checkpoint: Path) -> None:
    with TorchTensorRTEngine(checkpoint, height=64, width=96, precision="fp32", cuda_graph=False) as engine:
        prediction = engine.infer(IMAGES[:1])
        assert prediction.logits is None
        assert prediction.labels.shape == (1, 64, 96)
        assert engine.runtime == "torch_tensorrt 2.99 (CPU, FP32)"
        engine.bind(IMAGES[:1])()
    assert library.asked["disable_tf32"] is True
    assert "enable_autocast" not in library.asked
    with pytest.raises(UsageError, match="closed"):
        engine.infer(IMAGES[:1])


def test_refusals(library: StandIn, checkpoint: Path) -> None:
    for options, words in (
        ({"height": 60, "width": 96}, "cannot compile for 1 x 60x96"),
        ({"height": 64, "width": 0}, "multiples of 8"),
        ({"height": 64, "width": 96, "batch": 0}, "cannot compile for 0 x"),
        ({"height": 64, "width": 96, "precision": "int8"}, "precision is fp16 or fp32"),
    ):
        with pytest.raises(UsageError, match=words):
            TorchTensorRTEngine(checkpoint, **options)  # type: ignore[arg-type]
    library.fails = RuntimeError("no converter for\n aten.foo")
    with pytest.raises(UserError, match=r"2\.99 could not compile .*no converter for aten\.foo"):
        TorchTensorRTEngine(checkpoint, height=64, width=96)


def test_only_a_gpu_will_do() -> None:
    with pytest.raises(NoGpu, match="NVIDIA GPUs only"):
        engine_module.gpu("cpu")
