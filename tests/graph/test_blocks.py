"""Names of a network's parts from node names."""

from __future__ import annotations

import pytest

from hpddrnet_trt.graph.blocks import block_of, short


@pytest.mark.parametrize(
    ("node", "block"),
    [
        ("backbone.stem.0.conv.conv/Conv", "backbone.stem.0"),
        ("backbone.stem.2.0.conv1.conv/Conv", "backbone.stem.2.0"),
        ("backbone.stem.2.0.conv2.conv/Conv", "backbone.stem.2.0"),
        ("backbone.context_branch_layers.0.0.downsample.0/Conv", "backbone.context_branch_layers.0.0"),
        ("backbone.spp.scales.1.1.conv/Conv", "backbone.spp"),
        ("backbone.spp.compression.conv/Conv", "backbone.spp"),
        ("backbone.down_2.1.conv/Conv", "backbone.down_2"),
        ("backbone.compression_1.conv/Conv", "backbone.compression_1"),
        ("backbone.sps.0.cnn/Conv", "backbone.sps.0"),
        ("backbone.ecas.1.mix/Conv", "backbone.ecas.1"),
        ("head.0.conv/Conv", "head"),
        ("detail.mix.conv/Conv", "detail"),
        ("conv_seg/Conv", "conv_seg"),
        ("Conv_17", "Conv_17"),
    ],
)
def test_blocks(node: str, block: str) -> None:
    assert block_of(node) == block


def test_short_names() -> None:
    assert short("backbone.stem.2.0.conv1.conv/Conv") == "stem.2.0.conv1"
