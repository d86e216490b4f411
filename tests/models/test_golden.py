"""Our network against tensors computed by the authors' own implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpddrnet_trt.models import network as network_module
from hpddrnet_trt.models.network import Features, HPDDRNet

TOLERANCE = 5e-4
SMALL = ["1x256x256", "1x512x384", "2x128x192", "1x136x200"]


def close(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    assert ours.shape == theirs.shape
    assert float(np.abs(ours.astype(np.float64) - theirs).max()) <= tolerance


@torch.inference_mode()
def activations(network: HPDDRNet, image: Tensor) -> dict[str, Tensor]:
    """All named intermediate tensors of one forward pass, by their names in the reference data."""
    backbone, found = network.backbone, {}
    places: dict[str, nn.Module] = {
        "stem": backbone.stem[-1],
        "ctx3": backbone.context_branch_layers[0],
        "ctx4": backbone.context_branch_layers[1],
        "ctx5": backbone.context_branch_layers[2],
        "spat3": backbone.spatial_branch_layers[0],
        "spat4": backbone.spatial_branch_layers[1],
        "spat5": backbone.spatial_branch_layers[2],
        "comp1": backbone.compression_1,
        "comp2": backbone.compression_2,
        "down1": backbone.down_1,
        "down2": backbone.down_2,
        "dappm": backbone.spp,
        "feat": backbone,
    }
    if network.config.eca != "none":
        places |= {"eca1": backbone.ecas[0], "eca2": backbone.ecas[1]}
    if network.config.pam != "none":
        places |= {"pam1": backbone.sps[0], "pam2": backbone.sps[1]}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor | Features) -> None:
            tensor = output.main if isinstance(output, Features) else output
            found[name] = tensor.clone()  # later operations may work in place

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in places.items()]
    fuse = backbone._fuse

    def spy(stage: int, *arguments: Any) -> tuple[Tensor, Tensor]:
        context, spatial = fuse(stage, *arguments)
        found[f"ctx{stage + 3}_fused"], found[f"spat{stage + 3}_fused"] = context.clone(), spatial.clone()
        return context, spatial

    backbone._fuse = spy
    try:
        network(image)
    finally:
        del backbone._fuse
        for handle in handles:
            handle.remove()
    return found


def check_logits(reference: Any, size: str) -> None:
    with torch.inference_mode():
        logits = reference.network()(reference.image(size))
    close(logits, reference.arrays(f"eval_{size}.npz")["logits8"])


@pytest.mark.parametrize("size", [*SMALL, "1x1024x1024"])
def test_logits(reference: Any, size: str) -> None:
    check_logits(reference, size)


def test_logits_of_a_wide_image(hpddrnet: Any) -> None:
    check_logits(hpddrnet, "1x1024x2048")


@pytest.mark.parametrize("size", SMALL)
def test_full_resolution_and_labels(reference: Any, size: str) -> None:
    expected, facts = reference.arrays(f"eval_{size}.npz"), reference.info["eval"][size]
    with torch.inference_mode():
        full = reference.network().predict_logits(reference.image(size))
    if "logits_full" in expected:
        close(full, expected["logits_full"])
    assert float(full.double().mean()) == pytest.approx(facts["logits_full_mean"], abs=TOLERANCE)
    assert float(full.double().std()) == pytest.approx(facts["logits_full_std"], abs=TOLERANCE)
    sure = expected["margin"] > 2e-3
    assert sure.mean() > 0.95  # otherwise the next line says little
    assert np.array_equal(full.argmax(1).numpy()[sure], expected["pred"][sure])


@pytest.mark.parametrize("size", SMALL)
def test_full_resolution_is_a_plain_bilinear_resize(reference: Any, size: str) -> None:
    """The reference's own 1/8 logits, resized by us, without the network's rounding in between."""
    expected, facts = reference.arrays(f"eval_{size}.npz"), reference.info["eval"][size]
    full = network_module.resize(torch.from_numpy(expected["logits8"]), *reference.image(size).shape[2:])
    if "logits_full" in expected:
        close(full, expected["logits_full"], 1e-5)
    assert float(full.double().mean()) == pytest.approx(facts["logits_full_mean"], abs=1e-6)
    assert float(full.double().std(correction=0)) == pytest.approx(facts["logits_full_std"], abs=1e-5)


@pytest.mark.parametrize("size", SMALL)
def test_activations(reference: Any, size: str) -> None:
    expected = reference.arrays(f"eval_{size}.npz")
    found = activations(reference.network(), reference.image(size))
    names = set(expected) - {"logits8", "logits_full", "pred", "margin"}
    assert names <= set(found)
    for name in names:
        close(found[name], expected[name])
    for name, facts in reference.info["eval"][size]["act"].items():  # every activation, also those not stored
        assert list(found[name].shape) == facts["shape"]
        assert float(found[name].double().mean()) == pytest.approx(facts["mean"], abs=TOLERANCE)
        assert float(found[name].double().std()) == pytest.approx(facts["std"], abs=TOLERANCE)


@pytest.mark.parametrize("case", ["2x128x192", "4x256x256"])
def test_training_step(reference: Any, case: str) -> None:
    """Main and auxiliary logits in training mode, and the batch-norm statistics afterwards."""
    facts = reference.info["train"][case]
    network = reference.network().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.1  # what the authors train with; the reference has it switched off
            module.p = 0.0
    features: list[Tensor] = []
    network.backbone.register_forward_hook(lambda _m, _i, output: features.append(output[1].detach()))
    with torch.no_grad():
        main, auxiliary = network(torch.from_numpy(reference.inputs[facts["input_key"]]).float())
    expected = reference.arrays(facts["file"])
    close(main, expected["logits8_main"])
    close(auxiliary, expected["logits8_aux"])
    if "temp_context" in expected:
        close(features[0], expected["temp_context"])
    buffers = dict(network.named_buffers())
    after = reference.arrays(f"train_{case}_bn_after.npz")
    assert set(after) == {name for name in buffers if not name.endswith("num_batches_tracked")}
    for name, value in after.items():
        np.testing.assert_allclose(buffers[name].numpy(), value, atol=1e-4, rtol=1e-5, err_msg=name)


def test_dropout_is_active_in_training_only(hpddrnet: Any) -> None:
    network, image = hpddrnet.network(), hpddrnet.image("2x128x192")
    attention = network.backbone.sps[0]
    with torch.no_grad():
        x = torch.randn(2, 128, 8, 12, generator=torch.Generator().manual_seed(0))
        assert torch.equal(attention(x), attention(x))
        assert not torch.equal(attention.train()(x), attention(x))
        assert torch.equal(network.eval()(image), network(image))


def test_size_rules(reference: Any) -> None:
    """Sizes that work in the authors' code work here; the others get one readable sentence."""
    network = reference.network()
    for size, verdict in reference.info["size_rules"].items():
        height, width = (int(part) for part in size.split("x"))
        image = torch.zeros(1, 3, height, width)
        if verdict.startswith("ok"):
            with torch.inference_mode():
                assert str(tuple(network(image).shape)) in verdict
        else:
            with pytest.raises(network_module.ContractError, match=f"multiples of 8, not {size}"):
                network(image)


