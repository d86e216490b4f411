"""PyTorch: the reference every other engine is compared with.

Runs the unmodified network of a checkpoint, by default eagerly in FP32 with TF32 off, so that its
figures are those of the authors' implementation. The options for reduced precision and memory
layout exist to be measured against, not to be the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpddrnet_trt.engines.base import EngineBase, Prediction, check_input
from hpddrnet_trt.errors import NoGpu, UsageError, UserError
from hpddrnet_trt.manifest import InputContract, Manifest, OutputContract
from hpddrnet_trt.models.checkpoints import load_any_checkpoint
from hpddrnet_trt.models.network import HPDDRNet

AUTOCAST = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchEngine(EngineBase):
    """Runs a checkpoint: ours (``.safetensors``) or one of mmsegmentation's layout (``.pth``).

    Parameters: ``device`` ``auto`` (a GPU when PyTorch has one), ``cpu``, ``cuda`` or ``cuda:1``;
    ``threads`` CPU threads of PyTorch, **for the whole process**; ``input_dtype`` ``uint8`` takes
    grey images ``[N, 1, H, W]`` and normalises them, ``float32`` takes normalised RGB
    ``[N, 3, H, W]``; ``output`` ``logits`` gives logits at the input's resolution and their labels,
    ``labels`` the labels only (on a GPU the logits are then not copied to the host); ``autocast``
    ``off`` | ``fp16`` | ``bf16``; ``channels_last`` memory layout.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        input_dtype: Literal["uint8", "float32"] = "uint8",
        output: Literal["logits", "labels"] = "logits",
        autocast: Literal["off", "fp16", "bf16"] = "off",
        channels_last: bool = False,
    ) -> None:
        network, manifest = load_any_checkpoint(path)
        self._setup(network, manifest, device, threads, input_dtype, output, autocast, channels_last)

    @classmethod
    def from_network(
        cls,
        network: HPDDRNet,
        manifest: Manifest,
        *,
        device: str = "auto",
        input_dtype: Literal["uint8", "float32"] = "uint8",
    ) -> TorchEngine:
        """An engine around a network in memory (put into evaluation mode and moved to ``device``)."""
        engine = cls.__new__(cls)
        engine._setup(network, manifest, device, None, input_dtype, "logits", "off", False)
        return engine

    def _setup(
        self,
        network: HPDDRNet,
        manifest: Manifest,
        device: str,
        threads: int | None,
        input_dtype: str,
        output: Literal["logits", "labels"],
        autocast: str,
        channels_last: bool,
    ) -> None:
        if output not in ("logits", "labels"):
            raise UsageError(f"output is logits or labels, got {output!r}")
        if input_dtype not in ("uint8", "float32") or autocast not in AUTOCAST:
            raise UsageError(
                f"input_dtype is uint8 or float32 and autocast one of {', '.join(AUTOCAST)}, "
                f"got {input_dtype!r} and {autocast!r}"
            )
        if threads is not None:
            if threads < 1:
                raise UsageError(f"threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        self.device = _pick_device(device)
        self._contract = InputContract.model_validate(
            {"dtype": input_dtype, "channels": 1 if input_dtype == "uint8" else 3}
        )
        self.manifest = manifest.replace(input=self._contract, output=OutputContract(kind=output))
        self._gives_logits = output == "logits"
        self._autocast = autocast
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        module: Any = network.eval().to(self.device)
        self._network: Any = module.to(memory_format=self._format)
        mean, std = manifest.normalisation.mean, manifest.normalisation.std
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, 3, 1, 1) for values in (mean, std)
        )

    @property
    def runtime(self) -> str:
        where = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        kind = "FP32" if self._autocast == "off" else f"autocast {self._autocast.upper()}"
        layout = ", channels last" if self._format is torch.channels_last else ""
        return f"torch {torch.__version__} ({where}{threads}, {kind}{layout})"

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        """Run one batch; see :class:`~hpddrnet_trt.engines.base.Engine`."""
        if self._network is None:
            raise UsageError("this engine is closed; load it again")
        check_input(images, self._contract)
        try:
            with torch.inference_mode(), _without_tf32(self.device):
                logits = self._logits(images)
                labels = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
                return Prediction(labels, logits=logits.cpu().numpy() if self._gives_logits else None)
        except (torch.cuda.OutOfMemoryError, MemoryError) as exc:
            raise UserError(f"out of memory on an input of shape {images.shape}; use a smaller image or batch") from exc

    def close(self) -> None:
        self._network = None

    def _logits(self, images: npt.NDArray[Any]) -> Tensor:
        dtype = AUTOCAST[self._autocast]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits: Tensor = self._network.predict_logits(self._normalised(images))
        return logits.float()

    def _normalised(self, images: npt.NDArray[Any]) -> Tensor:
        array = np.ascontiguousarray(images)
        x = torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)
        if x.dtype == torch.uint8:
            x = (x.float() - self._mean) / self._std  # one grey channel becomes three
        return x.contiguous(memory_format=self._format)


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise UsageError(f"unknown device {name!r} for PyTorch; choose auto, cpu, cuda or cuda:N") from exc
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise NoGpu(f"PyTorch {torch.__version__} finds no GPU {name!r}; check the driver, or use device='cpu'")
    return device


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """FP32 convolutions in FP32: PyTorch's default on a GPU is TF32, about 1 % off."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=torch.backends.cudnn.benchmark, deterministic=torch.backends.cudnn.deterministic,
        allow_tf32=False,
    ):
        yield
