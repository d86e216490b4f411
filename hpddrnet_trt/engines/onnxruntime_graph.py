"""What ONNX Runtime is given in place of a file whose position attention it does not run well as it is.

Two cases, both exact but for rounding: attention in BF16, for which its CPU kernels are missing, gets
FP32 scores; and where the scores of all tokens would fill the memory, attention works in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.graph.attention import in_blocks, in_type, position_attentions, uses_bf16
from hpddrnet_trt.graph.check import rewritten

if TYPE_CHECKING:
    import onnx

TOKEN_STRIDE = 16  # pixels of the image per token and direction, at the finest of the attentions
# Scores of all pairs of tokens, FP32, above which attention works in blocks: reached at about 1450x1450.
LARGEST_SCORES_MIB = 256


def needs_blocks(shape: Sequence[int]) -> bool:
    """Whether the scores of an image batch ``[N, C, H, W]`` are more than :data:`LARGEST_SCORES_MIB`."""
    batch, _, height, width = shape
    tokens = -(-height // TOKEN_STRIDE) * -(-width // TOKEN_STRIDE)
    return batch * tokens**2 * 4 > LARGEST_SCORES_MIB << 20


def source_for_cpu(path: Path, manifest: Manifest, blocks: bool) -> Path | bytes:
    """The file's path, or the graph to load in its place."""
    typed = manifest.precision not in (None, "fp32", "bf16")
    if not (blocks or typed):
        return path

    def change(model: onnx.ModelProto) -> onnx.ModelProto | None:
        changed = None
        if typed and uses_bf16(model):
            model = changed = in_type(model, "fp32")
        if blocks and position_attentions(model):
            changed = in_blocks(model)
        return changed

    graph = rewritten(path, change)
    return path if graph is None else graph
