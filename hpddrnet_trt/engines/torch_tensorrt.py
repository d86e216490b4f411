"""Torch-TensorRT: PyTorch's own way to TensorRT, to compare with.

Compiles the unmodified network of a checkpoint when it is loaded, for one size. Interface:
https://docs.pytorch.org/TensorRT/user_guide/compilation/compilation_settings.html (settings),
https://docs.pytorch.org/TensorRT/user_guide/mixed_precision.html (FP16),
https://docs.pytorch.org/TensorRT/user_guide/runtime_performance/runtime_api.html (CUDA graphs).
Written after that documentation for Torch-TensorRT 2.11 and later; it has not been run on a GPU yet.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpddrnet_trt.core.errors import NoGpu, UsageError, UserError, brief, require
from hpddrnet_trt.core.manifest import SIZE_MULTIPLE, AxisRange
from hpddrnet_trt.engines.torch import TorchEngine, pick_device
from hpddrnet_trt.models.checkpoints import load_any_checkpoint
from hpddrnet_trt.models.network import HPDDRNet

# Scores of a trained position attention exceed FP16's range: products, scaling and softmax stay in FP32.
# Patterns of the exported graph's node names, before and after matmul is decomposed.
KEPT_IN_FP32 = {"^matmul", "^bmm", "^div", "^softmax", "^_softmax"}


class TorchTensorRTEngine(TorchEngine):
    """Runs a checkpoint compiled by Torch-TensorRT for ``batch`` images of ``height`` x ``width`` pixels.

    ``precision`` ``fp16`` (position attention's products stay in FP32) or ``fp32`` (without TF32);
    ``device`` ``cuda`` or ``cuda:1``; ``cuda_graph`` records the engine's launches; ``input_dtype``,
    ``output`` and ``threads`` as in :class:`~hpddrnet_trt.engines.torch.TorchEngine`. Normalisation and
    arg-max run in PyTorch on the GPU.

    Raises :class:`MissingDependency` without ``torch_tensorrt``, :class:`NoGpu` without a GPU,
    :class:`UsageError` for a size that the network does not take, :class:`UserError` when compiling fails.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        height: int,
        width: int,
        batch: int = 1,
        precision: Literal["fp16", "fp32"] = "fp16",
        device: str = "cuda",
        threads: int | None = None,
        input_dtype: Literal["uint8", "float32"] = "uint8",
        output: Literal["logits", "labels"] = "labels",
        cuda_graph: bool = True,
    ) -> None:
        if precision not in ("fp16", "fp32"):
            raise UsageError(f"precision is fp16 or fp32, got {precision!r}")
        if batch < 1 or min(height, width) < SIZE_MULTIPLE or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
            raise UsageError(
                f"cannot compile for {batch} x {height}x{width}; give at least one image, and a height and width "
                f"that are multiples of {SIZE_MULTIPLE}"
            )
        library = require("torch_tensorrt", "torch-tensorrt", "compile a checkpoint with Torch-TensorRT")
        network, manifest = load_any_checkpoint(path)
        self._setup(network, manifest, device=str(gpu(device)), threads=threads, input_dtype=input_dtype, output=output)
        fixed = {name: AxisRange(minimum=size, maximum=size)
                 for name, size in (("batch", batch), ("height", height), ("width", width))}
        self._contract = self._contract.model_copy(update=fixed)
        self.manifest = self.manifest.replace(input=self._contract)
        self._typing, self._library = precision.upper(), library
        self._has_modules, self._reuses_outputs = False, cuda_graph
        self._stack = ExitStack()
        example = torch.zeros(batch, 3, height, width, device=self.device)
        try:
            with warnings.catch_warnings():
                # PyTorch's exporter still uses what PyTorch deprecates.
                warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
                compiled = library.compile(
                    _Logits(network), ir="dynamo", arg_inputs=[example], use_explicit_typing=True, min_block_size=1,
                    **_typing(precision),
                )  # fmt: skip
        except (RuntimeError, ValueError, TypeError) as exc:
            reason = brief(exc)
            raise UserError(
                f"Torch-TensorRT {library.__version__} could not compile {path} for {batch} x {height}x{width} "
                f"({reason}); use the tensorrt engine"
            ) from exc
        self._score = self._stack.enter_context(library.runtime.enable_cudagraphs(compiled)) if cuda_graph else compiled

    @property
    def runtime(self) -> str:
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        graph = ", CUDA graph" if self._reuses_outputs else ""
        return f"torch_tensorrt {self._library.__version__} ({where}, {self._typing}{graph})"

    def close(self) -> None:
        super().close()
        self._stack.close()


class _Logits(nn.Module):
    """Normalised images ``[N, 3, H, W]`` to logits at their size, ``[N, classes, H, W]``."""

    def __init__(self, network: HPDDRNet) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.network.predict_logits(x)


def _typing(precision: str) -> dict[str, Any]:
    if precision == "fp32":
        return {"disable_tf32": True}
    return {
        "enable_autocast": True,
        "autocast_low_precision_type": torch.float16,
        "autocast_excluded_nodes": KEPT_IN_FP32,
    }


def gpu(name: str) -> torch.device:
    """The GPU called ``name``; raises :class:`NoGpu` for any other device."""
    device = pick_device(name)
    if device.type != "cuda":
        raise NoGpu(f"Torch-TensorRT runs on NVIDIA GPUs only, not on {name!r}; use the torch engine there")
    return device
