"""Saving, loading and converting checkpoints."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.manifest import METADATA_KEY, DataRecord, Normalization, read_manifest
from hpddrnet_trt.models.checkpoints import (
    convert_checkpoint,
    load_any_checkpoint,
    load_backbone_weights,
    load_checkpoint,
    save_checkpoint,
)
from hpddrnet_trt.models.foreign import described_classes, described_settings, read_foreign
from hpddrnet_trt.models.network import HPDDRNet
from tests.tiny_network import lively, tiny_manifest, tiny_network

CFG = """
_base_ = ['../x.py']
scale = 1 / 255
data_preprocessor = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[10.5, 20, 30], std=[40.0, 50.0, 60.0], bgr_to_rgb=True),
    pretrained=None)
"""
CLASSES = {"classes": ("grain", "pore", "clay"), "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
META = {"cfg": CFG, "dataset_meta": CLASSES}
MANY = torch.zeros(100_000)
STEM, CLASSIFIER, BIAS = "backbone.stem.0.conv.weight", "decode_head.conv_seg.weight", "decode_head.conv_seg.bias"


def weights_of(network: HPDDRNet) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def foreign(path: Path, weights: dict[str, Tensor], *, prefix: str = "", under: str | None = "state_dict") -> Path:
    """A checkpoint as mmsegmentation writes it."""
    named = collections.OrderedDict((prefix + name, value) for name, value in weights.items())
    torch.save({under: named, "meta": META} if under else named, path)
    return path


def same_output(first: HPDDRNet, second: HPDDRNet) -> bool:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.equal(first(image), second(image))


# --- Ours


def test_save_and_load(tmp_path: Path, network: HPDDRNet) -> None:
    manifest = tiny_manifest(
        network,
        name="müdrock",
        metrics={"val/miou": 0.5},
        data=DataRecord(name="d", sha256="0", license="MIT"),
        normalization=Normalization(mean=(1, 2, 3), std=(4, 5, 6)),
    )
    path = save_checkpoint(tmp_path / "new folder" / "a.safetensors", network.train(), manifest)
    loaded, description = load_checkpoint(path)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
    assert same_output(network.eval(), loaded)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert description == manifest.replace(checkpoint_sha256=sha256)
    assert read_manifest(path) == manifest  # readable without PyTorch
    again = save_checkpoint(tmp_path / "b.safetensors", loaded, description)
    assert again.read_bytes() == path.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_a_file_of_the_first_version_loads() -> None:
    """Written before the house was rebuilt; its output was kept beside it."""
    folder = Path(__file__).parent / "data"
    loaded, manifest = load_checkpoint(folder / "version1.safetensors")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        np.testing.assert_allclose(loaded(image).numpy(), np.load(folder / "version1.npy"), rtol=1e-5, atol=1e-5)
    assert manifest.name == "small"
    assert manifest.network == loaded.config
    assert manifest.class_names == ["phase 0", "phase 1", "phase 2"]
    assert manifest.normalization == Normalization(mean=(10.5, 20, 30), std=(40, 50, 60))
    assert manifest.data is not None
    assert (manifest.data.license, manifest.data.crop, manifest.data.grey_std) == ("MIT", (64, 64), 0.2)
    assert manifest.metrics == {"val/miou": 0.5}


def test_a_loaded_network_can_be_trained(tmp_path: Path, network: HPDDRNet) -> None:
    """Its weights are its own, not the file's; and loading leaves the random state alone."""
    path = save_checkpoint(tmp_path / "a.safetensors", network, tiny_manifest(network))
    content, state = path.read_bytes(), torch.get_rng_state()
    loaded, _ = load_checkpoint(path)
    assert torch.equal(state, torch.get_rng_state())
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    main, auxiliary = loaded.train()(torch.rand(2, 3, 64, 64))
    (main.square().mean() + auxiliary.square().mean()).backward()
    optimizer.step()
    assert not torch.equal(loaded.state_dict()[CLASSIFIER], network.decode_head.conv_seg.weight)
    assert path.read_bytes() == content


def test_saving_refuses_nonsense(tmp_path: Path, network: HPDDRNet) -> None:
    other = tiny_manifest(tiny_network(num_classes=4))
    with pytest.raises(UsageError, match=r"ends in \.safetensors, not '\.pth'"):
        save_checkpoint(tmp_path / "a.pth", network, tiny_manifest(network))
    with pytest.raises(UsageError, match="hpddrnet-4ch with 4 classes, the network is hpddrnet-4ch with 3"):
        save_checkpoint(tmp_path / "a.safetensors", network, other)
    assert list(tmp_path.iterdir()) == []


