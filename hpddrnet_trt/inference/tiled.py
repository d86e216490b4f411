"""When an image is tiled, with which tiles, and how it then runs: see :mod:`hpddrnet_trt.inference.tiling`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Literal

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import AxisRange, InputContract, Manifest
from hpddrnet_trt.core.metrics import arg_max, softmax
from hpddrnet_trt.data.preprocess import Mode, plan_tta
from hpddrnet_trt.inference.runner import Found, Inference
from hpddrnet_trt.inference.tiling import Seams, TilePlan, TilingReport, blend, own_parts, plan_tiles

Tile = Literal["auto", "whole"] | int
Progress = Callable[[int, int], None]

# "auto" runs an image whole up to this size of its largest view: about 0.7 GiB with the CPU engines, and more than
# the usual live frame. Larger ones need memory and see far more at once than a training crop.
WHOLE_PIXELS = 2048 * 2048
DEFAULT_TILE = 1024  # where the description does not say what crops the model was trained on


def check_tile(tile: Tile, contract: InputContract, resize: tuple[int, int] | None) -> None:
    """Raise :class:`UsageError` or :class:`ContractError` for a ``tile`` that cannot be used."""
    if tile in ("auto", "whole"):
        return
    if isinstance(tile, (str, bool)) or tile < 1 or tile % contract.multiple:
        raise UsageError(
            f"tile is 'auto', 'whole' or a tile's edge in pixels, a multiple of {contract.multiple}; got {tile!r}"
        )
    if resize is not None:
        raise UsageError("resize brings the whole image to another size; use it with tile='auto' or 'whole'")
    for name, axis in (("height", contract.height), ("width", contract.width)):
        if not axis.admits(tile):
            raise ContractError(f"a tile of {tile} pixels does not fit this model's {name}, {axis}; use tile='auto'")


def plan_for(inference: Inference, tile: Tile, height: int, width: int) -> TilePlan | None:
    """The tiles of an image of ``height`` x ``width``, None when it runs whole.

    Raises :class:`ContractError` when the model admits no tile that all views of the mode fit.
    """
    if tile == "whole" or (tile == "auto" and _runs_whole(inference, height, width)):
        return None
    contract = inference.contract
    size = tile_size(inference.manifest, inference.mode, contract) if tile == "auto" else (int(tile), int(tile))
    plan = plan_tiles(height, width, size)
    return plan if plan.tiles > 1 else None


def _runs_whole(inference: Inference, height: int, width: int) -> bool:
    if inference.resize is not None:
        return True
    contract = inference.contract
    return all(
        _fits(transform.height, contract.height, contract.multiple)
        and _fits(transform.width, contract.width, contract.multiple)
        and transform.height * transform.width <= WHOLE_PIXELS
        for transform in inference.transforms(height, width)
    )


def tile_size(manifest: Manifest, mode: Mode, contract: InputContract) -> tuple[int, int]:
    """Height and width of tiles: those of the training crops where known, as near as the model admits."""
    crop = None if manifest.data is None else manifest.data.crop
    height, width = crop or (DEFAULT_TILE, DEFAULT_TILE)
    multiple = contract.multiple
    return _edge(height, contract.height, multiple, mode), _edge(width, contract.width, multiple, mode)


def _edge(wanted: int, axis: AxisRange, multiple: int, mode: Mode) -> int:
    largest = max(wanted, axis.minimum)
    largest = largest if axis.maximum is None else min(largest, axis.maximum)
    for edge in range(largest - largest % multiple, 0, -multiple):
        if all(_fits(transform.height, axis, multiple) for transform in plan_tta(mode, edge, edge)):
            return edge
    raise ContractError(f"mode {mode!r} needs several sizes of each tile, and this model takes {axis} only")


def _fits(size: int, axis: AxisRange, multiple: int) -> bool:
    return axis.admits(-(-max(size, axis.minimum) // multiple) * multiple)


def segment_tiled(
    inference: Inference,
    pixels: npt.NDArray[np.uint8],
    plan: TilePlan,
    labels: npt.NDArray[np.uint8],
    confidence: npt.NDArray[np.float32] | None,
    progress: Progress | None,
) -> TilingReport:
    """Fill ``labels`` uint8 ``[H, W]`` and, where given, ``confidence`` float32 ``[H, W]``, band by band."""
    seams = Seams(plan)
    with closing(_tiles(inference, pixels, plan, seams, progress)) as tiles:
        if inference.gives_logits:
            for rows, scores in blend(plan, (_scores(tile) for tile in tiles)):
                inference.checked(scores)
                labels[rows] = arg_max(scores[None])[0]
                if confidence is not None:
                    np.max(_probabilities(inference, scores), axis=0, out=confidence[rows])
            return plan.report("blended scores", seams)
        for (here, inside), tile in zip(own_parts(plan), tiles, strict=True):
            labels[here] = tile.labels[0][inside]
            if confidence is not None and tile.confidence is not None:
                confidence[here] = tile.confidence[0][inside]
        return plan.report("cut labels", seams)


def scores_tiled(
    inference: Inference, pixels: npt.NDArray[np.uint8], plan: TilePlan, progress: Progress | None
) -> npt.NDArray[np.float32]:
    """Class probabilities ``[C, H, W]``, all in memory."""
    found = np.empty((inference.manifest.network.num_classes, plan.height, plan.width), dtype=np.float32)
    with closing(_tiles(inference, pixels, plan, Seams(plan), progress)) as tiles:
        for rows, scores in blend(plan, (_scores(tile) for tile in tiles)):
            found[:, rows] = _probabilities(inference, inference.checked(scores))
    return found


def _tiles(
    inference: Inference, pixels: npt.NDArray[np.uint8], plan: TilePlan, seams: Seams, progress: Progress | None
) -> Generator[Found]:
    done = 0
    with closing(inference.each(pixels[place] for place in plan)) as found:
        for tile in found:
            seams.add(tile.labels[0])
            done += 1
            if progress is not None:
                progress(done, plan.tiles)
            yield tile


def _scores(tile: Found) -> npt.NDArray[np.float32]:
    assert tile.scores is not None  # of a model with logits
    return tile.scores[0]


def _probabilities(inference: Inference, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What was blended, as probabilities: a single view gives logits."""
    return softmax(scores[None])[0] if inference.mode == "single" else scores
