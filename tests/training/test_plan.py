"""Runs that a dataset folder alone is enough for: recipes by name, settings from pictures and machine, going on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import IntensityRecord, read_manifest
from hpddrnet_trt.data.simulate import write_dataset
from hpddrnet_trt.models.checkpoints import load_checkpoint, save_checkpoint
from hpddrnet_trt.training import DEFAULT_RECIPE, recipe_file, recipes
from hpddrnet_trt.training.config import TrainConfig
from hpddrnet_trt.training.plan import Machine, plan_run, run_lengths, run_name
from hpddrnet_trt.training.run import TrainResult, train
from hpddrnet_trt.weights import CHECKPOINT, locate
from tests.training.conftest import REPOSITORY

SMALL = recipe_file("small-data")
CPU, GPU = Machine(cores=2), Machine(cores=12, gpu_bytes=int(24e9))
# What makes a run of the recipe small enough for tests.
TINY = [
    "network={channels: 4, ppm_channels: 8, head_channels: 8, detail: true}", "optimization.max_steps=2",
    "optimization.batch_size=2", "run.threads=1", "run.progress=false",
]  # fmt: skip


def tiny(folder: Path, *settings: str, runs: Path, start: Path | None = None) -> TrainConfig:
    network = TINY[1:] if start else TINY
    return plan_run(SMALL, folder, [*network, f"run.folder={runs}", *settings], start=start, machine=CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose folder is not called as a run may be."""
    path = tmp_path_factory.mktemp("data") / "our steel, 2026"
    write_dataset(path, train=3, val=1, test=1, size=128, seed=0)
    return path


def test_recipes_are_known_by_name() -> None:
    assert {"small-data", "mudrock", "demo"} <= recipes().keys()
    assert DEFAULT_RECIPE in recipes()
    assert all(len(purpose) > 20 for purpose in recipes().values())
    assert (REPOSITORY / "train" / "configs").resolve() == SMALL.parent  # the place that documents name
    with pytest.raises(UsageError, match=r"no recipe is called 'big-data'; choose one of demo, .*small-data"):
        recipe_file("big-data")