# --- Mutations: the mistakes that a re-implementation makes, to prove that the tests above can fail.


def _drop(path: str) -> Callable[[HPDDRNet], None]:
    return lambda net: net.get_parameter(path).data.zero_()


def _replace(owner: str, name: str, module: nn.Module) -> Callable[[HPDDRNet], None]:
    return lambda net: setattr(net.get_submodule(owner), name, module)


def _swap_query_and_key(net: HPDDRNet) -> None:
    attention = net.backbone.sps[0].pa
    attention.fc_q, attention.fc_k = attention.fc_k, attention.fc_q


def _unscaled(net: HPDDRNet) -> None:
    query = net.backbone.sps[1].pa.fc_q
    scale = query.out_features**0.5
    query.weight.data *= scale
    query.bias.data *= scale


def _flip_eca(net: HPDDRNet) -> None:
    weight = net.backbone.ecas[0].conv.weight
    weight.data = weight.data.flip(-1)


def _each(kind: type[nn.Module], attribute: str, value: Any) -> Callable[[HPDDRNet], None]:
    def mutate(net: HPDDRNet) -> None:
        for module in net.modules():
            if isinstance(module, kind):
                setattr(module, attribute, value)

    return mutate


def _absolute_gamma(net: HPDDRNet) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.abs_()