def with_header(content: bytes, change: Any) -> bytes:
    """A safetensors file with its header rewritten by ``change``."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def of_another_network(header: Any) -> None:
    """The description and the weights of one file disagree."""
    other = tiny_manifest(tiny_network(eca="none", num_classes=4)).to_json()
    header["__metadata__"].update({METADATA_KEY: other})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["__metadata__"].pop(METADATA_KEY), "carries no description"),
        (lambda header: header.pop("__metadata__"), "carries no description"),
        (lambda header: header["__metadata__"].update({METADATA_KEY: "{"}), "description in .* is not valid"),
        (lambda header: header[BIAS].update(data_offsets=[0, 1 << 40]), "not a safetensors file"),
        (lambda header: header[BIAS].update(dtype="F128"), "not a safetensors file"),
        (of_another_network, r"2 unknown: backbone\.ecas\.0\.conv\.weight, backbone\.ecas\.1\.conv\.weight.*"
                             r"4 misshapen: .*decode_head\.conv_seg\.bias is \(3,\) instead of \(4,\)"),
    ],
)  # fmt: skip
def test_damaged_headers(tmp_path: Path, network: HPDDRNet, change: Any, message: str) -> None:
    path = save_checkpoint(tmp_path / "a.safetensors", network, tiny_manifest(network))
    path.write_bytes(with_header(path.read_bytes(), change))
    with pytest.raises(BadInputFile, match=message):
        load_checkpoint(path)


def test_weights_that_are_not_finite(tmp_path: Path, network: HPDDRNet) -> None:
    network.decode_head.conv_seg.bias.data[1] = float("nan")
    path = save_checkpoint(tmp_path / "a.safetensors", network, tiny_manifest(network))
    with pytest.raises(BadInputFile, match=r"not finite \(decode_head\.conv_seg\.bias\)"):
        load_checkpoint(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Truncated or with flipped bits: loads, or says one readable sentence."""
    folder = tmp_path_factory.getbasetemp()
    source = folder / "intact.safetensors"
    if not source.exists():
        network = tiny_network()
        save_checkpoint(source, network, tiny_manifest(network))
    content = bytearray(source.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    end = data.draw(st.sampled_from([len(content), header, header // 2, 8, 3, 0]))
    for _ in range(data.draw(st.integers(0 if end < len(content) else 1, 3))):
        content[data.draw(st.integers(0, header))] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / "damaged.safetensors"
    path.write_bytes(content[:end])
    if end < len(content):
        with pytest.raises(BadInputFile):
            load_any_checkpoint(path)
    else:
        try:
            load_any_checkpoint(path)
        except BadInputFile as exc:
            assert str(path) in str(exc)  # noqa: PT017 - either outcome is right


# --- Theirs


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("under", ["state_dict", "model", None])
def test_layouts(tmp_path: Path, network: HPDDRNet, prefix: str, under: str | None) -> None:
    weights = weights_of(network)
    if under is None:  # older files have no batch counters
        weights = {name: value for name, value in weights.items() if "num_batches" not in name}
    path = foreign(tmp_path / "theirs.pth", weights, prefix=prefix, under=under)
    loaded, manifest = load_any_checkpoint(path)
    assert manifest.network == network.config
    assert same_output(network, loaded)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eca": "none"},
        {"pam": "none"},
        {"eca": "none", "pam": "none"},
        {"channels": 6, "ppm_channels": 10, "head_channels": 12, "num_classes": 7},
    ],
    ids=str,
)
def test_configuration_from_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    network = tiny_network(**changes)
    loaded, manifest = load_any_checkpoint(foreign(tmp_path / "a.pth", weights_of(network)))
    assert manifest.network == network.config
    assert same_output(network, loaded)


def test_conversion(tmp_path: Path, network: HPDDRNet, caplog: pytest.LogCaptureFixture) -> None:
    weights = weights_of(network)
    weights |= {"backbone.ecas.2.conv.weight": torch.ones(1, 1, 3), "backbone.sps.2.cnn.bias": torch.ones(4)}
    source = foreign(tmp_path / "theirs.pth", weights)
    with caplog.at_level(logging.INFO, "hpddrnet_trt"):
        manifest = convert_checkpoint(source, tmp_path / "ours.safetensors", license="CC-BY-4.0")
    assert manifest.name == "theirs"
    assert manifest.class_names == ["grain", "pore", "clay"]
    assert manifest.palette == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert manifest.normalization == Normalization(mean=(10.5, 20, 30), std=(40, 50, 60))
    assert manifest.data is not None
    assert manifest.data.license == "CC-BY-4.0"
    assert manifest.remarks == ["dropped weights that the network never uses: backbone.ecas.2, backbone.sps.2"]
    assert manifest.remarks[0] in caplog.text
    loaded, description = load_checkpoint(tmp_path / "ours.safetensors")
    assert description == manifest
    assert same_output(network, loaded)


def test_classes_as_arguments(tmp_path: Path, network: HPDDRNet) -> None:
    source, target = foreign(tmp_path / "a.pth", weights_of(network)), tmp_path / "b.safetensors"
    manifest = convert_checkpoint(source, target, name="n", classes=["a", "b", "c"], palette=[(0, 0, 1)] * 3)
    assert (manifest.name, manifest.class_names, manifest.palette) == ("n", ["a", "b", "c"], [(0, 0, 1)] * 3)
    target.unlink()
    for arguments, message in (
        ({"classes": ["a"]}, "1 class names were given but .* has 3 classes"),
        ({"palette": [(0, 0, 0)] * 4}, "4 colours were given but .* has 3 classes"),
        ({"classes": ["a", "", "c"]}, "class names must be text"),
    ):
        with pytest.raises(UsageError, match=message):
            convert_checkpoint(source, target, **arguments)
    with pytest.raises(UsageError, match="ends in"):
        convert_checkpoint(source, tmp_path / "b.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_nothing_described(tmp_path: Path, network: HPDDRNet) -> None:
    _, manifest = load_any_checkpoint(foreign(tmp_path / "a.pth", weights_of(network), under=None))
    assert manifest.class_names == ["class 0", "class 1", "class 2"]
    assert len(set(manifest.palette)) == 3
    assert manifest.normalization == Normalization()
    assert [remark.split(";")[0] for remark in manifest.remarks] == [
        "the file names no normalisation",
        "the file names no classes",
    ]
    # As little is known when its classes are of another number than the network's.
    _, manifest = load_any_checkpoint(foreign(tmp_path / "a.pth", weights_of(tiny_network(num_classes=5))))
    assert manifest.class_names[0] == "class 0"
    assert "the file describes 3 classes but its network has 5; ignored" in manifest.remarks


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path, network: HPDDRNet) -> None:
    weights = weights_of(network)
    del weights["backbone.stem.1.bn.running_mean"], weights["decode_head.aux_cls_seg.bias"]
    weights["backbone.extra.weight"] = torch.zeros(2)
    weights["decode_head.conv_seg.bias"] = torch.zeros(9)
    weights["backbone.down_1.conv.weight"] = torch.zeros(1)
    source, target = foreign(tmp_path / "a.pth", weights), tmp_path / "b.safetensors"
    with pytest.raises(BadInputFile, match=r"a\.pth .*hpddrnet-4ch with 3 classes") as caught:
        convert_checkpoint(source, target)
    for part in (
        "2 missing: backbone.stem.1.bn.running_mean, decode_head.aux_cls_seg.bias",
        "1 unknown: backbone.extra.weight",
        "2 misshapen: backbone.down_1.conv.weight is (1,) instead of (16, 8, 3, 3)",
        "decode_head.conv_seg.bias is (9,) instead of (3,)",
    ):
        assert part in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"conv1.weight": torch.zeros(1)}}, "holds no HPDDRNet or DDRNet .* it has conv1.weight"),
        ({"state_dict": {}}, "holds no weights"),
        ([torch.zeros(1)], "holds no weights"),
        ({"epoch": 3}, "holds no weights"),
        ({STEM: torch.zeros(4, 3, 3, 3), CLASSIFIER: torch.zeros(1, 8, 1, 1)}, "impossible network .num_classes"),
        ({STEM: torch.zeros(0, 3, 3, 3)}, "impossible network .channels"),
        ({STEM: torch.zeros(30_000, 1)}, "do not fit ddrnet-30000ch"),  # it would need 300 GB
        # Views of one storage would unfold to far more memory than the file has.
        ({f"backbone.stem.{i}": MANY for i in range(500)}, "claims 200000000 bytes of weights in a file of"),
    ],
)
def test_other_checkpoints(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(BadInputFile, match=message):
        load_any_checkpoint(tmp_path / "a.pth")


def test_ours_is_known_by_content(tmp_path: Path, network: HPDDRNet) -> None:
    """Also when the length of its header begins with the first byte of a pickle."""
    path = save_checkpoint(tmp_path / "a.safetensors", network, tiny_manifest(network))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    padding = (0x80 - length) % 256
    padded = struct.pack("<Q", length + padding) + content[8 : 8 + length] + b" " * padding + content[8 + length :]
    assert padded[0] == 0x80
    renamed = tmp_path / "renamed.bin"
    renamed.write_bytes(padded)
    assert same_output(load_any_checkpoint(renamed)[0], network)


# --- What foreign files say about themselves


@pytest.mark.parametrize(
    ("cfg", "mean"),
    [
        (CFG, (10.5, 20.0, 30.0)),
        ("data_preprocessor = dict(mean=[1, 2, 3], std=(4, 5, 6))", (1.0, 2.0, 3.0)),
        ("img_norm_cfg = {'mean': [1, 2, 3], 'std': [4, 5, 6], 'to_rgb': True}", (1.0, 2.0, 3.0)),
        ("model = dict(data_preprocessor=dict(mean=1))\nimg_norm_cfg = dict(mean=[7,7,7], std=[1,1,1])", (7.0,) * 3),
        ("img_norm_cfg = dict(mean=[3, 2, 1], std=[6, 5, 4], to_rgb=False)", (1.0, 2.0, 3.0)),
        ("train_pipeline = [dict(type='Normalize', mean=[1, 2, 3], std=[4, 5, 6], to_rgb=True)]", (1.0, 2.0, 3.0)),
        ({"model": {"data_preprocessor": {"mean": [1, 2, 3], "std": [4, 5, 6]}}}, (1.0, 2.0, 3.0)),
        ("img_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 0])", None),
        ("img_norm_cfg = dict(mean=[1, 2], std=[4, 5])", None),
        ("img_norm_cfg = dict(mean=[1, 2, 1e999], std=[4, 5, 6])", None),
        ("img_norm_cfg = dict(mean=MEAN, std=STD)", None),
        ("img_norm_cfg = __import__('os').abort()", None),
        ("path = '\\d'\nimg_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 6])", (1.0, 2.0, 3.0)),
        ("x = \0", None),
        ("x = " + "(" * 100_000, None),
        ("x = 1" + "+1" * 100_000, None),
        ("x = 1\n" * 300_000, None),
        (7, None),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_normalisation_of_configurations(cfg: Any, mean: tuple[float, ...] | None) -> None:
    for key in ("cfg", "config"):  # mmengine and mmsegmentation 0.x
        normalization = described_settings({key: cfg}).normalization
        assert (normalization.mean if normalization else None) == mean


@pytest.mark.parametrize(
    ("cfg", "remark"),
    [
        ("model = dict(backbone=dict(align_corners=True))", "align_corners=True"),
        ("model = dict(decode_head=dict(align_corners=False))", None),
        ("model = dict(backbone=dict(act_cfg=dict(type='SiLU')))", "activations .* does not have .SiLU"),
        ("test_pipeline = [dict(type='Resize', scale=(2048, 1024), keep_ratio=True)]", "within 2048 x 1024"),
        ("test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(512, 256), transforms=[])]", "within 512 x 256"),
        ("norm_cfg = dict(type='BN', eps=7)", "makes no sense"),
        ("a = dict(norm_cfg=dict(eps=1e-3))\nb = dict(norm_cfg=dict(eps=1e-4))", "several values of eps"),
    ],
)
def test_settings_that_this_network_does_not_have_are_named(cfg: str, remark: str | None) -> None:
    settings = described_settings({"config": cfg})
    assert len(settings.remarks) == (remark is not None)
    assert remark is None or re.search(remark, settings.remarks[0])


def test_epsilon_of_batch_normalisation_goes_into_the_variance(tmp_path: Path) -> None:
    network = lively(tiny_network()).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-2
    cfg = "model = dict(backbone=dict(norm_cfg=dict(type='SyncBN', eps=1e-2)))"
    torch.save({"state_dict": network.state_dict(), "meta": {"cfg": cfg}}, tmp_path / "a.pth")
    converted, _ = load_any_checkpoint(tmp_path / "a.pth")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(converted(image), network(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"dataset_meta": {"classes": ["a", "b"], "palette": [[1, 2, 3], [4, 5, 6]]}}, ["a", "b"]),
        ({"CLASSES": ("a", "b"), "PALETTE": None}, ["a", "b"]),
        ({"CLASSES": ("a", "b"), "PALETTE": [[1, 2, 3]]}, ["a", "b"]),
        ({"CLASSES": ("a", "b"), "PALETTE": [["x"], []]}, None),
        ({"CLASSES": ("a", "")}, None),
        ({"CLASSES": ("a", 3)}, None),
        ({"CLASSES": "ab"}, None),
        ({}, None),
    ],
)
def test_described_classes(meta: dict[str, Any], names: list[str] | None) -> None:
    classes = described_classes(meta)
    assert ([entry.name for entry in classes] if classes is not None else None) == names


# --- Pretrained backbones


def backbone_weights(network: HPDDRNet) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.backbone.state_dict().items()}


