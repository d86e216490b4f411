"""The one small interface every runtime sits behind, and what all of them share: checks of inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.domain import OUTPUT as DOMAIN_OUTPUT
from hpddrnet_trt.core.errors import BadInputFile, ContractError
from hpddrnet_trt.core.manifest import InputContract, Manifest
from hpddrnet_trt.core.metrics import arg_max


@dataclass(frozen=True)
class Prediction:
    """Output of one inference, following the model's :class:`~hpddrnet_trt.core.manifest.OutputContract`.

    ``labels`` uint8 ``[N, H, W]`` (also filled by arg-max when the model gives logits);
    ``confidence`` float32 ``[N, H, W]`` or None; ``logits`` float32 ``[N, C, H, W]`` or None;
    ``domain_features`` float32 ``[N, F, rows, columns]``, for :func:`hpddrnet_trt.core.domain.domain_of`, or None.
    """

    labels: npt.NDArray[np.uint8]
    confidence: npt.NDArray[np.float32] | None = None
    logits: npt.NDArray[np.float32] | None = None
    domain_features: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Bound:
    """A batch bound to a GPU: call it for one inference, ``burst(runs)`` for so many without a pause.

    ``burst`` gives the GPU's own seconds of each, from CUDA events before and after it on its stream. Each is queued
    while the one before runs, as trtexec does (NVIDIA, TensorRT documentation, "Command-Line Programs").
    """

    run: Callable[[], None]
    burst: Callable[[int], list[float]]

    def __call__(self) -> None:
        self.run()


@runtime_checkable
class Engine(Protocol):
    """A loaded model file. Use it as a context manager, or call :meth:`close`.

    Several threads may call :meth:`infer` and :meth:`infer_many` of one engine at once, and :meth:`close`
    at any moment: what runs finishes, and what comes later raises a :class:`UserError`.
    :meth:`bind` and :meth:`layer_times` are for measuring, when nothing else runs.
    """

    manifest: Manifest

    @property
    def runtime(self) -> str:
        """Runtime, version and device for people, e.g. ``onnxruntime 1.23 (CPU, 2 threads)``."""
        ...

    @property
    def arithmetic(self) -> str | None:
        """What the labels are computed in, e.g. ``bf16``: the file's precision, unless the engine chose another."""
        ...

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        """Run one batch that follows ``manifest.input``; raises :class:`ContractError` otherwise."""
        ...

    def infer_many(self, batches: Iterable[npt.NDArray[Any]]) -> Iterator[Prediction]:
        """Run batches with as many in flight as suits the engine; results in the order given."""
        ...

    def bind(self, images: npt.NDArray[Any]) -> Callable[[], None]:
        """One batch placed where the engine computes, for measuring the network alone.

        Each call of the result runs one inference on it and returns when that is complete; the outputs
        stay where they are. On a GPU the result may be a :class:`Bound`. Valid until :meth:`close`; no other call may
        run in between.
        """
        ...

    def layer_times(self, images: npt.NDArray[Any], runs: int = 20) -> dict[str, float]:
        """Median milliseconds of each layer, by the runtime's own name for it, over ``runs`` inferences.

        Empty where the runtime has no profiler. May slow later inferences: measure other things first.
        """
        ...

    def close(self) -> None:
        """Free the runtime's resources; calling it again does nothing."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class EngineBase:
    """What engines share: one batch at a time, no profiler, the context manager."""

    manifest: Manifest

    @property
    def arithmetic(self) -> str | None:
        return self.manifest.precision

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        raise NotImplementedError

    def infer_many(self, batches: Iterable[npt.NDArray[Any]]) -> Iterator[Prediction]:
        return map(self.infer, batches)

    def layer_times(self, images: npt.NDArray[Any], runs: int = 20) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing to free by default."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def input_contract(manifest: Manifest) -> InputContract:
    """The manifest's input contract, or a :class:`ContractError` when it has none (a checkpoint)."""
    if manifest.input is None or manifest.output is None:
        raise ContractError("this description has no input contract; export the checkpoint to ONNX first")
    return manifest.input


def check_input(images: Any, contract: InputContract, *, on_gpu: bool = False) -> None:
    """Raise :class:`ContractError` unless ``images``, a numpy array or, ``on_gpu``, another, follows ``contract``."""
    shape, where = getattr(images, "shape", ()), " on the GPU" if on_gpu else ""
    if not (on_gpu or isinstance(images, np.ndarray)) or len(shape) != 4:
        raise ContractError(
            f"expected an array [batch, {contract.channels}, height, width], "
            f"got {type(images).__name__} of shape {shape}{where}"
        )
    if images.dtype != np.dtype(contract.dtype):
        raise ContractError(f"expected dtype {contract.dtype}, got {images.dtype}{where}; convert the image first")
    check_shape(shape, contract)