def _relu_after_first_context_stage(net: HPDDRNet) -> None:
    net.backbone.context_branch_layers[0][1].act = True


def _no_relu_in_spatial_stage(net: HPDDRNet) -> None:
    net.backbone.spatial_branch_layers[0][0].act = False


def _relu_before_pooling(net: HPDDRNet) -> None:
    net.backbone.spp.register_forward_pre_hook(lambda _m, inputs: (inputs[0].relu(),))


def _relu_before_head(net: HPDDRNet) -> None:
    net.decode_head.register_forward_pre_hook(lambda _m, inputs: (inputs[0]._replace(main=inputs[0].main.relu()),))


SHARED_MUTATIONS: dict[str, Callable[[HPDDRNet], None]] = {
    "BN eps 1e-3": _each(nn.BatchNorm2d, "eps", 1e-3),
    "dappm avgpool count_include_pad=False": _each(nn.AvgPool2d, "count_include_pad", False),
    "|BN gamma|": _absolute_gamma,
    "spp input relu": _relu_before_pooling,
    "head relu on feat": _relu_before_head,
    "extra relu after last ctx3 block": _relu_after_first_context_stage,
    "no relu after first block of spat3": _no_relu_in_spatial_stage,
}
ATTENTION_MUTATIONS: dict[str, Callable[[HPDDRNet], None]] = {
    "pam1 fc_q bias dropped": _drop("backbone.sps.0.pa.fc_q.bias"),
    "pam2 fc_v bias dropped": _drop("backbone.sps.1.pa.fc_v.bias"),
    "pam1 cnn bias dropped": _drop("backbone.sps.0.cnn.bias"),
    "pam1 q/k swapped": _swap_query_and_key,
    "pam2 no 1/sqrt(d)": _unscaled,
    "pam1->identity (no PAM)": _replace("backbone.sps", "0", nn.Identity()),
    "eca1->identity": _replace("backbone.ecas", "0", nn.Identity()),
    "eca1 conv flipped": _flip_eca,
}


def effect(reference: Any, mutate: Callable[[HPDDRNet], None]) -> float:
    """How far a mistake moves the logits at 136x200."""
    network = reference.network()
    mutate(network)
    with torch.inference_mode():
        logits = network(reference.image("1x136x200")).numpy()
    return float(np.abs(logits - reference.arrays("eval_1x136x200.npz")["logits8"]).max())


@pytest.mark.parametrize("name", SHARED_MUTATIONS)
def test_mistakes_are_seen(reference: Any, name: str) -> None:
    """A mistake moves the logits as far as it moves the authors' own network."""
    recorded = reference.info["mutation_effects"][name]["max_abs_136x200"]
    moved = effect(reference, SHARED_MUTATIONS[name])
    assert moved > 50 * TOLERANCE
    assert moved == pytest.approx(recorded, rel=1e-2)


@pytest.mark.parametrize("name", ATTENTION_MUTATIONS)
def test_attention_mistakes_are_seen(hpddrnet: Any, name: str) -> None:
    recorded = hpddrnet.info["mutation_effects"][name]["max_abs_136x200"]
    moved = effect(hpddrnet, ATTENTION_MUTATIONS[name])
    assert moved > 50 * TOLERANCE
    assert moved == pytest.approx(recorded, rel=1e-2)


def test_aligned_corners_are_seen(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.functional.interpolate
    monkeypatch.setattr(
        nn.functional, "interpolate", lambda x, **options: plain(x, **{**options, "align_corners": True})
    )
    recorded = reference.info["mutation_effects"]["backbone align_corners=True"]["max_abs_136x200"]
    assert effect(reference, lambda net: None) == pytest.approx(recorded, rel=1e-2)


def test_key_bias_changes_nothing(hpddrnet: Any) -> None:
    """Softmax ignores what is constant along a row: why deployment may drop this bias."""
    assert effect(hpddrnet, _drop("backbone.sps.0.pa.fc_k.bias")) < 5e-5
