"""Names of the weights of DDRNet-23 and -23-slim in other public implementations, in our terms.

The official repository (github.com/ydhongHIT/DDRNet, and the training code github.com/chenjun2hao/DDRNet.pytorch
built on it) and PaddleSeg (``paddleseg/models/ddrnet.py``) name most modules alike. Paddle's average pooling leaves
out what lies beyond the border, and PaddleSeg normalises with 0.5 and 0.5. Both give the two convolutions of the stem
a bias, which goes into the mean of the batch normalisation behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from hpddrnet_trt.core.manifest import Normalization

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint's names come from, and what that place does differently from ours.

    ``normalization``: what its training uses unless it is told otherwise, with ``normalized_by`` in words.
    ``remark``: a sentence on the file, empty for the layout that our names come from.
    """

    remark: str = ""
    pool_border: Literal["zeros", "ignored"] = "zeros"
    normalization: Normalization = field(default_factory=Normalization)
    normalized_by: str = "ImageNet's mean and standard deviation"


MMSEGMENTATION = Layout()
OFFICIAL = Layout("its weights are named as in the DDRNet repository: DDRNet, without the attention of HPDDRNet")
_OLD_PADDLESEG = Layout(
    "its weights are named as in PaddleSeg: DDRNet, without the attention of HPDDRNet; its average pooling leaves out "
    "what lies beyond the border, and so does this network's",
    "ignored", Normalization(mean=(127.5,) * 3, std=(127.5,) * 3), "PaddleSeg's mean and standard deviation, 127.5,",
)  # fmt: skip
# Its down3 is padded "same", which at stride 2 samples the other pixel of each two; no kernel of ours does.
PADDLESEG = replace(
    _OLD_PADDLESEG,
    remark=f"{_OLD_PADDLESEG.remark}, but its down3 is padded on one side only and this network's on both: "
    "labels differ from those it was trained to give, so train on from it, or compare before use",
)