def check_shape(shape: tuple[int, ...], contract: InputContract) -> None:
    """Raise :class:`ContractError` unless ``[N, C, H, W]`` is admitted by ``contract``."""
    batch, channels, height, width = shape
    if channels != contract.channels:
        raise ContractError(f"expected {contract.channels} channel(s), got {channels} in shape {tuple(shape)}")
    for name, size in (("batch", batch), ("height", height), ("width", width)):
        axis = getattr(contract, name)
        if not axis.admits(size):
            raise ContractError(f"{name} {size} is outside this model's range {axis}; resize, tile, or export again")
    if height % contract.multiple or width % contract.multiple:
        raise ContractError(
            f"height and width must be multiples of {contract.multiple}, got {height}x{width}; "
            "use Segmenter, which pads any size"
        )


def expected_outputs(manifest: Manifest, present: Mapping[str, Sequence[Any]], path: Path) -> list[str]:
    """Names of the outputs that the manifest promises; :class:`BadInputFile` when the file lacks one.

    ``present``: the sizes of each output of the file; what is no positive number stands for any size.
    """
    assert manifest.output is not None  # engines ask input_contract first
    names: list[str] = [manifest.output.kind]
    # Where there are logits, the confidence follows from them and need not be an output of its own.
    if manifest.output.confidence and (manifest.output.kind == "labels" or "confidence" in present):
        names.append("confidence")
    if manifest.output.domain:
        names.append(DOMAIN_OUTPUT)
    missing = [name for name in names if name not in present]
    if missing:
        raise BadInputFile(
            f"{path} has no output {' and '.join(missing)} (it has: {', '.join(present) or 'none'}) although its "
            "description promises it; export it again"
        )
    if manifest.output.domain and manifest.domain is not None:
        known, sizes = len(manifest.domain.mean), list(present[DOMAIN_OUTPUT])
        features = sizes[1] if len(sizes) == 4 else None
        if isinstance(features, int) and 0 < features != known:
            raise BadInputFile(
                f"{path} gives {features} features of a cell, and its description has the statistics of {known}; "
                "export it again"
            )
    return names


def checked_prediction(outputs: Mapping[str, npt.NDArray[Any]], manifest: Manifest, shape: Sequence[int]) -> Prediction:
    """What came from an input ``[N, C, H, W]``, not copied; labels come from logits where the model gives those.

    Raises :class:`BadInputFile` for what the description does not promise: other shapes or types, or labels
    of classes that there are not (10 us at 1024x1024).
    """
    batch, _, height, width = shape
    classes = manifest.network.num_classes
    for name in outputs.keys() & {"labels", "confidence", "logits"}:
        array = outputs[name]
        promised = (batch, classes, height, width) if name == "logits" else (batch, height, width)
        if array.shape != promised:
            raise _broken(manifest, f"its output {name} has the shape {array.shape} instead of {promised}")
        if array.dtype.kind != ("u" if name == "labels" else "f"):
            raise _broken(manifest, f"its output {name} is of type {array.dtype}")
    if "logits" not in outputs and (largest := int(outputs["labels"].max())) >= classes:
        raise _broken(manifest, f"it gave the label {largest}, and has the classes 0 to {classes - 1}")
    logits, confidence = (
        None if outputs.get(name) is None else np.asarray(outputs[name], dtype=np.float32)
        for name in ("logits", "confidence")
    )
    labels = arg_max(logits) if logits is not None else np.asarray(outputs["labels"], dtype=np.uint8)
    return Prediction(labels, confidence, logits, _domain_features(outputs.get(DOMAIN_OUTPUT), manifest, batch))


def _domain_features(array: npt.NDArray[Any] | None, manifest: Manifest, batch: int) -> npt.NDArray[np.float32] | None:
    if array is None:
        return None
    features = None if manifest.domain is None else len(manifest.domain.mean)
    if array.ndim != 4 or array.shape[0] != batch or features not in (None, array.shape[1]) or not array.size:
        raise _broken(manifest, f"its output {DOMAIN_OUTPUT} has the shape {array.shape}")
    if array.dtype.kind != "f":
        raise _broken(manifest, f"its output {DOMAIN_OUTPUT} is of type {array.dtype}")
    return np.asarray(array, dtype=np.float32)


def _broken(manifest: Manifest, why: str) -> BadInputFile:
    return BadInputFile(
        f"the file of model {manifest.name!r} does not do what its description promises ({why}); export it again"
    )
