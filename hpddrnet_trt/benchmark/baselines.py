"""What else people would run: PyTorch's own ways to be faster, and the authors' network exported as it is.

Each baseline is set up as its own users would have it, with nothing of this package's rewriting, so that a
comparison with them says something. They run one size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpddrnet_trt.benchmark.entries import Entry
from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.engines import engine_status

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpddrnet_trt.models.network import HPDDRNet

# FP16 autocast is no baseline: the trained position attention overflows it and every logit becomes NaN.
AMP: dict[str, Any] = {"autocast": "bf16", "channels_last": True, "cudnn_benchmark": True}
COMPILED: dict[str, Any] = {"compile": "max-autotune", "cudnn_benchmark": True}


def baseline_entries(checkpoint: Path, folder: Path, *, size: tuple[int, int], batch: int = 1) -> list[Entry]:
    """Entries of the baselines of ``checkpoint`` that are installed, for ``batch`` images of ``size`` (height, width).

    * PyTorch: autocast in BF16 with channels-last layout; ``torch.compile`` in its mode ``max-autotune``
      (CUDA graphs on a GPU), in FP32 and with that autocast;
    * the plain export (:func:`export_plain`, written to ``folder``), in ONNX Runtime and, where it is
      installed, OpenVINO, both with their defaults. It takes normalised RGB and gives logits, so the
      host normalises and takes the arg-max.

    Raises :class:`BadInputFile` for a checkpoint that cannot be read, :class:`UsageError` for a size that
    the network does not take, :class:`MissingDependency` without PyTorch or its exporter.
    """
    checkpoint = existing_file(checkpoint, "checkpoint")
    plain = Path(folder) / f"{checkpoint.stem}.plain-{batch}x{size[0]}x{size[1]}.onnx"
    export_plain(checkpoint, plain, size=size, batch=batch)
    labels: dict[str, Any] = {"output": "labels"}
    entries = [
        Entry("PyTorch AMP channels last", checkpoint, "torch", {**labels, **AMP}),
        Entry("PyTorch compiled", checkpoint, "torch", {**labels, **COMPILED}),
        Entry("PyTorch compiled AMP", checkpoint, "torch", {**labels, **COMPILED, **AMP}),
        Entry("ONNX Runtime plain export", plain, "onnxruntime", {"defaults": True, "device": "auto"}),
    ]
    if engine_status("openvino").usable:
        entries.append(Entry("OpenVINO plain export", plain, "openvino", {"defaults": True}))
    return entries


def export_plain(checkpoint: Path, target: Path, *, size: tuple[int, int], batch: int = 1) -> Manifest:
    """Export the network as its authors wrote it, by ``torch.onnx.export`` with its defaults, for one size.

    Nothing is rewritten: batch normalisation, four projections in position attention, normalised
    float32 ``[N, 3, H, W]`` in and float32 logits ``[N, classes, H, W]`` out, as mmsegmentation's
    deployment has it. The file describes itself like every other; nodes are named after modules.

    Raises what :func:`baseline_entries` raises, and :class:`UserError` when PyTorch cannot export.
    """
    from hpddrnet_trt.export.onnx import ExportOptions, name_after_modules, quiet
    from hpddrnet_trt.graph.model import save_model

    options = ExportOptions(batch, *size, output="logits", grey_input=False)
    torch = require("torch", "export", "export a checkpoint")
    require("onnxscript", "export", "export to ONNX")
    from hpddrnet_trt.models.checkpoints import load_any_checkpoint

    network, manifest = load_any_checkpoint(checkpoint)
    example = torch.zeros(batch, 3, *size)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                _plain(network), (example,), input_names=["image"], output_names=["logits"], verbose=False
            )
    except torch.onnx.OnnxExporterError as exc:
        raise UserError(f"PyTorch {torch.__version__} could not export this network to ONNX: {exc}") from exc
    model = program.model_proto
    name_after_modules(model)
    manifest = manifest.replace(
        input=options.input_contract,
        output=options.output_contract,
        attention="plain" if network.config.pam != "none" else None,
        precision="fp32",
        versions={**manifest.versions, "torch": str(torch.__version__)},
    )
    save_model(model, target, manifest)
    return manifest


def _plain(network: HPDDRNet) -> nn.Module:
    """The network with its logits brought to the input's size, as one module."""
    from torch import nn

    from hpddrnet_trt.models.network import resize

    class Output(nn.Module):
        def forward(self, logits: Tensor, height: int, width: int) -> Tensor:
            return resize(logits, height, width)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.decode_head, self.output = network.backbone, network.decode_head, Output()

        def forward(self, image: Tensor) -> Any:
            return self.output(self.decode_head(self.backbone(image)), *image.shape[-2:])

    return Plain().eval()
