"""What callers hand in, as an 8-bit picture: arrays of numpy or others, micrographs, any layout and depth."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, one_line
from hpddrnet_trt.data.intensity import IntensityRange, to_grey8
from hpddrnet_trt.data.micrograph import Micrograph

PIXEL_KINDS = {1: "u", 2: "uf", 4: "f", 8: "f"}  # bytes per pixel: admitted kinds (unsigned, float)


class DLPackArray(Protocol):
    """An array of PyTorch, CuPy, JAX... (https://dmlc.github.io/dlpack/latest/python_spec.html)."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> Any: ...


class CudaArray(Protocol):
    """An array on a GPU of PyCUDA, Numba... (CUDA array interface)."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


Image = npt.NDArray[Any] | Micrograph | DLPackArray | CudaArray


class Frame(NamedTuple):
    """One image ready for the network: uint8 ``[H, W]`` or RGB ``[H, W, 3]``, its grey window, and what was guessed."""

    pixels: npt.NDArray[np.uint8]
    window: tuple[float, float]
    remarks: tuple[str, ...] = ()


def to_frame(image: Any, channels: int, window: IntensityRange) -> Frame:
    """``image`` in 8 bits: a contiguous uint8 array as it is, all else copied only as far as needed.

    ``channels`` of the model: one with 3 also takes RGB. ``window`` as of
    :func:`~hpddrnet_trt.data.intensity.to_grey8`. Raises :class:`ContractError` for what is no image.
    """
    pixels = image if isinstance(image, np.ndarray) else _host_array(image)
    if pixels.ndim != 2 and not (pixels.ndim == channels == 3 == pixels.shape[2] and pixels.dtype == np.uint8):
        raise ContractError(
            f"expected a grey image [height, width], got an array of shape {pixels.shape}; "
            "give one image at a time, as grey levels"
        )
    if pixels.size == 0:
        raise ContractError(f"the image is empty (shape {pixels.shape})")
    if isinstance(pixels, np.ma.MaskedArray):
        raise ContractError("the image is a masked array; fill the masked pixels first")
    if pixels.ndim == 3:
        return Frame(pixels, (0.0, 255.0))
    return Frame(*to_grey8(_native(pixels), window))


def _native(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """uint8, uint16 or float32 in native byte order."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in PIXEL_KINDS.get(pixels.dtype.itemsize, ""):
        raise ContractError(f"expected pixels of type uint8, uint16 or float32, got {pixels.dtype}; convert the image")
    if pixels.dtype.kind != "f":
        return pixels.astype(np.uint16, copy=False)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, and is told
        return pixels.astype(np.float32, copy=False)


def _host_array(image: Any) -> npt.NDArray[Any]:
    if not (hasattr(image, "__dlpack__") and hasattr(image, "__dlpack_device__")):
        raise ContractError(
            f"expected an image as a numpy array [height, width] (or a Micrograph, or an array of another "
            f"library with DLPack), got {type(image).__name__}"
        )
    try:
        return np.from_dlpack(image)
    except Exception as exc:  # another library's code again
        raise ContractError(
            f"the {type(image).__name__} cannot be used in place ({one_line(exc, 'first')}); "
            "convert it to a numpy array first"
        ) from exc


def check_out(out: Any, shape: tuple[int, ...], pixels: npt.NDArray[np.uint8] | None) -> None:
    """Raise :class:`ContractError` unless ``out`` can take the labels of an image of ``shape``, apart from its memory.

    ``pixels``: the image, where it is in the host's memory.
    """
    if (
        not isinstance(out, np.ndarray)
        or out.shape != shape
        or out.dtype != np.uint8
        or not out.flags.writeable
    ):
        raise ContractError(
            f"out must be a writable uint8 array of shape {shape}, got {type(out).__name__} "
            f"{getattr(out, 'dtype', '')} {getattr(out, 'shape', '')}".rstrip()
        )
    if pixels is not None and np.may_share_memory(out, pixels):
        raise ContractError("out shares memory with the image, which is still read while labels are written")


def device_batch(image: Any) -> tuple[Any, tuple[int, int]]:
    """A grey image ``[H, W]`` on a GPU as a batch ``[1, 1, H, W]`` in the same memory, and its height and width.

    Raises :class:`ContractError` for another shape.
    """
    interface = None if hasattr(image, "__dlpack__") else image.__cuda_array_interface__
    shape = tuple(int(size) for size in (image.shape if interface is None else interface["shape"]))
    if len(shape) != 2 or 0 in shape:
        raise ContractError(f"expected a grey image [height, width] on the GPU, got shape {shape}")
    if interface is None:
        return image.reshape(1, 1, *shape), shape
    strides = interface.get("strides")
    changed = {"shape": (1, 1, *shape), "strides": None if strides is None else (0, 0, *strides)}
    return _CudaBatch(image, {**interface, **changed}), shape


class _CudaBatch:
    """An array on a GPU under another shape; keeps its owner alive."""

    def __init__(self, owner: Any, interface: dict[str, Any]) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = interface
