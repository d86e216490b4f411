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
    Rewrites,
)
from hpddrnet_trt.models.network import VARIANTS, HPDDRNet, PositionAttention, network_config
from tests.tiny_network import lively, tiny_manifest, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
SIZES = [(256, 256), (136, 200), (1024, 1024)]
NONE = {"fold_norm": False, "fold_channel_attention": False, "fold_attention": False}
ALONE = {
    "norm": (Rewrites(**{**NONE, "fold_norm": True}), False),
    "channel-attention": (Rewrites(**{**NONE, "fold_channel_attention": True}), False),
    "attention": (Rewrites(**{**NONE, "fold_attention": True}), False),
    "grey-input": (Rewrites(**NONE), True),
    "all": (Rewrites(), True),
}


@functools.cache
def picture(height: int, width: int, batch: int = 1) -> Tensor:
    frames = [simulate(height, width, seed=seed)[0] for seed in range(batch)]
    return torch.from_numpy(np.stack(frames)[:, None])


def normalised(image: Tensor, normalization: Normalization) -> Tensor:
    mean = torch.tensor(normalization.mean).view(1, 3, 1, 1)
    std = torch.tensor(normalization.std).view(1, 3, 1, 1)
    return (image.float() - mean) / std


def difference(
    network: HPDDRNet, manifest: Manifest, image: Tensor, rewrites: Rewrites, grey: bool, attention: str = "matmul"
) -> float:
    deployed = DeployNetwork(
        network, manifest, rewrites=rewrites, grey_input=grey, output="logits", attention=attention
    )
    with torch.inference_mode():
        got = deployed(image if grey else normalised(image, manifest.normalization))
    want = unmodified(network, manifest.normalization, image)
    assert want.std() > 1e-2  # otherwise nothing is compared
    return float((got - want).abs().max())


@functools.lru_cache(maxsize=2)
def unmodified(network: HPDDRNet, normalization: Normalization, image: Tensor) -> Tensor:
    with torch.inference_mode():
        return network.predict_logits(normalised(image, normalization))


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_each_rewrite_alone_on_reference_weights(golden: Path, name: str, size: tuple[int, int]) -> None:
    network, manifest = reference_network(golden)
    assert difference(network, manifest, picture(*size), *ALONE[name]) < TOLERANCE


@pytest.mark.parametrize("name", ALONE)
def test_each_rewrite_alone_with_detail(name: str) -> None:
    network = lively(tiny_network(detail=True, pool_border="ignored"))
    assert difference(network, tiny_manifest(network), picture(136, 200), *ALONE[name]) < TOLERANCE


@pytest.mark.parametrize("size", SIZES[:2], ids=lambda size: f"{size[0]}x{size[1]}")
def test_attention_operator_form_on_reference_weights(golden: Path, size: tuple[int, int]) -> None:
    network, manifest = reference_network(golden)
    assert difference(network, manifest, picture(*size), Rewrites(), True, "attention-op") < TOLERANCE


@functools.cache
def reference_network(golden: Path) -> tuple[HPDDRNet, Manifest]:
    stored = torch.load(golden / "hpddrnet" / "checkpoint.pth", weights_only=True)["state_dict"]
    network = HPDDRNet(network_config("hpddrnet-23-slim", 3))
    weights = network.state_dict()
    network.load_state_dict({name: stored[name].to(value.dtype) for name, value in weights.items()})
    classes = [ClassInfo(name=f"c{i}", color=(i, i, i)) for i in range(3)]
    return network.eval(), Manifest(network=network.config, classes=classes)


@pytest.mark.parametrize("name", ALONE)
def test_each_rewrite_alone_on_random_weights(name: str) -> None:
    network = lively(tiny_network())
    assert difference(network, tiny_manifest(network), picture(136, 200, batch=2), *ALONE[name]) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str) -> None:
    places = {key: VARIANTS[variant][key] for key in ("eca", "pam") if key in VARIANTS[variant]}
    network = lively(tiny_network(**places))
    assert difference(network, tiny_manifest(network), picture(72, 104), Rewrites(), True) < TOLERANCE


@pytest.mark.parametrize("form", ["matmul", "attention-op"])
@pytest.mark.parametrize("fold", [True, False])
def test_position_attention_with_large_scores(form: str, fold: bool) -> None:
    torch.manual_seed(0)
    source = PositionAttention(32).eval()
    for module in source.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.25)
            nn.init.normal_(module.bias)
    x = torch.randn(2, 32, 9, 13)
    with torch.inference_mode():
        got = FoldedPositionAttention(source, form, fold).eval()(x)  # type: ignore[arg-type]
        want = source(x)
    assert want.std() > 0.1
    assert float((got - want).abs().max()) < TOLERANCE


