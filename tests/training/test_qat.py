"""Fake quantization: that training rounds what deployment rounds, and that it trains, resumes and helps."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import Normalization
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.export.onnx import ExportOptions, simplified, trace
from hpddrnet_trt.export.reformulate import GreyStem, two_class_margin
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.nodes import name_nodes
from hpddrnet_trt.models.checkpoints import load_checkpoint
from hpddrnet_trt.models.network import HPDDRNet, resize
from hpddrnet_trt.training.callbacks import TrainingInterrupted
from hpddrnet_trt.training.config import TrainConfig, load_config
from hpddrnet_trt.training.module import SegmentationModule
from hpddrnet_trt.training.qat import (
    FIRST,
    FakeQuantization,
    Site,
    fake_quant_sites,
    round_activation,
    round_weight,
)
from hpddrnet_trt.training.run import TrainResult, train
from tests.interrupts import deliver
from tests.tiny_network import lively, tiny_manifest, tiny_network
from tests.training.conftest import TINY
from tests.training.test_run import assert_same_run, val_miou

pytestmark = pytest.mark.usefixtures("one_thread")
GREY = Normalization(mean=(118.3,) * 3, std=(41.7,) * 3)
TUNING = [
    "quantization.enabled=true",
    "quantization.images=6",
    "optimization.freeze_norm=true",
    "optimization.lr=1e-4",
    "optimization.max_steps=8",
]


# --- as deployed


@dataclass(frozen=True)
class Exported:
    """A network, its fake quantization with the ranges of some images, and the graph it is deployed as."""

    network: HPDDRNet
    fake: FakeQuantization
    images: Tensor  # uint8 [N, 1, H, W]
    normalization: Normalization
    model: Any
    plan: qdq.Plan
    labels: bool

    def node(self, name: str) -> Any:
        return next(node for node in self.model.graph.node if node.name == name)

    def input(self) -> Tensor:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.normalization.mean, self.normalization.std))
        return (self.images.float() - mean) / std


def node_of(convolution: str) -> str:
    """The node of the exported graph that a convolution of the network becomes."""
    inner = ".conv" if convolution == FIRST else ""
    return f"{convolution.removeprefix('decode_head.')}{inner}/Conv"


VARIANTS: dict[str, dict[str, Any]] = {
    "as trained": {"detail": True, "pool_border": "ignored"},
    "two classes, ImageNet": {"num_classes": 2, "eca": "spatial", "pam": "context"},
    "without PAM": {"pam": "none"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest) -> Exported:
    network = lively(tiny_network(**VARIANTS[request.param]))
    labels = network.config.num_classes == 2  # then the classifier becomes one channel
    normalization = Normalization() if "ImageNet" in request.param else GREY
    images = torch.stack([torch.from_numpy(simulate(96, 128, seed)[0])[None] for seed in range(4)])
    fake = FakeQuantization(network, normalization)
    options = ExportOptions(output="labels" if labels else "logits")
    model = simplified(trace(network, tiny_manifest(network, normalization=normalization), options))
    name_nodes(model)
    plan = qdq.plan(model, "tensorrt")
    result = Exported(network, fake, images, normalization, model, plan, labels)
    fake.observe(network, result.input().split(2))
    return result


def run_onnx(model: Any, images: Tensor) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # just what the graph says
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"image": images.numpy()}))


def tensor_at(exported: Exported, site: Site) -> str:
    """The tensor of the exported graph that a site rounds."""
    graph = exported.model.graph
    if site.end == "input":
        inside = f"{site.module}.conv1.conv"  # of a block
        convolution = inside if inside in fake_quant_sites(exported.network).inputs else site.module
        return str(exported.node(node_of(convolution)).input[0])
    if site.end == "resized":
        # In the pyramid pooling, between these, resized maps stay in floating point.
        pyramid = len(exported.network.backbone.spp.processes)
        place = {0: 0, 1: 1, 2 + pyramid: 2, 3 + pyramid: 0}[site.number]
        prefix = site.module.removeprefix("decode_head.") + "/"
        resizes = [node for node in graph.node if node.op_type == "Resize" and node.name.startswith(prefix)]
        return str(resizes[place].output[0])
    prefixes = (f"{site.module}.", f"{site.module}/")
    return str([node for node in graph.node if node.name.startswith(prefixes)][-1].output[0])  # in topological order


def test_the_same_convolutions_activations_and_scales(exported: Exported) -> None:
    chosen = fake_quant_sites(exported.network)
    assert len(chosen.all) == len(set(chosen.all))
    assert {node_of(name) for name in chosen.inputs} == set(exported.plan.nodes)
    assert {tensor_at(exported, site) for site in chosen.all} == set(exported.plan.tensors)
    for convolution, site in chosen.inputs.items():
        assert tensor_at(exported, site) == exported.node(node_of(convolution)).input[0]
    shared = {frozenset(tensor_at(exported, site) for site in pair) for pair in chosen.shared}
    assert shared == {frozenset(group) for group in exported.plan.shared}


def tensor_ranges(exported: Exported) -> dict[str, float]:
    """The range of training for each tensor that deployment rounds."""
    found: dict[str, float] = {}
    for site, largest in zip(fake_quant_sites(exported.network).all, exported.fake.ranges.tolist(), strict=True):
        # One tensor, one range, whoever reads it.
        assert found.setdefault(tensor_at(exported, site), largest) == largest
    return found


def test_the_same_ranges_are_found(exported: Exported) -> None:
    probe = onnx.ModelProto()
    probe.CopyFrom(exported.model)
    del probe.graph.output[:]
    names = exported.plan.tensors
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    values = dict(zip(names, run_onnx(probe, exported.images), strict=True))
    observed = {name: (float(value.min()), float(value.max())) for name, value in values.items()}
    observed = qdq.share_ranges(exported.plan, observed)
    for name, largest in tensor_ranges(exported).items():
        low, high = observed[name]
        assert largest == pytest.approx(max(-low, high), rel=1e-3), name


def test_the_rounded_forward_pass_is_that_of_the_exported_graph(exported: Exported) -> None:
    limits = {name: (-value, value) for name, value in tensor_ranges(exported).items()}
    quantised = qdq.quantize(exported.model, "tensorrt", exported.plan, limits)
    float_onnx, int8_onnx = (run_onnx(model, exported.images)[0] for model in (exported.model, quantised))
    with torch.no_grad():
        coarse = exported.fake(exported.network, exported.input())
        assert isinstance(coarse, Tensor)
        ours = resize(coarse, *exported.images.shape[-2:])
    if exported.labels:
        ours_labels = ours.argmax(1).numpy()
        assert (float_onnx != int8_onnx).sum() > 30  # rounding matters here
        assert (ours_labels != int8_onnx).sum() < 0.1 * (float_onnx != int8_onnx).sum()
        return
    rounding, disagreement = float_onnx - int8_onnx, ours.numpy() - int8_onnx
    # What stays began with values within float rounding of the middle between two levels: 2 in 10,000 in the
    # first layers. A random network of four channels, unlike a trained one, makes more of them.
    assert np.sqrt((disagreement**2).mean()) < 0.5 * np.sqrt((rounding**2).mean())


@pytest.mark.parametrize("normalization", [GREY, Normalization()], ids=["one mean", "three means"])
def test_the_first_and_the_last_convolution_are_rounded_in_their_deployed_form(normalization: Normalization) -> None:
    network = tiny_network(num_classes=2)
    rounded = FakeQuantization(network, normalization).weights(network)
    deployed = GreyStem(network.backbone.stem[0].conv, normalization).conv.weight  # grey and, with three means, ones
    channels = deployed.shape[1]
    assert channels == (1 if normalization is GREY else 2)
    first = rounded[f"{FIRST}.weight"]
    assert torch.allclose(first[:, :channels], round_weight(deployed), rtol=1e-5, atol=1e-7)
    assert not first[:, channels:].any()
    last = rounded["decode_head.conv_seg.weight"]
    margin = two_class_margin(network.decode_head.conv_seg).weight
    assert torch.allclose(last[1:] - last[:1], round_weight(margin), rtol=1e-5, atol=1e-7)


# --- rounding


@given(st.integers(0, 2**31), st.floats(-3, 3))
def test_rounding_commutes_with_the_factor_of_a_normalisation_layer(seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, 3, 3, generator=generator)
    gain = (torch.randn(5, generator=generator) * 10**exponent).view(-1, 1, 1, 1)
    folded, unfolded = round_weight(weight * gain), round_weight(weight) * gain
    level = (weight * gain).abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    steps = ((folded - unfolded) / level).abs()
    assert steps.max() < 1.001  # a value in the middle of two levels may fall to either side
    assert (steps > 1e-3).sum() <= 1


def test_levels_are_those_of_int8() -> None:
    weight = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    levels = round_weight(weight) / weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-9) * 127
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert levels.abs().amax(dim=(1, 2, 3)).tolist() == pytest.approx([127, 127, 127, 0])
    values = torch.tensor([-9.0, -2.0, -0.004, 0.0, 0.02, 1.0, 9.0])
    rounded = round_activation(values, torch.tensor(1.27))
    assert rounded.tolist() == pytest.approx([-1.28, -1.28, 0, 0, 0.02, 1.0, 1.27])
    assert round_activation(values, torch.tensor(0.0)).abs().max() < 1e-9


def test_percentile_leaves_the_largest_values_out() -> None:
    network = tiny_network()
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = image[:, :1].expand(-1, 3, -1, -1)
    found = {}
    for percentile in (100.0, 99.0):
        fake = FakeQuantization(network, GREY, percentile)
        fake.observe(network, [image])
        found[percentile] = fake.ranges.clone()
    assert (found[99.0] <= found[100.0]).all()
    # The grey channel in the form it is deployed in, beside two constant channels of zeros.
    grey = (image[:, 0] * 41.7 / 32).abs()
    assert float(found[100.0][0]) == pytest.approx(float(grey.max()), rel=1e-5)
    assert float(found[99.0][0]) == pytest.approx(float(grey.flatten().quantile(1 - 0.03)), rel=0.01)


def test_an_activation_that_is_not_finite_is_told() -> None:
    network = tiny_network()
    with torch.no_grad():
        network.backbone.down_1.bn.bias.fill_(torch.inf)
    fake = FakeQuantization(network, GREY)
    with pytest.raises(UserError, match=r"not finite \(\w+ of backbone\.context_branch_layers\.1\.0\)"):
        fake.observe(network, [torch.zeros(1, 3, 64, 64)])


def test_the_network_itself_stays_a_float_network_and_a_copy_is_independent() -> None:
    network = tiny_network()
    names, image = list(network.state_dict()), torch.randn(1, 3, 64, 64)
    pair = nn.ModuleList([network, fake := FakeQuantization(network, GREY)])
    with torch.no_grad():
        before = network(image)
        fake.observe(network, [image])
        rounded = fake(network, image)
        assert not torch.equal(rounded, before)
        assert torch.equal(network(image), before)
        twin = copy.deepcopy(pair)
        fake.ranges.zero_()
        assert torch.equal(twin[1](twin[0], image), rounded)
    assert list(network.state_dict()) == names
    assert list(fake.state_dict()) == ["ranges"]


# --- training


def test_gradients_reach_every_weight_and_the_loss_falls() -> None:
    network = lively(tiny_network(detail=True))
    grey, mask = zip(*(simulate(64, 64, seed) for seed in range(4)), strict=True)
    image = ((torch.tensor(np.stack(grey))[:, None].float() - 118.3) / 41.7).expand(-1, 3, -1, -1)
    target = torch.tensor(np.stack(mask)).long()
    fake = FakeQuantization(network, GREY)
    fake.observe(network, [image])
    parameters = [value for name, value in network.named_parameters() if "decode_head.aux" not in name]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    for _ in range(25):
        coarse = fake(network, image)
        assert isinstance(coarse, Tensor)
        loss = nn.functional.cross_entropy(resize(coarse, 64, 64), target)
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            unmoved = [value for value in parameters if value.grad is None or not value.grad.any()]
            assert not [value.shape for value in unmoved if value.ndim > 1]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_the_gradient_is_that_of_the_float_network_when_nothing_is_clipped() -> None:
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    round_weight(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))
    values = torch.tensor([0.5, 3.0, -3.0], requires_grad=True)
    round_activation(values, torch.tensor(1.0)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def source(finished: TrainResult) -> Path:
    """A tiny network after a few float steps, and its data beside it."""
    return finished.checkpoint


def tuning(folder: Path, source: Path, *overrides: str) -> TrainConfig:
    """As ``tiny``, but the network's size comes from ``network.initial``."""
    settings = [setting for setting in TINY if not setting.startswith("network.")]
    start = [f"network.initial={source}", f"data.path={source.parent / 'data'}", f"run.folder={folder}"]
    return load_config(None, [*settings, *TUNING, *start, *overrides])