def test_threads_wait_passively() -> None:
    """Set before PyTorch is loaded, and not against the user's own."""
    code = (
        "import os, sys; import hpddrnet_trt.training; assert 'torch' not in sys.modules; "
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {"PYTHONPATH": str(REPOSITORY)} | ({} if given is None else {"OMP_WAIT_POLICY": given})
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_run_lengths_are_those_of_rows() -> None:
    mask = np.array([[0, 0, 1], [1, 1, 1], [2, 0, 0]], dtype=np.uint8)
    assert run_lengths(mask).tolist() == [2, 1, 3, 1, 2]


def dataset(folder: Path, size: int, count: int, *, block: int, rare: float) -> Path:
    """Stripes ``block`` wide of two classes, and a share ``rare`` of a third."""
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (folder / kind / split).mkdir(parents=True)
    mask = np.tile((np.arange(size) // block % 2).astype(np.uint8), (size, 1))
    mask[: round(size * rare)] = 2
    for split in ("train", "val"):
        for number in range(count):
            Image.fromarray(mask).save(folder / "masks" / split / f"{number}.png")
            Image.fromarray(mask * 100).save(folder / "images" / split / f"{number}.png")
    return folder


def test_settings_come_from_the_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fine = plan_run(SMALL, dataset(tmp_path / "fine", 512, 2, block=20, rare=0.02), machine=CPU)
    assert "position attention was not needed" in caplog.text
    assert fine.augmentation.crop == (256, 256)
    assert (fine.optimization.batch_size, fine.augmentation.class_balance) == (8, 0.25)
    coarse = plan_run(SMALL, dataset(tmp_path / "coarse", 1024, 40, block=400, rare=0.2), machine=CPU)
    assert "regions reach 400 pixels in pictures of 1024: position attention was used, but not missed" in caplog.text
    assert coarse.augmentation.crop == (512, 512)
    assert (coarse.optimization.batch_size, coarse.augmentation.class_balance) == (4, 0.0)
    assert coarse.optimization.max_steps > fine.optimization.max_steps
    assert coarse.optimization.lr < fine.optimization.lr
    small = plan_run(SMALL, dataset(tmp_path / "small", 100, 2, block=20, rare=0.02), machine=CPU)
    assert small.augmentation.crop == (96, 96)  # no larger than the pictures
    for config in (fine, coarse, small):
        steps = config.optimization.max_steps
        assert config.optimization.warmup_steps == steps // 10
        assert config.run.val_every == steps // 10


def test_settings_come_from_the_machine(folder: Path) -> None:
    slow, fast = (plan_run(SMALL, folder, machine=machine) for machine in (CPU, GPU))
    assert (slow.run.threads, slow.run.workers) == (2, 0)
    assert (fast.run.threads, fast.run.workers) == (12, 8)
    assert fast.optimization.max_steps > slow.optimization.max_steps
    assert fast.optimization.batch_size > slow.optimization.batch_size
    assert Machine.here().cores >= 1


def test_what_is_given_counts_for_the_rest(folder: Path) -> None:
    config = plan_run(SMALL, folder, ["optimization.max_steps=50", "optimization.batch_size=2"], machine=CPU)
    assert (config.optimization.max_steps, config.optimization.warmup_steps, config.run.val_every) == (50, 5, 10)
    assert config.optimization.lr == pytest.approx(1e-3)
    with pytest.raises(UsageError, match=r"optimization\.max_steps = 'many'"):
        plan_run(SMALL, folder, ["optimization.max_steps=many"], machine=CPU)
    with pytest.raises(UsageError, match=r"optimization = 3"):
        plan_run(SMALL, folder, ["optimization=3"], machine=CPU)


def test_a_model_of_the_same_classes_goes_on_without_class_weights(folder: Path, tmp_path: Path) -> None:
    assert plan_run(SMALL, folder, machine=CPU).loss.class_weights == "balanced"
    assert plan_run(SMALL, folder, machine=CPU, start=Path("nasa-super1")).loss.class_weights == "balanced"  # others
    given = plan_run(SMALL, folder, ["loss.class_weights=none"], machine=CPU)
    assert given.loss.class_weights == "none"
    described = json.loads((folder / "dataset.json").read_text())
    described["classes"] = [{"name": name} for name in ("matrix", "secondary", "tertiary")]
    alloy = shutil.copytree(folder, tmp_path / "alloy")
    (alloy / "dataset.json").write_text(json.dumps(described))
    assert plan_run(SMALL, alloy, machine=CPU, start=Path("nasa-super1")).loss.class_weights == "none"


def test_recipes_that_say_all_are_taken_as_they_are(folder: Path) -> None:
    config = plan_run(recipe_file("mudrock"), folder, machine=GPU)
    assert config.augmentation.crop == (1024, 1024)
    assert (config.data.path, config.run.name) == (str(folder), "our-steel-2026")
    assert plan_run(recipe_file("demo"), machine=CPU).data.path == "simulated"
    assert run_name(Path("/")) == "run"


def test_what_cannot_be_trained_is_told(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="nothing says what to train on; give a dataset folder"):
        plan_run(SMALL)
    with pytest.raises(UsageError, match="come from pictures; give a dataset folder"):
        plan_run(SMALL, overrides=["data.path=simulated"])
    with pytest.raises(BadInputFile, match="does not exist"):
        plan_run(SMALL, tmp_path / "nowhere")
    with pytest.raises(BadInputFile, match="holds no dataset"):
        plan_run(SMALL, tmp_path)
    shutil.copytree(folder / "images" / "val", tmp_path / "images" / "val")
    shutil.copytree(folder / "masks" / "val", tmp_path / "masks" / "val")
    with pytest.raises(UserError, match="there is no train split"):
        plan_run(SMALL, tmp_path)
    with pytest.raises(BadInputFile, match=r"checkpoint .*absent\.safetensors does not exist"):
        plan_run(SMALL, folder, start=tmp_path / "absent.safetensors")
    with pytest.raises(UsageError, match=r"model\.onnx can be run but not trained; give the checkpoint"):
        plan_run(SMALL, folder, start=tmp_path / "model.onnx")


def test_the_same_command_continues_and_another_gets_a_name_of_its_own(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(tiny(folder, runs=tmp_path))
    assert first.checkpoint == tmp_path / "our-steel-2026" / "our-steel-2026.safetensors"
    assert train(tiny(folder, runs=tmp_path)).metrics == first.metrics  # finished: nothing to do
    assert tiny(folder, runs=tmp_path).run.name == "our-steel-2026"
    with caplog.at_level(logging.INFO, "hpddrnet_trt.training"):
        assert tiny(folder, "optimization.lr=0.5", runs=tmp_path).run.name == "our-steel-2026-2"
    assert "other settings or data" in caplog.text
    again = tiny(folder, runs=tmp_path, start=first.checkpoint)  # corrected, and on from there
    assert again.run.name == "our-steel-2026-2"
    assert read_manifest(train(again).checkpoint).class_names == ["grain", "pore", "clay"]
    # A name that is given is meant.
    with pytest.raises(UsageError, match="started with other settings"):
        train(tiny(folder, "optimization.lr=0.5", "run.name=our-steel-2026", runs=tmp_path))


def test_a_model_is_continued_in_its_range_of_grey(tmp_path: Path, folder: Path, finished: TrainResult) -> None:
    network, manifest = load_checkpoint(finished.checkpoint)
    start = save_checkpoint(
        tmp_path / "start.safetensors", network,
        manifest.replace(intensity=IntensityRecord(black=0.1, white=0.8), normalization=manifest.normalization),
    )  # fmt: skip
    same = read_manifest(train(tiny(folder, runs=tmp_path / "same", start=start)).checkpoint)
    assert same.intensity == IntensityRecord(black=0.1, white=0.8)
    assert same.normalization == manifest.normalization


def test_other_classes_get_a_new_head_and_keep_what_they_share(
    tmp_path: Path, folder: Path, finished: TrainResult, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    description = json.loads((other / "dataset.json").read_text())
    description["classes"] = [{"name": name} for name in ("crack", "clay", "grain", "pore")]
    (other / "dataset.json").write_text(json.dumps({"classes": description["classes"]}))
    barely = ["optimization.lr=1e-12", "optimization.ema_decay=null", "optimization.max_steps=1"]
    with caplog.at_level(logging.INFO, "hpddrnet_trt.training"):
        tuned = train(tiny(other, *barely, runs=tmp_path, start=finished.checkpoint)).checkpoint
    assert "new to it: crack; the rest of the network is kept" in caplog.text
    (before, _), (after, manifest) = load_checkpoint(finished.checkpoint), load_checkpoint(tuned)
    assert manifest.class_names == ["crack", "clay", "grain", "pore"]
    assert manifest.intensity == IntensityRecord(bits=8)
    assert any("new to it: crack" in remark for remark in manifest.remarks)
    assert torch.allclose(after.backbone.stem[0].conv.weight, before.backbone.stem[0].conv.weight, atol=1e-6)
    rows = [before.decode_head.conv_seg.weight[index] for index in (2, 0, 1)]
    assert torch.allclose(after.decode_head.conv_seg.weight[1:], torch.stack(rows), atol=1e-6)


def test_bfloat16_leaves_attention_its_range() -> None:
    """Rounded scores of a trained attention point the gradients of all before it elsewhere."""
    network = load_checkpoint(locate("nasa-super1", CHECKPOINT))[0].train()
    attention = network.backbone.sps[0]
    torch.manual_seed(0)
    x = torch.randn(2, 128, 16, 16) * 3
    gradients = []
    for enabled in (False, True):
        given = x.clone().requires_grad_()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            attention.pa(given.flatten(2).transpose(1, 2)).float().pow(2).sum().backward()
        gradients.append(given.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