def test_folded_attention_has_two_projections() -> None:
    folded = FoldedPositionAttention(PositionAttention(16))
    assert sum(isinstance(module, nn.Linear) for module in folded.modules()) == 2


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
        got = GreyStem(conv, normalization)(image)
        want = conv(normalised(image, normalization))
    for edge in (np.s_[..., 0, :], np.s_[..., -1, :], np.s_[..., :, 0], np.s_[..., :, -1], np.s_[...]):
        torch.testing.assert_close(got[edge], want[edge], atol=TOLERANCE, rtol=0)


def test_border_term_is_needed() -> None:
    """Without the channel of ones the borders (only they) would be wrong by far more than rounding."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    stem = GreyStem(conv, Normalization())
    assert stem.conv.in_channels == 2
    image = torch.randint(0, 256, (1, 1, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        right = stem(image)
        x = image * stem.scale + stem.shift
        wrong = F.conv2d(x[:, :1], stem.conv.weight[:, :1], padding=1)
        wrong = wrong + stem.conv.weight[:, 1].sum((1, 2)).view(1, -1, 1, 1)  # the term as a plain bias
    error = (right - wrong).abs().amax((0, 1))
    assert error[1:-1, 1:-1].max() < 1e-5
    assert error[0].max() > 1e-2
    assert error[:, -1].max() > 1e-2


def test_equal_means_need_one_channel() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    stem = GreyStem(conv, Normalization(mean=(100.5, 100.5, 100.5), std=(50, 60, 70)))
    assert stem.conv.in_channels == 1


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
    scores = torch.randn(2, classes, height, width)
    planes = Phases(classes, stride)(scores)
    full = torch.cat([torch.nn.functional.pixel_shuffle(plane, stride) for plane in planes], dim=1)
    want = torch.nn.functional.interpolate(scores, scale_factor=stride, mode="bilinear", align_corners=False)
    torch.testing.assert_close(full, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stride", [4, 8])
def test_weights_of_the_phases_are_exact_in_half_precision(stride: int) -> None:
    weight = Phases(3, stride).conv.weight
    assert torch.equal(weight, weight.half().float())
    assert torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize(("classes", "phases"), [(MAX_PHASE_CLASSES, True), (MAX_PHASE_CLASSES + 1, True), (3, False)])
def test_both_ways_of_labelling_agree(classes: int, phases: bool) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, classes, 6, 9)
    output = LabelOutput(True, 4, classes, phases)
    assert isinstance(output.enlarge, Phases if phases and classes <= MAX_PHASE_CLASSES else FullSize)
    full = torch.nn.functional.interpolate(scores, scale_factor=4, mode="bilinear", align_corners=False)
    labels, confidence = output(scores)
    top = full.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-5
    assert torch.equal(labels[clear], full.argmax(1).to(torch.uint8)[clear])
    torch.testing.assert_close(confidence, torch.softmax(full, 1).amax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("phases", [True, False])
def test_ties_go_to_the_first_class(phases: bool) -> None:
    scores = torch.zeros(1, 4, 3, 5)
    scores[:, 1:3, :, 2:] = 1.0
    labels = LabelOutput(False, 8, 4, phases)(scores)
    assert labels.dtype == torch.uint8
    assert labels.shape == (1, 24, 40)
    assert torch.equal(labels[0, :, 32:], torch.ones(24, 8, dtype=torch.uint8))  # classes 1 and 2 tie
    assert torch.equal(labels[0, :, :8], torch.zeros(24, 8, dtype=torch.uint8))  # all four tie


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_labels_and_confidence(classes: int) -> None:
    network = lively(tiny_network(num_classes=classes))
    torch.nn.init.normal_(network.decode_head.conv_seg.weight, std=0.02)
    manifest = tiny_manifest(network)
    image = picture(64, 104, batch=2)
    with torch.inference_mode():
        labels, confidence = DeployNetwork(network, manifest, confidence=True)(image)
        logits = network.predict_logits(normalised(image, manifest.normalization))
    want = logits.argmax(1)
    top = logits.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-4
    assert len(want.unique()) > 1
    assert torch.equal(labels[clear], want[clear].to(torch.uint8))
    torch.testing.assert_close(confidence, torch.softmax(logits, 1).amax(1), atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------- whole


def test_source_network_is_untouched_and_dead_parts_are_gone() -> None:
    network = tiny_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    deployed = DeployNetwork(network, tiny_manifest(network))
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not [name for name, _ in deployed.named_parameters() if "aux" in name]


def test_options_that_exclude_each_other() -> None:
    network = tiny_network()
    manifest = tiny_manifest(network)
    with pytest.raises(UsageError, match="confidence"):
        DeployNetwork(network, manifest, output="logits", confidence=True)
    with pytest.raises(UsageError, match="attention form"):
        DeployNetwork(network, manifest, attention="flash")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="output"):
        DeployNetwork(network, manifest, output="mask")  # type: ignore[arg-type]