@pytest.fixture(scope="module")
def tuned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(tuning(tmp_path_factory.mktemp("tuned"), source, "run.name=tuned"))


def test_fine_tuning_keeps_statistics_ranges_and_format(source: Path, tuned: TrainResult) -> None:
    (before, old), (after, new) = load_checkpoint(source), load_checkpoint(tuned.checkpoint)
    assert new.network == old.network
    assert new.normalization == old.normalization
    assert any("whole.safetensors" in remark for remark in new.remarks)
    for name, value in before.state_dict().items():
        same = torch.equal(value, after.state_dict()[name])
        assert same == name.endswith(("running_mean", "running_var", "num_batches_tracked")), name

    # What was validated is the rounded network, with the averaged weights and the ranges of the checkpoint.
    state = torch.load(tuned.last, weights_only=True)
    fake = FakeQuantization(after, new.normalization)
    fake.ranges.copy_(state["state_dict"]["quantization.ranges"])
    assert torch.equal(state["current_model_state"]["quantization.ranges"], fake.ranges)
    dataset = FolderDataset.open(source.parent / "data")
    assert val_miou(after, new, dataset, fake) == pytest.approx(tuned.metrics["val/miou"])


def written_by_the_first_version(last: Path) -> None:
    """Give everything in a training checkpoint the name that it had then."""

    def former(content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {
            str(key).replace("quantization", "quantisation").replace("optimization", "optimisation"): former(value)
            for key, value in content.items()
        }

    content = torch.load(last, weights_only=True)
    changed = {key: former(content[key]) for key in ("state_dict", "current_model_state", "hpddrnet_trt")}
    assert "quantisation.ranges" in changed["state_dict"]
    assert "optimisation" in changed["hpddrnet_trt"]["config"]
    torch.save({**content, **changed}, last)


def test_interrupted_fine_tuning_continues_to_the_same_bits(
    tmp_path: Path, source: Path, tuned: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = tuning(tmp_path, source, "run.name=stopped")
    original = SegmentationModule.training_step

    def interrupted(self: SegmentationModule, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 3:
            deliver(signal.SIGINT)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModule, "training_step", interrupted)
        with pytest.raises(TrainingInterrupted, match="stopped after step 4"):
            train(stopped)
    written_by_the_first_version(stopped.run.path / "last.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(FakeQuantization, "observe", None)  # the ranges come from the checkpoint
        train(stopped)
    assert_same_run(tuned.last.parent, stopped.run.path)


def test_without_quantization_a_whole_network_is_continued_in_float(tmp_path: Path, source: Path) -> None:
    barely = ["optimization.max_steps=1", "optimization.lr=1e-12", "optimization.ema_decay=null"]
    config = tuning(tmp_path, source, *barely, "quantization.enabled=false")
    after, _ = load_checkpoint(train(config).checkpoint)
    before, _ = load_checkpoint(source)
    assert torch.allclose(after.decode_head.conv_seg.weight, before.decode_head.conv_seg.weight, atol=1e-6)
    assert "quantization.ranges" not in torch.load(config.run.path / "last.ckpt", weights_only=True)["state_dict"]


# --- mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.channels=8", r"-4ch-detail \(channels is 4, not 8\); leave out .* weights: 'network={detail: true,"),
        ("network.variant=ddrnet-23-slim", r"channels is 4, not 32; .*eca is context, not none"),
        ("data.normalization=imagenet", r"its data set's normalisation, not data\.normalization=imagenet"),
        ("network.initial=nowhere.safetensors", r"nowhere\.safetensors"),
        ("network.initial=null", r"quantization\.enabled fine-tunes a trained network.*network\.initial"),
    ],
)
def test_a_start_that_does_not_fit_is_told(tmp_path: Path, source: Path, override: str, message: str) -> None:
    with pytest.raises((UsageError, BadInputFile), match=message):
        train(tuning(tmp_path, source, override))


def test_other_classes_are_told(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    shutil.copytree(source.parent / "data", other)
    description = json.loads((other / "dataset.json").read_text())
    description["classes"][0]["name"] = "quartz"
    (other / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match=r"tells apart grain, .* are quartz, .*for its own classes"):
        train(tuning(tmp_path, source, f"data.path={other}"))
