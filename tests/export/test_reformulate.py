"""Every rewrite against the unmodified module."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import ClassInfo, Manifest, Normalization
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.export.reformulate import (
    MAX_PHASE_CLASSES,
    DeployNetwork,
    FoldedPositionAttention,
    FullSize,
    GreyStem,
    LabelOutput,
    Phases,
)
from hpddrnet_trt.models.checkpoints import load_checkpoint
from hpddrnet_trt.models.network import VARIANTS, HPDDRNet, PositionAttention, network_config
from hpddrnet_trt.weights import locate
from tests.tiny_network import lively, tiny_manifest, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    frames = [simulate(height, width, seed=seed)[0] for seed in range(batch)]
    return torch.from_numpy(np.stack(frames)[:, None])


def normalized(image: Tensor, normalization: Normalization) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (normalization.mean, normalization.std))
    return (image.float() - mean) / std


def assert_same_logits(
    network: HPDDRNet, manifest: Manifest, image: Tensor, grey: bool = True, attention: str = "matmul"
) -> None:
    options = {"grey_input": grey, "output": "logits", "attention": attention}
    deployed = DeployNetwork(network, manifest, **options)  # type: ignore[arg-type]
    color = normalized(image, manifest.normalization)
    with torch.inference_mode():
        got, want = deployed(image if grey else color), network.predict_logits(color)
    assert want.std() > 1e-2  # otherwise nothing is compared
    assert float((got - want).abs().max()) < TOLERANCE


@functools.cache
def reference_network(golden: Path) -> tuple[HPDDRNet, Manifest]:
    stored = torch.load(golden / "hpddrnet" / "checkpoint.pth", weights_only=True)["state_dict"]
    network = HPDDRNet(network_config("hpddrnet-23-slim", 3))
    weights = network.state_dict()
    network.load_state_dict({name: stored[name].to(value.dtype) for name, value in weights.items()})
    classes = [ClassInfo(name=f"c{i}", color=(i, i, i)) for i in range(3)]
    return network.eval(), Manifest(network=network.config, classes=classes)


@pytest.mark.parametrize(
    ("size", "grey", "attention"),
    [((256, 256), False, "matmul"), ((136, 200), True, "attention-op"), ((1024, 1024), True, "matmul")],
)
def test_reference_weights(golden: Path, size: tuple[int, int], grey: bool, attention: str) -> None:
    assert_same_logits(*reference_network(golden), picture(*size), grey, attention)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    places = {key: VARIANTS[variant][key] for key in ("eca", "pam") if key in VARIANTS[variant]}
    network = lively(tiny_network(**places))
    assert_same_logits(network, tiny_manifest(network), picture(72, 104, batch=2))


@pytest.mark.parametrize("grey", [True, False])
def test_detail(grey: bool) -> None:
    network = lively(tiny_network(detail=True, pool_border="ignored"))
    assert_same_logits(network, tiny_manifest(network), picture(136, 200), grey)


@pytest.mark.parametrize("form", ["matmul", "attention-op"])
def test_position_attention_with_large_scores(form: str) -> None:
    source = lively(PositionAttention(32)).eval()  # type: ignore[arg-type]
    x = torch.randn(2, 32, 9, 13)
    folded = FoldedPositionAttention(source, form).eval()  # type: ignore[arg-type]
    assert sum(isinstance(module, nn.Linear) for module in folded.modules()) == 2
    with torch.inference_mode():
        got, want = folded(x), source(x)
    assert want.std() > 0.1
    assert float((got - want).abs().max()) < TOLERANCE


@pytest.mark.parametrize("form", ["matmul", "attention-op"])
@pytest.mark.parametrize("rank", [1, 40, 65])
def test_projections_of_low_rank_are_narrow(rank: int, form: str) -> None:
    """As weight decay leaves them: few singular values that count, the rest below an FP16 weight's rounding."""
    source = lively(PositionAttention(128)).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(rank)
    for layer in (source.pa.fc_k, source.pa.fc_o):
        full = torch.randn(128, 128, generator=generator) / 128
        low = torch.randn(128, rank, generator=generator) @ torch.randn(rank, 128, generator=generator) / 32
        layer.weight.data = low + 1e-6 * full
    x = torch.randn(2, 128, 9, 13, generator=generator)
    folded = FoldedPositionAttention(source, form).eval()  # type: ignore[arg-type]
    narrow = {1: 32, 40: 64, 65: None}[rank]  # in steps; more than half of the channels saves nothing
    assert folded.widths == (None if narrow is None else [narrow] * 3)
    assert folded.project.out_features == (128 if narrow is None else 3 * narrow)
    with torch.inference_mode():
        got, want = folded(x), source(x)
    assert want.std() > 0.1
    assert float((got - want).abs().max()) < 1e-3 * float(want.std())


def test_the_shipped_model_has_narrow_attention() -> None:
    """What its speed rests on: the products over all pairs of tokens have 32 channels, not 128 and 256."""
    network, _ = load_checkpoint(locate("nasa-super1", ".safetensors"))
    for module in network.modules():
        if isinstance(module, PositionAttention):
            assert FoldedPositionAttention(module).widths == [32, 32, 32]


