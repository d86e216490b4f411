"""The network without reference data: variants, sizes, training mode, attention."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import NetworkConfig
from hpddrnet_trt.models.network import DAPPM, ECA, VARIANTS, HPDDRNet, PositionAttention, network_config
from tests.tiny_network import tiny_network


def parameters(network: nn.Module, without: str = "no such part") -> int:
    return sum(value.numel() for name, value in network.named_parameters() if without not in name)


def on_meta(variant: str, classes: int) -> HPDDRNet:
    with torch.device("meta"):
        return HPDDRNet(network_config(variant, classes))


def test_parameter_counts_and_full_widths() -> None:
    """HPDDRNet adds two position attentions (a 3x3 convolution and four projections) and two kernels of 3.

    Published for DDRNet (arXiv:2101.06085, Cityscapes): 19 classes, without the auxiliary head.
    """
    for variant, published in (("ddrnet-23-slim", 5.7e6), ("ddrnet-23", 20.1e6)):
        assert parameters(on_meta(variant, 19), without="aux") == pytest.approx(published, abs=0.05e6)
    for size, channels in (("23-slim", 32), ("23", 64)):
        plain, full = on_meta(f"ddrnet-{size}", 3), on_meta(f"hpddrnet-{size}", 3)
        widths = (4 * channels, 8 * channels)
        attention = sum(9 * c * c + c + 4 * (c * c + c) for c in widths)
        assert parameters(full) - parameters(plain) == attention + 2 * 3
        assert parameters(on_meta(f"hpddrnet-{size}-no-eca", 3)) == parameters(full) - 6
        assert parameters(on_meta(f"hpddrnet-{size}-no-pam", 3)) == parameters(full) - attention
        assert [logits.shape for logits in full(torch.rand(2, 3, 64, 64, device="meta"))] == [(2, 3, 8, 8)] * 2
    assert parameters(on_meta("ddrnet-23-slim", 19)) == 5_734_278  # counted in the authors' framework


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_predicts(variant: str) -> None:
    config = network_config(variant, 5)
    # The full widths are checked by the counts above; a few channels show the same wiring.
    small = tiny_network(eca=config.eca, pam=config.pam, num_classes=5)
    images = torch.rand(2, 3, 64, 96)
    main, auxiliary = small.train()(images)
    assert main.shape == auxiliary.shape == (2, 5, 8, 12)
    (main.square().mean() + auxiliary.square().mean()).backward()
    dead = [
        name for name, value in small.named_parameters()
        if value.grad is None or not bool(torch.isfinite(value.grad).all())
    ]  # fmt: skip
    assert dead == []
    logits = small.eval()(images)
    assert logits.shape == (2, 5, 8, 12)
    assert small.predict_logits(images).shape == (2, 5, 64, 96)


def test_placements_of_attention_differ() -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    usual, other = tiny_network(seed=3, channels=8), tiny_network(seed=3, channels=8, eca="spatial", pam="context")
    assert {k: v.shape for k, v in usual.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    other.load_state_dict(usual.state_dict())
    with torch.inference_mode():
        assert float((usual(images) - other(images)).abs().max()) > 1e-4


def test_unknown_variant() -> None:
    with pytest.raises(UsageError, match=r"unknown network 'hpddrnet-24'; choose one of: hpddrnet-23-slim, "):
        network_config("hpddrnet-24", 3)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 14), width=st.integers(1, 14), batch=st.integers(1, 3))
def test_any_multiple_of_eight_works(height: int, width: int, batch: int) -> None:
    network = tiny_network()
    with torch.inference_mode():
        logits = network(torch.rand(batch, 3, 8 * height, 8 * width))
    assert logits.shape == (batch, 3, height, width)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 100, 96), "multiples of 8, not 100x96"),
        (torch.zeros(1, 3, 96, 97), "multiples of 8, not 96x97"),
        (torch.zeros(1, 3, 0, 8), "multiples of 8, not 0x8"),
        (torch.zeros(1, 1, 64, 64), r"not torch.float32 \[1, 1, 64, 64\]"),
        (torch.zeros(3, 64, 64), r"not torch.float32 \[3, 64, 64\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"not torch.uint8"),
    ],
)
def test_impossible_inputs(network: HPDDRNet, image: Tensor, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        network(image)


def test_training_modes_are_told_apart(network: HPDDRNet) -> None:
    network.train()
    with pytest.raises(ContractError, match="at least two images"):
        network(torch.rand(1, 3, 64, 64))
    with pytest.raises(UsageError, match=r"network.eval\(\)"):
        network.predict_logits(torch.rand(2, 3, 64, 64))


def test_size_check_does_not_disturb_export() -> None:
    """In an exported program height and width stay symbols, without any size of the example."""
    network = tiny_network()
    network.backbone = nn.Conv2d(3, 3, 1)  # the wiring exports slowly, and is the exporter's to test
    network.decode_head = nn.Identity()
    axes = [torch.export.Dim(name, min=2, max=512) for name in ("height", "width")]
    program = torch.export.export(network, (torch.rand(2, 3, 64, 96),), dynamic_shapes=({2: axes[0], 3: axes[1]},))
    assert program.module()(torch.rand(2, 3, 8, 20)).shape == (2, 3, 8, 20)


def test_position_attention_by_hand() -> None:
    """Against the formula written with loops, one query at a time."""
    torch.manual_seed(0)
    attention = PositionAttention(6).eval()
    x = torch.randn(2, 6, 3, 4)
    with torch.no_grad():
        result, y = attention(x), attention.cnn(x)
        p = attention.pa
        for image in range(2):
            tokens = [y[image, :, row, column] for row in range(3) for column in range(4)]
            for index, token in enumerate(tokens):
                scores = torch.stack([p.fc_q(token) @ p.fc_k(other) / math.sqrt(6) for other in tokens])
                mixed = sum(w * p.fc_v(other) for w, other in zip(scores.softmax(0), tokens, strict=True))
                expected = p.fc_o(mixed)
                assert torch.allclose(result[image, :, index // 4, index % 4], expected, atol=1e-5)


def test_channel_attention_by_hand() -> None:
    torch.manual_seed(0)
    eca = ECA()
    x = torch.randn(2, 5, 3, 4)
    before, centre, after = eca.conv.weight.detach().flatten().tolist()
    means = nn.functional.pad(x.mean(dim=(2, 3)), (1, 1))  # channels beyond the ends count as zero
    weight = torch.sigmoid(before * means[:, :-2] + centre * means[:, 1:-1] + after * means[:, 2:])
    assert torch.allclose(eca(x), x * weight[:, :, None, None], atol=1e-6)


def test_pooling_counts_borders_as_zeros_or_keeps_the_mean() -> None:
    counting, ignoring = (
        [m for m in DAPPM(8, 4, 8, count_border=count).modules() if isinstance(m, nn.AvgPool2d)]
        for count in (True, False)
    )
    assert [(p.kernel_size, p.stride, p.padding) for p in counting] == [(5, 2, 2), (9, 4, 4), (17, 8, 8)]
    assert float(counting[0](torch.ones(1, 1, 8, 8))[0, 0, 0, 0]) == pytest.approx(9 / 25)
    assert len(ignoring) == 3
    for pool in ignoring:
        assert torch.allclose(pool(torch.full((1, 1, 9, 7), 3.0)), torch.tensor(3.0))


def test_detail_gives_logits_at_a_quarter() -> None:
    network = tiny_network(detail=True, pool_border="ignored")
    image = torch.rand(2, 3, 64, 96)
    assert network(image).shape == (2, 3, 16, 24)
    assert network.predict_logits(image).shape == (2, 3, 64, 96)
    main, auxiliary = network.train()(image)
    assert main.shape == (2, 3, 16, 24)
    assert auxiliary.shape == (2, 3, 8, 12)
    assert network.config.name == "hpddrnet-4ch-detail-borderless"


def test_detail_sees_what_the_branches_cannot() -> None:
    """With the branches' contribution gone, the logits still follow the image at 1/4."""
    network = tiny_network(detail=True)
    network.decode_head.head.register_forward_hook(lambda _m, _i, output: torch.zeros_like(output))
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 1.0
    with torch.no_grad():
        columns = network(image)[0, :, 8]
    assert not torch.allclose(columns[:, 4], columns[:, 12])


def test_detail_costs_what_its_docstring_says() -> None:
    """Multiply-accumulates per image of 1024x1024: 1x1 from 32 and 3x3 from 64 channels to 64, at 1/4."""
    with torch.device("meta"):
        detail = HPDDRNet(NetworkConfig(num_classes=3, **VARIANTS["hpddrnet-23-slim"], detail=True)).decode_head.detail
    assert detail is not None
    macs = sum(m.weight.numel() for m in detail.modules() if isinstance(m, nn.Conv2d)) * 256**2
    assert macs == pytest.approx(2.55e9, rel=0.001)
