"""Taking a frame from somebody else's buffer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.data.decode import MAX_PIXELS
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.stream.sentences import describe

_MAX_BYTES = 8 * MAX_PIXELS  # float64


def take_in(frame: Any, copy: bool) -> tuple[Any, str | None]:
    """What the worker shall segment, and None; or None, and why the frame cannot be taken. Never raises.

    Only what makes copying impossible or dangerous is looked at here, on the caller's thread: the
    segmenter says on the worker what is wrong with shape, type or values.
    """
    try:
        if not isinstance(frame, Micrograph):
            return _pixels(frame, copy), None
        return dataclasses.replace(frame, pixels=_pixels(frame.pixels, copy)), None
    except Exception as exc:
        # Whatever a foreign object raises belongs to that frame, never to the acquisition thread.
        return None, describe(exc)


def _pixels(pixels: Any, copy: bool) -> Any:
    if isinstance(pixels, np.ndarray):
        # np.broadcast_to makes arrays whose declared size costs no memory until they are copied.
        if pixels.nbytes > _MAX_BYTES or pixels.size > MAX_PIXELS:
            raise ContractError(f"a frame of shape {pixels.shape} is too large ({MAX_PIXELS} pixels at most); cut it")
        return np.array(pixels, order="C", subok=True) if copy else pixels  # a mask stays a mask
    on_device = hasattr(pixels, "__dlpack__") or hasattr(pixels, "__cuda_array_interface__")
    if not copy or not on_device:
        return pixels
    for name in ("clone", "copy"):  # torch; cupy and others
        method = getattr(pixels, name, None)
        if callable(method):
            return method()
    raise ContractError(f"a frame of type {type(pixels).__name__} cannot copy itself; submit it with copy=False")