# ------------------------------------------------------------------------------- grey input

GREY = st.floats(min_value=1, max_value=254)
SPREAD = st.floats(min_value=20, max_value=90)


@settings(max_examples=30, deadline=None)
@given(
    mean=st.tuples(GREY, GREY, GREY),
    std=st.tuples(SPREAD, SPREAD, SPREAD),
    stride=st.sampled_from([1, 2]),
    size=st.sampled_from([(8, 8), (9, 16), (24, 11)]),
)
def test_grey_stem_is_exact_to_the_last_row(
    mean: tuple[float, float, float], std: tuple[float, float, float], stride: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, stride, padding=1, bias=False)
    normalization = Normalization(mean=mean, std=std)
    image = torch.randint(0, 256, (2, 1, *size), dtype=torch.uint8)
    with torch.inference_mode():
        got, want = GreyStem(conv, normalization)(image), conv(normalized(image, normalization))
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("mean", "channels"), [(Normalization().mean, 2), ((100.5, 100.5, 100.5), 1)])
def test_equal_means_need_one_channel(mean: tuple[float, float, float], channels: int) -> None:
    assert GreyStem(nn.Conv2d(3, 8, 3), Normalization(mean=mean, std=(50, 60, 70))).conv.in_channels == channels


def test_grey_levels_survive_fp16_exactly() -> None:
    stem = GreyStem(nn.Conv2d(3, 8, 3, padding=1), Normalization())
    grey = np.arange(256)
    scale, shift = (part.flatten().numpy() for part in (stem.scale, stem.shift))
    half = grey.astype(np.float16) * np.float16(scale[0]) + np.float16(shift[0])
    assert np.array_equal(half.astype(np.float64), grey * float(scale[0]) + float(shift[0]))
    assert np.abs(half).max() < 4


# ------------------------------------------------------------------------------------ output


@pytest.mark.parametrize("stride", [2, 4, 8])
@given(classes=st.integers(1, 4), height=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_phases_are_the_bilinear_enlargement(stride: int, classes: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    scores, phases = torch.randn(2, classes, height, width), Phases(classes, stride)
    full = torch.cat([F.pixel_shuffle(plane, stride) for plane in phases(scores)], dim=1)
    want = F.interpolate(scores, scale_factor=stride, mode="bilinear", align_corners=False)
    torch.testing.assert_close(full, want, atol=1e-6, rtol=0)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(phases.conv.weight, phases.conv.weight.to(dtype).float())


@pytest.mark.parametrize("classes", [2, 3, MAX_PHASE_CLASSES, MAX_PHASE_CLASSES + 1])
@pytest.mark.parametrize("temperature", [None, 2.5])
def test_labels_and_confidence(classes: int, temperature: float | None) -> None:
    network = lively(tiny_network(num_classes=classes))
    nn.init.normal_(network.decode_head.conv_seg.weight, std=0.02)
    manifest, image = tiny_manifest(network).replace(temperature=temperature), picture(64, 104, batch=2)
    deployed = DeployNetwork(network, manifest, confidence=True)
    assert isinstance(deployed.output.enlarge, Phases if classes <= MAX_PHASE_CLASSES else FullSize)
    with torch.inference_mode():
        labels, confidence = deployed(image)
        logits = network.predict_logits(normalized(image, manifest.normalization))
    top = logits.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-4
    want = logits.argmax(1)
    assert len(want.unique()) > 1
    assert torch.equal(labels[clear], want[clear].to(torch.uint8))
    torch.testing.assert_close(confidence, torch.softmax(logits / (temperature or 1), 1).amax(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("classes", [4, MAX_PHASE_CLASSES + 1])
def test_ties_go_to_the_first_class(classes: int) -> None:
    scores = torch.zeros(1, classes, 3, 5)
    scores[:, 1:3, :, 2:] = 1.0
    labels = LabelOutput(False, 8, classes)(scores)
    assert labels.dtype == torch.uint8
    assert labels.shape == (1, 24, 40)
    assert torch.equal(labels[0, :, 32:], torch.ones(24, 8, dtype=torch.uint8))  # classes 1 and 2 tie
    assert torch.equal(labels[0, :, :8], torch.zeros(24, 8, dtype=torch.uint8))  # all tie


# -------------------------------------------------------------------------------------- whole


def test_source_network_is_untouched_and_dead_parts_are_gone() -> None:
    network = tiny_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    deployed = DeployNetwork(network, tiny_manifest(network))
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not [name for name, _ in deployed.named_parameters() if "aux" in name]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output": "logits", "confidence": True}, "confidence"),
        ({"attention": "flash"}, "attention form"),
        ({"output": "mask"}, "output"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, object], says: str) -> None:
    network = tiny_network()
    with pytest.raises(UsageError, match=says):
        DeployNetwork(network, tiny_manifest(network), **options)  # type: ignore[arg-type]
