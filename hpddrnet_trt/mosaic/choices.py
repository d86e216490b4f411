"""What is chosen once for a mosaic, by the rules that hold for one picture: tiles, grey window, magnification."""

from __future__ import annotations

import numpy as np

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.magnification import Rescaling, in_words, rescaling
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.data.intensity import IntensityRange, range_of, to_grey8
from hpddrnet_trt.data.preprocess import scaled_size
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.inference.runner import Tile, check_tile, tile_size
from hpddrnet_trt.inference.tiling import TilePlan, plan_tiles
from hpddrnet_trt.mosaic.layout import Source

SAMPLE = 1 << 22  # pixels that the grey window is found from


def grid_for(manifest: Manifest, shape: tuple[int, int, int], factor: float, tile: Tile) -> TilePlan:
    """The tiles of every slice of a mosaic of ``shape`` (slices, height, width), which the network sees ``factor``
    times enlarged.

    ``tile``: their edge in pixels of the network; ``auto``: as for a large picture. Raises :class:`UsageError` or
    :class:`ContractError` for what the model does not take.
    """
    if tile == "whole":
        raise UsageError("a mosaic does not run in one piece; tile is 'auto' or a tile's edge in pixels")
    check_tile(tile, input_contract(manifest), None)
    height, width = scaled_size(shape[1], shape[2], factor)
    return plan_tiles(height, width, tile_size(manifest, "single", tile))


def chosen_window(
    source: Source, manifest: Manifest, intensity_range: IntensityRange = None
) -> tuple[tuple[float, float], tuple[str, ...]]:
    """The grey values of a mosaic that become black and white, and remarks about a guess.

    ``intensity_range``: what the user wants, as :func:`~hpddrnet_trt.data.intensity.to_grey8` takes it; else that of
    the model's training. Whatever depends on the picture is found from :data:`SAMPLE` pixels of the mosaic. Raises
    :class:`ContractError` for a range that is empty.
    """
    wanted = range_of(manifest.intensity) if intensity_range is None else intensity_range
    sample = source.sample(SAMPLE)
    if source.dtype.kind == "f":
        sample = sample[np.isfinite(sample)]  # empty pixels are NaN in many mosaics
    if not sample.size:
        nothing = "no acquired pixel was found for the grey window: that of the type of pixels is taken"
        white = 1.0 if source.dtype.kind == "f" else float(np.iinfo(source.dtype).max)
        return (0.0, white), (nothing,)
    grey = to_grey8(sample[np.newaxis], wanted)
    return grey.window, grey.remarks


def chosen_factor(source: Source, manifest: Manifest, rescale: bool = True) -> Rescaling:
    """How many pixels the network sees for one of the mosaic, as for a picture of this pixel size; always a factor,
    1.0 where nothing is known, with a remark."""
    trained = manifest.read_at_m if rescale else None
    if trained is None:
        return Rescaling(1.0)
    if source.pixel_size_m is None:
        about = f"the model was trained at {in_words(trained)}, and {source.path} does not tell its pixel size"
        return Rescaling(1.0, f"{about}: it is read as it is; give the pixel size")
    # The limit of an enlarged picture's size is for one that is held in memory: a mosaic is not.
    found = rescaling(source.pixel_size_m, trained, (1, 1))
    return found._replace(factor=found.factor or 1.0)