# What is called otherwise wherever it stands: Paddle's statistics, and its convolutions with normalisation.
_ANYWHERE = [
    (r"\._conv\.", ".conv."), (r"\._batch_norm\.", ".bn."), (r"\._mean$", ".running_mean"),
    (r"\._variance$", ".running_var"),
]  # fmt: skip
# Theirs as a pattern of the beginning of a name, ours as what takes its place; the first that fits counts.
_BEGINNINGS = [
    (r"conv1\.([01])\.(conv|bn)\.", r"backbone.stem.\1.\2."),  # PaddleSeg
    (r"conv1\.0\.", "backbone.stem.0.conv."),
    (r"conv1\.1\.", "backbone.stem.0.bn."),
    (r"conv1\.3\.", "backbone.stem.1.conv."),
    (r"conv1\.4\.", "backbone.stem.1.bn."),
    (r"layer1\.", "backbone.stem.2."),
    (r"layer2\.", "backbone.stem.4."),
    (r"layer3\.", "backbone.context_branch_layers.0."),
    (r"layer4\.", "backbone.context_branch_layers.1."),
    (r"layer5\.", "backbone.context_branch_layers.2."),
    (r"layer3_\.", "backbone.spatial_branch_layers.0."),
    (r"layer4_\.", "backbone.spatial_branch_layers.1."),
    (r"layer5_\.", "backbone.spatial_branch_layers.2."),
    (r"compression3\.", "backbone.compression_1."),
    (r"compression4\.", "backbone.compression_2."),
    (r"down3\.", "backbone.down_1."),
    (r"down4\.([01])\.(conv|bn)\.", r"backbone.down_2.\1.\2."),  # PaddleSeg
    (r"down4\.([01])\.", r"backbone.down_2.0.\1."),
    (r"down4\.3\.", "backbone.down_2.1.0."),
    (r"down4\.4\.", "backbone.down_2.1.1."),
    (r"spp\.scale0\.", "backbone.spp.scales.0."),
    (r"spp\.scale([1-4])\.1\.", r"backbone.spp.scales.\1.1.0."),
    (r"spp\.scale([1-4])\.3\.", r"backbone.spp.scales.\1.1.2."),
    (r"spp\.process1\.", "backbone.spp.processes.0."),
    (r"spp\.process2\.", "backbone.spp.processes.1."),
    (r"spp\.process3\.", "backbone.spp.processes.2."),
    (r"spp\.process4\.", "backbone.spp.processes.3."),
    (r"spp\.(compression|shortcut)\.", r"backbone.spp.\1."),
    (r"final_layer\.(bn|conv)1\.", r"decode_head.head.0.\1."),
    (r"final_layer\.bn2\.", "decode_head.head.1."),
    (r"final_layer\.conv2\.", "decode_head.conv_seg."),
    (r"seghead_extra\.(bn|conv)1\.", r"decode_head.aux_head.0.\1."),
    (r"seghead_extra\.bn2\.", "decode_head.aux_head.1."),
    (r"seghead_extra\.conv2\.", "decode_head.aux_cls_seg."),
    (r"(head|aux_head)\.bn1\.", r"decode_head.\1.0.bn."),  # PaddleSeg from here
    (r"(head|aux_head)\.conv_bn_relu\.conv\.", r"decode_head.\1.0.conv."),
    (r"(head|aux_head)\.conv_bn_relu\.bn\.", r"decode_head.\1.1."),
    (r"head\.conv\.", "decode_head.conv_seg."),
    (r"aux_head\.conv\.", "decode_head.aux_cls_seg."),
]
# Within blocks and sequences, where ours have names and theirs numbers.
_PARTS = [
    (r"^(backbone\.(?:stem\.[24]|\w+_branch_layers\.\d)\.\d+)\.(conv|bn)([123])\.", r"\1.conv\3.\2."),
    (r"^(backbone\.\w+_branch_layers\.2\.0)\.conv_bn_relu([12])\.", r"\1.conv\2."),  # PaddleSeg's blocks
    (r"^(backbone\.\w+_branch_layers\.2\.0)\.conv_bn\.", r"\1.conv3."),
    (r"^(backbone\.(?:stem\.[24]|\w+_branch_layers\.[01])\.\d+)\.conv_bn_relu\.", r"\1.conv1."),
    (r"^(backbone\.(?:stem\.[24]|\w+_branch_layers\.[01])\.\d+)\.conv_bn\.", r"\1.conv2."),
    (r"^(backbone\.(?:compression_\d|down_1|down_2\.\d))\.0\.", r"\1.conv."),
    (r"^(backbone\.(?:compression_\d|down_1|down_2\.\d))\.1\.", r"\1.bn."),
    (r"^(backbone\.spp\.(?:scales\.0|scales\.\d\.1|processes\.\d|compression|shortcut))\.0\.", r"\1.bn."),
    (r"^(backbone\.spp\.(?:scales\.0|scales\.\d\.1|processes\.\d|compression|shortcut))\.2\.", r"\1.conv."),
]
_STEM = ("backbone.stem.0", "backbone.stem.1")


def in_our_layout(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Layout]:
    """Weights by our names, and where theirs come from; names that no table knows are left as they are."""
    if not any(name.startswith(("layer3_.", "layer3_1.")) for name in weights) or "conv1.weight" in weights:
        return dict(weights), MMSEGMENTATION
    layout = OFFICIAL
    if any(name.endswith("._mean") for name in weights):
        layout = PADDLESEG if "down3._conv.weight" in weights else _OLD_PADDLESEG
    ours = {_our_name(name): value for name, value in weights.items()}
    for stem in _STEM:
        bias, mean = ours.pop(f"{stem}.conv.bias", None), ours.get(f"{stem}.bn.running_mean")
        if bias is not None and mean is not None and bias.shape == mean.shape:
            ours[f"{stem}.bn.running_mean"] = mean - bias
    return ours, layout


def _our_name(name: str) -> str:
    for theirs, replacement in _ANYWHERE:
        name = re.sub(theirs, replacement, name)
    for theirs, replacement in _BEGINNINGS:
        renamed, count = re.subn(rf"^{theirs}", replacement, name)
        if count:
            for part, new in _PARTS:
                renamed = re.sub(part, new, renamed)
            return renamed
    return name