def test_backbone_of_an_image_classifier(tmp_path: Path) -> None:
    """No pyramid pooling, no attention, a classifier of its own: as ImageNet models come."""
    source, network = tiny_network(seed=1), tiny_network(seed=2)
    weights = {k: v for k, v in backbone_weights(source).items() if not k.startswith(("spp.", "ecas.", "sps."))}
    weights |= {"fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}
    torch.save({"state_dict": weights}, tmp_path / "in1k.pth")
    before = weights_of(network)
    remarks = load_backbone_weights(network, tmp_path / "in1k.pth")
    assert remarks == [
        "not in the file, trained from their initial values: spp, ecas, sps",
        "ignored 2 weights that the backbone does not have: fc.bias, fc.weight",
    ]
    for name, value in network.state_dict().items():
        key = name.removeprefix("backbone.")
        pretrained = name.startswith("backbone.") and key in weights
        assert torch.equal(value, weights[key] if pretrained else before[name]), name


@pytest.mark.parametrize("kind", ["theirs", "ours"])
def test_backbone_of_a_full_checkpoint(tmp_path: Path, kind: str) -> None:
    """Another number of classes does not matter."""
    source, network = tiny_network(seed=1, num_classes=5), tiny_network(seed=2)
    path = (
        foreign(tmp_path / "a.pth", weights_of(source))
        if kind == "theirs"
        else save_checkpoint(tmp_path / "a.safetensors", source, tiny_manifest(source))
    )
    assert load_backbone_weights(network, path) == []
    given_ = backbone_weights(source)
    assert all(torch.equal(value, given_[name]) for name, value in network.backbone.state_dict().items())


def test_backbone_that_does_not_fit(tmp_path: Path) -> None:
    network = tiny_network(seed=2)
    weights = backbone_weights(tiny_network(seed=1))
    del weights["stem.0.conv.weight"], weights["spp.shortcut.bn.bias"]
    weights["down_1.bn.weight"] = torch.ones(2)
    torch.save(weights, tmp_path / "a.pth")
    before = weights_of(network)
    with pytest.raises(BadInputFile) as caught:
        load_backbone_weights(network, tmp_path / "a.pth")
    assert "the backbone of hpddrnet-4ch" in str(caught.value)
    assert "2 missing: stem.0.conv.weight, spp.shortcut.bn.bias" in str(caught.value)
    assert "down_1.bn.weight is (2,) instead of (16,)" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --- The reference data


def test_runner_checkpoint(golden: Path, tmp_path: Path) -> None:
    """A full mmengine checkpoint, which neither PyTorch's safe loader alone nor mmengine opens any more."""
    source = golden / "runner_ckpt" / "iter_3.pth"
    content = read_foreign(source)
    assert (content.meta["iter"], len(content.state_dict)) == (3, 366)
    assert {value.dtype for value in content.state_dict.values()} == {torch.float32, torch.int64}
    manifest = convert_checkpoint(source, tmp_path / "a.safetensors")
    assert manifest.class_names == ["grains", "pores", "clay"]
    assert manifest.normalization == Normalization()
    dropped, size = manifest.remarks
    assert dropped == "dropped weights that the network never uses: backbone.ecas.2, backbone.sps.2"
    assert size == "it was tested on images brought to within 2048 x 1024 pixels (--resize)"
    network, _ = load_checkpoint(tmp_path / "a.safetensors")
    image = torch.from_numpy(np.load(golden / "inputs.npz")["x_1x136x200"]).float()
    expected = np.load(golden / "runner_ckpt" / "expected.npz")["logits8_x_1x136x200"]
    with torch.inference_mode():
        logits = network(image).numpy()
    # Logits reach 1400 in this hardly trained network: 5e-6 of that is float32's own rounding.
    assert float(np.abs(logits - expected).max()) <= 5e-6 * float(np.abs(expected).max())
